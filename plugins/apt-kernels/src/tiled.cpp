// Products with many vectors in bf16, on AVX-512 with BF16. A few rows at a time are expanded into
// the cache of the thread that multiplies them: no other thread reads them.
#if defined(__x86_64__) && defined(__GNUC__)
#include <algorithm>
#include <new>

#include "matrix.h"

#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512bf16,avx512vnni,fma,f16c,popcnt,avx2")
#include <immintrin.h>

namespace apt {
namespace {

constexpr int64_t ROWS = 4, VECTORS = 6;  // of a block: its sums fill 24 of 32 registers
constexpr int64_t COLUMNS = 1536;         // of a block, which fits into a first-level cache of 32 KiB
constexpr int64_t TILE = 512 * 1024;      // bytes of expanded rows, of a second-level cache of 1 MiB
constexpr int64_t MANY = 96;              // vectors whose sums are kept at a time

// Memory that begins at a line of the cache.
template <class T>
class Memory {
  public:
    explicit Memory(int64_t count) : begin_(new (LINE) T[count]) {}
    ~Memory() { operator delete[](begin_, LINE); }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;
    T *get() const { return begin_; }

  private:
    static constexpr std::align_val_t LINE{64};
    T *begin_;
};

inline __m512bh loaded(const uint16_t *values) {
    const __m512i bits = _mm512_loadu_si512(values);
    __m512bh found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
}

// The sums of the elements of four registers.
inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Adds four rows times `vectors` vectors, over `columns` of their `width` columns, to `sums`.
template <int vectors>
void block(const uint16_t *dense, const uint16_t *x, int64_t width, int64_t columns, float *sums,
           int64_t stride) {
    __m512 found[vectors][ROWS];
    for (auto &each : found) {
        for (auto &sum : each) sum = _mm512_setzero_ps();
    }
    for (int64_t column = 0; column < columns; column += 32) {
        __m512bh row[ROWS];
        for (int64_t r = 0; r < ROWS; ++r) row[r] = loaded(dense + r * width + column);
        for (int v = 0; v < vectors; ++v) {
            const __m512bh given = loaded(x + v * width + column);
            for (int64_t r = 0; r < ROWS; ++r) found[v][r] = _mm512_dpbf16_ps(found[v][r], row[r], given);
        }
    }
    for (int v = 0; v < vectors; ++v) {
        float *at = sums + v * stride;
        const __m128 sum = sums_of(found[v][0], found[v][1], found[v][2], found[v][3]);
        _mm_storeu_ps(at, _mm_add_ps(_mm_loadu_ps(at), sum));
    }
}

using Block = decltype(&block<1>);
constexpr Block BLOCKS[] = {nullptr, block<1>, block<2>, block<3>, block<4>, block<5>, block<6>};

// Expanded rows times all vectors: sums (batch, rows), where rows is a multiple of ROWS.
void multiply(const uint16_t *dense, const uint16_t *x, int64_t width, int64_t batch, int64_t rows,
              float *sums) {
    std::fill(sums, sums + batch * rows, 0.0f);
    for (int64_t column = 0; column < width; column += COLUMNS) {
        const int64_t columns = std::min(COLUMNS, width - column);
        for (int64_t v = 0; v < batch; v += VECTORS) {
            const Block some = BLOCKS[std::min(VECTORS, batch - v)];
            for (int64_t row = 0; row < rows; row += ROWS) {
                some(dense + row * width + column, x + v * width + column, width, columns,
                     sums + v * rows + row, rows);
            }
        }
    }
}

}  // namespace

void tiled(const Matrix &m, const uint16_t *x, int64_t batch, int64_t first, int64_t last,
           uint16_t *y) {
    const int64_t width = WORD * m.words;
    const int64_t most = width ? TILE / (2 * width) / ROWS * ROWS : TILE;
    const int64_t step = std::clamp(last - first + ROWS - 1, ROWS, std::max(ROWS, most)) / ROWS * ROWS;
    const Memory<uint16_t> dense(step * width);
    const Memory<float> sums(std::min(MANY, batch) * step);
    for (int64_t begin = first; begin < last; begin += step) {
        const int64_t count = std::min(step, last - begin), rows = (count + ROWS - 1) / ROWS * ROWS;
        avx512_bf16().expand_bf16(m, begin, begin + count, dense.get());
        std::fill(dense.get() + count * width, dense.get() + rows * width, 0);
        for (int64_t start = 0; start < batch; start += MANY) {
            const int64_t vectors = std::min(MANY, batch - start);
            multiply(dense.get(), x + start * width, width, vectors, rows, sums.get());
            for (int64_t v = 0; v < vectors; ++v) {
                uint16_t *to = y + (start + v) * m.rows + begin;
                const float *from = sums.get() + v * rows;
                for (int64_t row = 0; row < count; ++row) to[row] = to_bf16(from[row]);
            }
        }
    }
}

}  // namespace apt
#pragma GCC pop_options
#endif
