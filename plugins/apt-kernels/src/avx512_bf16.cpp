// AVX-512 with VBMI2, BF16 and VNNI: products of pairs of bf16 values, summed in fp32, and of four
// integers of 8 bits, summed exactly. Other kinds of values use the kernels of AVX-512.
#if defined(__x86_64__) && defined(__GNUC__)
#include "matrix.h"

#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512bf16,avx512vnni,fma,f16c,popcnt,avx2")
#include "expand512.inc"

namespace apt {
namespace {

constexpr int64_t AHEAD = 4096;  // bytes of values to ask for in advance

inline __m512bh as_bf16(__m512i bits) {
    __m512bh found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
}

template <int batch>
void all_rows(const Matrix &m, const uint16_t *x, int64_t first, int64_t last, float *y) {
    const int64_t width = WORD * m.words;
    const uint8_t *values = static_cast<const uint8_t *>(m.values);
    for (int64_t row = first; row < last; ++row) {
        const uint8_t *place = values + m.offsets[row];
        const uint64_t *mask = m.mask + row * m.mask_stride;
        __m512 sums[batch][2];
        for (int b = 0; b < batch; ++b) sums[b][0] = sums[b][1] = _mm512_setzero_ps();
        for (int64_t word = 0; word < m.words; ++word) {
            const uint64_t bits = mask[word];
            const auto low = static_cast<uint32_t>(bits), high = static_cast<uint32_t>(bits >> 32);
            const uint8_t *middle = place + 2 * __builtin_popcount(low);
            _mm_prefetch(reinterpret_cast<const char *>(place + AHEAD), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char *>(place + AHEAD + 64), _MM_HINT_T0);
            const __m512bh first_half = as_bf16(expanded16(place, low));
            const __m512bh second_half = as_bf16(expanded16(middle, high));
            place += 2 * __builtin_popcountll(bits);
            for (int b = 0; b < batch; ++b) {
                const uint16_t *given = x + b * width + word * WORD;
                sums[b][0] = _mm512_dpbf16_ps(sums[b][0], first_half,
                                              as_bf16(_mm512_loadu_si512(given)));
                sums[b][1] = _mm512_dpbf16_ps(sums[b][1], second_half,
                                              as_bf16(_mm512_loadu_si512(given + 32)));
            }
        }
        for (int b = 0; b < batch; ++b) {
            y[b * m.rows + row] = _mm512_reduce_add_ps(_mm512_add_ps(sums[b][0], sums[b][1]));
        }
    }
}

// Integers times vectors in two parts of 8 bits. Sums of a group are exact: `Split` serves no wide ones.
template <int32_t kind, int batch>
void integer_rows(const Matrix &m, const Vectors &x, int64_t begin, int64_t first, int64_t last,
                  float *y) {
    const int64_t width = WORD * m.words, groups = (m.words + m.group_words - 1) / m.group_words;
    const uint8_t *values = static_cast<const uint8_t *>(m.values);
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t row = first; row < last; ++row) {
        const uint8_t *place = values + m.offsets[row];
        const uint64_t *mask = m.mask + row * m.mask_stride;
        __m512 sums[batch];
        for (int b = 0; b < batch; ++b) sums[b] = _mm512_setzero_ps();
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t start = group * m.group_words;
            const int64_t end = start + m.group_words < m.words ? start + m.group_words : m.words;
            __m512i high[batch], low[batch], count = _mm512_setzero_si512();
            for (int b = 0; b < batch; ++b) high[b] = low[b] = _mm512_setzero_si512();
            for (int64_t word = start; word < end; ++word) {
                const uint64_t bits = mask[word];
                _mm_prefetch(reinterpret_cast<const char *>(place + AHEAD), _MM_HINT_T0);
                const __m512i found = integers<kind>(place, bits);
                place += value_bytes(kind, __builtin_popcountll(bits));
                count = _mm512_dpbusd_epi32(count, ones, found);
                for (int b = 0; b < batch; ++b) {
                    const int64_t at = (begin + b) * width + word * WORD;
                    high[b] = _mm512_dpbusd_epi32(high[b], _mm512_loadu_si512(x.high + at), found);
                    low[b] = _mm512_dpbusd_epi32(low[b], _mm512_loadu_si512(x.low + at), found);
                }
            }
            const float scale = m.scales[row * groups + group];
            for (int b = 0; b < batch; ++b) {
                const __m512i shifted = _mm512_slli_epi32(_mm512_sub_epi32(high[b], _mm512_slli_epi32(count, 7)), 8);
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(shifted, low[b]));
                const float factor = scale * x.scales[(begin + b) * groups + group];
                sums[b] = _mm512_fmadd_ps(sum, _mm512_set1_ps(factor), sums[b]);
            }
        }
        for (int b = 0; b < batch; ++b) y[(begin + b) * m.rows + row] = _mm512_reduce_add_ps(sums[b]);
    }
}

template <int32_t kind>
void integer_product(const Matrix &m, const Vectors &x, int64_t first, int64_t last, float *y) {
    int64_t b = 0;
    for (; b + 4 <= x.batch; b += 4) integer_rows<kind, 4>(m, x, b, first, last, y);
    for (; b + 2 <= x.batch; b += 2) integer_rows<kind, 2>(m, x, b, first, last, y);
    for (; b < x.batch; ++b) integer_rows<kind, 1>(m, x, b, first, last, y);
}

void product(const Matrix &m, const Vectors &x, int64_t first, int64_t last, float *y) {
    if (m.kind == INT8 && x.high) return integer_product<INT8>(m, x, first, last, y);
    if (m.kind == INT4 && x.high) return integer_product<INT4>(m, x, first, last, y);
    if (m.kind != BF16 || !x.bf16) return avx512().product(m, x, first, last, y);
    const int64_t width = WORD * m.words;
    const uint16_t *xb = x.bf16;
    int64_t b = 0;
    for (; b + 4 <= x.batch; b += 4) all_rows<4>(m, xb + b * width, first, last, y + b * m.rows);
    for (; b + 2 <= x.batch; b += 2) all_rows<2>(m, xb + b * width, first, last, y + b * m.rows);
    for (; b < x.batch; ++b) all_rows<1>(m, xb + b * width, first, last, y + b * m.rows);
}

}  // namespace

const Kernels &avx512_bf16() {
    static const Kernels kernels{product, avx512().expand, avx512().expand_bf16,
                                 avx512().attend, avx512().attend_bf16, tiled, true};
    return kernels;
}

}  // namespace apt
#pragma GCC pop_options
#endif
