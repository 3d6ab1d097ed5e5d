// The functions that Python calls through ctypes, and the choice of the instruction set.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "matrix.h"
#include "pool.h"

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

// Runs work(part) for each part. On the threads of torch if they are known: they wait for the next
// operation by spinning, so threads beside them would get no processor.
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

int64_t least_rows(const Matrix &m) {  // of a part: below 2^15 columns, a thread costs more
    return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, WORD * m.words));
}

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

// The vectors of a product with integers in two parts of 8 bits.
class Split {
  public:
    Split(const Matrix &m, const float *x, int64_t batch) {
        if (!m.group_words || !batch || std::min(m.group_words, m.words) > MOST) return;
        const int64_t width = WORD * m.words, step = WORD * m.group_words;
        const int64_t groups = (width + step - 1) / step;
        parts_.resize(2 * batch * width);
        scales_.resize(batch * groups);
        uint8_t *high = parts_.data(), *low = high + batch * width;
        for (int64_t b = 0; b < batch; ++b) {
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t begin = b * width + g * step;
                const int64_t count = std::min(step, width - g * step);
                scales_[b * groups + g] = split(x + begin, count, high + begin, low + begin);
                finite_ = finite_ && std::isfinite(scales_[b * groups + g]);
            }
        }
    }

    Vectors vectors(int64_t batch, const float *x, const uint16_t *xb) const {
        if (scales_.empty() || !finite_) return {batch, x, xb, nullptr, nullptr, nullptr};
        const uint8_t *high = parts_.data();
        return {batch, x, xb, high, high + parts_.size() / 2, scales_.data()};
    }

  private:
    static constexpr int64_t MOST = 128;  // words of a group; the sums of 130 overflow 32 bits

    static float split(const float *x, int64_t count, uint8_t *high, uint8_t *low) {
        float most = 0.0f, sum = 0.0f;  // the sum is not finite if a value is not
        for (int64_t i = 0; i < count; ++i) {
            most = std::max(most, std::fabs(x[i]));
            sum += x[i] * 0.0f;
        }
        if (!std::isfinite(sum)) return sum;
        const float scale = most / 32512.0f;
        const float inverse = most > 0.0f ? 32512.0f / most : 0.0f;
        for (int64_t i = 0; i < count; ++i) {
            const int whole = static_cast<int>(std::nearbyintf(x[i] * inverse)) + 32768;
            high[i] = static_cast<uint8_t>(whole >> 8);
            low[i] = static_cast<uint8_t>(whole & 255);
        }
        return scale;
    }

    std::vector<uint8_t> parts_;
    std::vector<float> scales_;
    bool finite_ = true;
};

}  // namespace
}  // namespace apt

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// The best instruction set of this processor.
EXPORT int apt_level() { return apt::supported(); }

// Use the threads of an OpenMP runtime, of which this is the function GOMP_parallel.
EXPORT void apt_use_openmp(void *parallel) {
    apt::pool();  // which sees to forks: a child has none of these threads, before a product as well
    apt::openmp = reinterpret_cast<apt::Parallel>(parallel);
}

// The offsets of the values of each row, from the mask; returns the bytes of all values.
EXPORT int64_t apt_offsets(const uint64_t *mask, int64_t rows, int64_t words, int kind,
                           int64_t *offsets) {
    int64_t place = 0;
    for (int64_t row = 0; row < rows; ++row) {
        offsets[row] = place;
        for (int64_t word = 0; word < words; ++word) {
            place += apt::value_bytes(kind, __builtin_popcountll(mask[row * words + word]));
        }
    }
    return place;
}

// y (batch, rows) = x (batch, 64 * words) times the transposed matrix.
EXPORT void apt_product(const apt::Matrix *matrix, const float *x, const uint16_t *xb,
                        int64_t batch, float *y, int threads, int level) {
    const apt::Kernels &kernels = apt::kernels_of(level);
    const int64_t least = apt::least_rows(*matrix);
    const int parts = static_cast<int>(std::clamp<int64_t>(matrix->rows / least, 1, threads));
    const apt::Split split(*matrix, x, kernels.split ? batch : 0);
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
