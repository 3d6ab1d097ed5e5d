// The functions that Python calls through ctypes, and the choice of the instruction set.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "pool.h"
#include "products.h"

namespace apt {
namespace {

enum Level : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, NEON = 4 };

int supported() {
#if defined(__aarch64__)
    return NEON;
#elif defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool wide = fma && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
                      __builtin_cpu_supports("avx512vbmi2");
    if (wide && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
        return AVX512_BF16;
    }
    if (wide) return AVX512;
    if (fma) return AVX2;
#endif
    return PORTABLE;
}

// GOMP_parallel of an OpenMP runtime: calls a function on each thread of a team.
using Parallel = void (*)(void (*)(void *), void *, unsigned threads, unsigned flags);
std::atomic<Parallel> openmp{nullptr};

// The pool lives as long as the process: its threads may still wait when the program ends. A child
// that was made by fork has no threads: it needs a pool of its own, and its OpenMP would block.
Pool &pool() {
    static Pool *pool = new Pool;
#if !defined(_WIN32)
    static const bool once = [] {
        pthread_atfork(nullptr, nullptr, [] {
            pool = new Pool;
            openmp = nullptr;
        });
        return true;
    }();
    (void)once;
#endif
    return *pool;
}

}  // namespace

const Kernels &kernels_of(int level) {
    switch (level) {
#if defined(__x86_64__) && defined(__GNUC__)
        case AVX2: return avx2();
        case AVX512: return avx512();
        case AVX512_BF16: return avx512_bf16();
#endif
#if defined(__aarch64__)
        case NEON: return neon();
#endif
        default: return portable();
    }
}

void parallel(int parts, const std::function<void(int)> &work) {
    Pool &own = pool();
    const Parallel team = openmp.load();
    if (!team || parts <= 1) return own.run(parts, work);
    struct Parts {
        std::atomic<int> next;
        const int count;
        const std::function<void(int)> &work;
    } shared{{0}, parts, work};
    team(
        [](void *data) {
            auto &all = *static_cast<Parts *>(data);
            for (int part; (part = all.next.fetch_add(1)) < all.count;) all.work(part);
        },
        &shared, 0, 0);
}

namespace {

// Rows without the columns that fill up the last word.
template <class T>
void expand_rows(const Matrix &m, Expand<T> expand, int64_t first, int64_t last, int64_t columns,
                 T *dense, int threads) {
    const int64_t rows = last - first, width = WORD * m.words;
    if (!rows) return;
    const int parts = static_cast<int>(std::clamp<int64_t>(rows / 16, 1, threads));
    parallel(parts, [&](int part) {
        const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
        if (columns == width) return expand(m, first + begin, first + end, dense + begin * width);
        const std::unique_ptr<T[]> line(new T[width]);
        for (int64_t row = begin; row < end; ++row) {
            expand(m, first + row, first + row + 1, line.get());
            std::copy(line.get(), line.get() + columns, dense + row * columns);
        }
    });
}

}  // namespace
}  // namespace apt

// The best instruction set of this processor.
EXPORT int apt_level() { return apt::supported(); }

// Use the threads of an OpenMP runtime, of which this is the function GOMP_parallel.
EXPORT void apt_use_openmp(void *parallel) {
    apt::pool();  // handles forks: a child process has none of these threads, also before a product
    apt::openmp = reinterpret_cast<apt::Parallel>(parallel);
}

// The offsets of the values of each row, from the mask; returns the bytes of all values.
EXPORT int64_t apt_offsets(const uint64_t *mask, int64_t rows, int64_t words, int kind,
                           int64_t *offsets) {
    int64_t place = 0;
    for (int64_t row = 0; row < rows; ++row) {
        offsets[row] = place;
        int64_t bytes[2] = {0, 0};
        for (int64_t word = 0; word < words; ++word, ++mask) {
            bytes[apt::Places::upper(kind, word)] +=
                apt::value_bytes(kind, __builtin_popcountll(*mask));
        }
        place += std::max(bytes[0], bytes[1]);
    }
    return place;
}

// Moves INT4 values from the order of the file to that of the kernels: two in a byte, the lower half
// first, each with 8 added. `values` are zeros before.
EXPORT void apt_arrange(const uint64_t *mask, int64_t rows, int64_t words, const int64_t *offsets,
                        const uint8_t *pairs, uint8_t *values) {
    int64_t index = 0;
    for (int64_t row = 0; row < rows; ++row) {
        uint8_t *next[2] = {values + offsets[row], values + offsets[row]};
        for (int64_t word = 0; word < words; ++word, ++mask) {
            uint8_t *&to = next[word % 2];
            const int64_t end = index + __builtin_popcountll(*mask);
            for (; index < end; ++index) {
                const int half = pairs[index >> 1] >> (4 * (index & 1)) & 15;
                *to++ |= static_cast<uint8_t>((half ^ 8) << (4 * (word % 2)));
            }
        }
    }
}

// y (batch, rows) = x (batch, 64 * words) times the transposed matrix.
EXPORT void apt_product(const apt::Matrix *matrix, const float *x, const uint16_t *xb,
                        int64_t batch, float *y, int threads, int level) {
    const apt::Kernels &kernels = apt::kernels_of(level);
    const int64_t least = apt::least_rows(*matrix);
    const int parts = static_cast<int>(std::clamp<int64_t>(matrix->rows / least, 1, threads));
    const apt::SplitVectors split(*matrix, x, batch, kernels);
    const apt::Vectors vectors = split.vectors(batch, x, xb);
    apt::parallel(parts, [&](int part) {
        const int64_t first = matrix->rows * part / parts, last = matrix->rows * (part + 1) / parts;
        kernels.product(*matrix, vectors, first, last, y);
    });
}

// y (batch, rows) = x (batch, 64 * words) times the transposed matrix, all in bf16, for many vectors.
// Returns 0 if this instruction set has no such product.
EXPORT int apt_tiled(const apt::Matrix *matrix, const uint16_t *x, int64_t batch, uint16_t *y,
                     int threads, int level) {
    const apt::Kernels &kernels = apt::kernels_of(level);
    if (!kernels.tiled) return 0;
    const int parts = static_cast<int>(std::clamp<int64_t>(matrix->rows / 16, 1, threads));
    apt::parallel(parts, [&](int part) {
        const int64_t first = matrix->rows * part / parts, last = matrix->rows * (part + 1) / parts;
        kernels.tiled(*matrix, x, batch, first, last, y);
    });
    return 1;
}

// Rows [first, last) with their zeros: (last - first, columns), as fp32 or bf16.
EXPORT void apt_expand(const apt::Matrix *matrix, int64_t first, int64_t last, int64_t columns,
                       void *dense, int bf16, int threads, int level) {
    const apt::Kernels &kernels = apt::kernels_of(level);
    if (bf16) {
        apt::expand_rows(*matrix, kernels.expand_bf16, first, last, columns,
                         static_cast<uint16_t *>(dense), threads);
    } else {
        apt::expand_rows(*matrix, kernels.expand, first, last, columns,
                         static_cast<float *>(dense), threads);
    }
}
