// AVX-512 with VBMI2, BF16 and VNNI: products of pairs of bf16 values, summed in fp32, and of four
// integers of 8 bits, summed exactly. Other kinds of values use the kernels of AVX-512.
#if defined(__x86_64__) && defined(__GNUC__)
#include <cmath>
#include <limits>

#include "matrix.h"

#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512bf16,avx512vnni,fma,f16c,popcnt,avx2")
#include "expand512.inc"

namespace apt {
namespace {

constexpr int64_t AHEAD = 4096;    // bytes of values to ask for in advance
constexpr float MOST = 32512.0f;   // 127 * 256: the largest number of the two parts of a vector

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

// What is added to integers so that none is below zero. A removed weight is then this number, too: the
// sum that is to be subtracted does not depend on the mask.
constexpr int offset_of(int32_t kind) { return kind == INT8 ? 128 : 8; }

// 64 consecutive integers, with their offset.
template <int32_t kind, bool upper>
inline __m512i integers(const uint8_t *values) {
    const __m512i found = _mm512_loadu_si512(values);
    if (kind == INT8) return _mm512_xor_si512(found, _mm512_set1_epi8(-128));
    const __m512i moved = upper ? _mm512_srli_epi16(found, 4) : found;
    constexpr int AND_XOR = 0x6a;  // (a & b) ^ c
    return _mm512_ternarylogic_epi32(moved, _mm512_set1_epi8(15), _mm512_set1_epi8(8), AND_XOR);
}

// A row times `batch` vectors. `whole`: no weight was removed, so the mask is not read.
template <int32_t kind, int batch, bool whole>
class IntegerRow {
  public:
    IntegerRow(const Matrix &m, const Vectors &x, int64_t begin, int64_t row)
        : width_(WORD * m.words),
          lower_(static_cast<const uint8_t *>(m.values) + m.offsets[row]),
          upper_(lower_),
          mask_(m.mask + row * m.mask_stride),
          x_high_(x.high + begin * width_),
          x_low_(x.low + begin * width_) {}

    inline void start(const int32_t *starts, int64_t stride) {
        for (int b = 0; b < batch; ++b) {
            high_[b] = _mm512_setzero_si512();
            low_[b] = _mm512_load_si512(starts + b * stride);
        }
    }

    // Adds a word; `odd` is the last bit of its number.
    template <bool odd>
    inline void add(int64_t word) {
        constexpr bool upper = kind == INT4 && odd;
        const uint8_t *&place = upper ? upper_ : lower_;
        if (!upper) prefetch(place);
        __m512i found = integers<kind, upper>(place);
        if (whole) {
            place += WORD;
        } else {
            const uint64_t bits = mask_[word];
            if (!odd && word % 8 == 0) prefetch(mask_ + word);
            found = expanded8(found, bits, _mm512_set1_epi8(static_cast<char>(offset_of(kind))));
            place += __builtin_popcountll(bits);
        }
        for (int b = 0; b < batch; ++b) {
            const int64_t at = b * width_ + word * WORD;
            high_[b] = _mm512_dpbusd_epi32(high_[b], found, _mm512_load_si512(x_high_ + at));
            low_[b] = _mm512_dpbusd_epi32(low_[b], found, _mm512_load_si512(x_low_ + at));
        }
    }

    // The sums of a group; `small`: those of the high parts fit into 16 bits.
    template <bool small>
    inline __m512 sums(int b) const {
        const __m512i sum =
            small ? _mm512_dpwssd_epi32(low_[b], high_[b], _mm512_set1_epi32(256))
                  : _mm512_add_epi32(low_[b], _mm512_slli_epi32(high_[b], 8));
        return _mm512_cvtepi32_ps(sum);
    }

  private:
    static inline void prefetch(const void *place) {
        _mm_prefetch(static_cast<const char *>(place) + AHEAD, _MM_HINT_T0);
    }

    const int64_t width_;
    const uint8_t *lower_, *upper_;
    const uint64_t *mask_;
    const int8_t *x_high_, *x_low_;
    __m512i high_[batch], low_[batch];
};

constexpr int64_t SOME = 64;  // groups whose factors are multiplied at a time

// The scales of groups times those of vectors: (batch, SOME).
template <int batch>
inline void multiply_scales(const float *scales, const float *given, int64_t groups, int64_t count,
                            float (*factors)[SOME]) {
    for (int64_t g = 0; g < count; g += 16) {
        const auto lanes = static_cast<__mmask16>(count - g < 16 ? (1 << (count - g)) - 1 : 0xffff);
        const __m512 own = _mm512_maskz_loadu_ps(lanes, scales + g);
        for (int b = 0; b < batch; ++b) {
            const __m512 x = _mm512_maskz_loadu_ps(lanes, given + b * groups + g);
            _mm512_store_ps(factors[b] + g, _mm512_mul_ps(own, x));
        }
    }
}

// `pairs`: groups have two words, the default of 128 columns. The sums of a group are exact.
template <int32_t kind, int batch, bool whole, bool pairs>
void integer_rows(const Matrix &m, const Vectors &x, int64_t begin, int64_t first, int64_t last,
                  float *y) {
    const int64_t step = pairs ? 2 : m.group_words, groups = (m.words + step - 1) / step;
    const int64_t stride = LANES_OF_SUMS * groups;
    alignas(64) float factors[batch][SOME];
    for (int64_t row = first; row < last; ++row) {
        IntegerRow<kind, batch, whole> sums(m, x, begin, row);
        __m512 total[batch];
        for (int b = 0; b < batch; ++b) total[b] = _mm512_setzero_ps();
        for (int64_t some = 0; some < groups; some += SOME) {
            const int64_t count = groups - some < SOME ? groups - some : SOME;
            multiply_scales<batch>(m.scales + row * groups + some, x.scales + begin * groups + some,
                                   groups, count, factors);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t group = some + i;
                int64_t word = group * step;
                const int64_t end = word + step < m.words ? word + step : m.words;
                sums.start(x.starts + begin * stride + group * LANES_OF_SUMS, stride);
                if (!pairs && word % 2) sums.template add<true>(word++);
                if (!pairs) {
                    for (; word + 2 < end; word += 2) {
                        sums.template add<false>(word);
                        sums.template add<true>(word + 1);
                    }
                }
                if (word < end) sums.template add<false>(word);
                if (word + 1 < end) sums.template add<true>(word + 1);
                for (int b = 0; b < batch; ++b) {
                    const __m512 sum = sums.template sums<kind == INT4 && pairs>(b);
                    total[b] = _mm512_fmadd_ps(sum, _mm512_set1_ps(factors[b][i]), total[b]);
                }
            }
        }
        for (int b = 0; b < batch; ++b) y[(begin + b) * m.rows + row] = _mm512_reduce_add_ps(total[b]);
    }
}

// True if no weight was removed from any row. The columns of the last word are not known: where some of
// its bits are 0, weights may have been removed behind the last one that is kept.
bool is_whole(const Matrix &m) {
    if (m.mask_stride) return false;
    for (int64_t word = 0; word < m.words; ++word) {
        if (~m.mask[word]) return false;
    }
    return m.words;
}

template <int32_t kind, int batch>
void integer_vectors(const Matrix &m, const Vectors &x, int64_t begin, int64_t first, int64_t last,
                     float *y) {
    const bool whole = is_whole(m), pairs = m.group_words == 2;
    const auto rows = whole ? pairs ? integer_rows<kind, batch, true, true>
                                    : integer_rows<kind, batch, true, false>
                      : pairs ? integer_rows<kind, batch, false, true>
                              : integer_rows<kind, batch, false, false>;
    rows(m, x, begin, first, last, y);
}

template <int32_t kind>
void integer_product(const Matrix &m, const Vectors &x, int64_t first, int64_t last, float *y) {
    int64_t b = 0;
    for (; b + 4 <= x.batch; b += 4) integer_vectors<kind, 4>(m, x, b, first, last, y);
    for (; b + 3 <= x.batch; b += 3) integer_vectors<kind, 3>(m, x, b, first, last, y);
    for (; b + 2 <= x.batch; b += 2) integer_vectors<kind, 2>(m, x, b, first, last, y);
    for (; b < x.batch; ++b) integer_vectors<kind, 1>(m, x, b, first, last, y);
}

float split(int32_t kind, const float *x, int64_t words, int8_t *high, int8_t *low, int32_t *start) {
    const int64_t columns = WORD * words;
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();  // bits of magnitudes are ordered as these are
    for (int64_t i = 0; i < columns; i += 16) {
        const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(x + i));
        largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, magnitude));
    }
    const int32_t bits = _mm512_reduce_max_epi32(largest);
    float most;
    std::memcpy(&most, &bits, sizeof most);
    const float inverse = most > 0.0f ? MOST / most : 0.0f;
    if (!(most < HUGE_VALF && inverse < HUGE_VALF)) return HUGE_VALF;
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i high_sums = _mm512_setzero_si512(), low_sums = _mm512_setzero_si512();
    for (int64_t word = 0; word < columns; word += WORD) {
        for (int64_t i = word; i < word + WORD; i += 16) {
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(inverse));
            const __m512i whole = _mm512_cvtps_epi32(scaled);
            const __m512i nearest = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
            _mm_store_si128(reinterpret_cast<__m128i *>(high + i), _mm512_cvtepi32_epi8(nearest));
            _mm_store_si128(reinterpret_cast<__m128i *>(low + i), _mm512_cvtepi32_epi8(whole));
        }
        high_sums = _mm512_dpbusd_epi32(high_sums, ones, _mm512_load_si512(high + word));
        low_sums = _mm512_dpbusd_epi32(low_sums, ones, _mm512_load_si512(low + word));
    }
    const __m512i sums = _mm512_add_epi32(_mm512_slli_epi32(high_sums, 8), low_sums);
    const __m512i minus = _mm512_set1_epi32(-offset_of(kind));
    _mm512_store_si512(start, _mm512_mullo_epi32(sums, minus));
    return most / MOST;
}

void product(const Matrix &m, const Vectors &x, int64_t first, int64_t last, float *y) {
    if (m.kind == INT8 && x.high) return integer_product<INT8>(m, x, first, last, y);
    if (m.kind == INT4 && x.high) return integer_product<INT4>(m, x, first, last, y);
    if (m.kind != BF16 || !x.bf16) return avx512().product(m, x, first, last, y);
    const int64_t width = WORD * m.words;
    const uint16_t *xb = x.bf16;
    int64_t b = 0;
    for (; b + 4 <= x.batch; b += 4) all_rows<4>(m, xb + b * width, first, last, y + b * m.rows);
    for (; b + 3 <= x.batch; b += 3) all_rows<3>(m, xb + b * width, first, last, y + b * m.rows);
    for (; b + 2 <= x.batch; b += 2) all_rows<2>(m, xb + b * width, first, last, y + b * m.rows);
    for (; b < x.batch; ++b) all_rows<1>(m, xb + b * width, first, last, y + b * m.rows);
}

template <int32_t kind>
void expand_integers(const Matrix &m, int64_t first, int64_t last, uint16_t *dense) {
    const int64_t groups = (m.words + m.group_words - 1) / m.group_words;
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(offset_of(kind)));
    for (int64_t row = first; row < last; ++row) {
        Places places(m, row);
        for (int64_t word = 0; word < m.words; ++word, dense += WORD) {
            const uint64_t bits = m.mask[row * m.mask_stride + word];
            const uint8_t *values = places.take(kind, word, __builtin_popcountll(bits));
            const __m512i found = Places::upper(kind, word) ? integers<kind, true>(values)
                                                            : integers<kind, false>(values);
            const __m512i whole = expanded8(_mm512_sub_epi8(found, offset), bits);
            const __m512 scale = _mm512_set1_ps(m.scales[row * groups + word / m.group_words]);
            const auto scaled = [&](__m128i quarter) {
                return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter)), scale);
            };
            const __m512bh low = _mm512_cvtne2ps_pbh(scaled(_mm512_extracti32x4_epi32(whole, 1)),
                                                     scaled(_mm512_castsi512_si128(whole)));
            const __m512bh high = _mm512_cvtne2ps_pbh(scaled(_mm512_extracti32x4_epi32(whole, 3)),
                                                      scaled(_mm512_extracti32x4_epi32(whole, 2)));
            std::memcpy(dense, &low, sizeof low);
            std::memcpy(dense + WORD / 2, &high, sizeof high);
        }
    }
}

// True if no weight of these rows is subnormal: the conversion to bf16 would replace it by zero.
bool all_normal(const Matrix &m, int64_t first, int64_t last) {
    const int64_t groups = (m.words + m.group_words - 1) / m.group_words;
    for (int64_t i = first * groups; i < last * groups; ++i) {
        if (!(std::fabs(m.scales[i]) >= std::numeric_limits<float>::min())) return false;
    }
    return true;
}

void expand_half(const Matrix &m, int64_t first, int64_t last, uint16_t *dense) {
    if (m.kind == INT8 && all_normal(m, first, last)) return expand_integers<INT8>(m, first, last, dense);
    if (m.kind == INT4 && all_normal(m, first, last)) return expand_integers<INT4>(m, first, last, dense);
    avx512().expand_bf16(m, first, last, dense);
}

}  // namespace

const Kernels &avx512_bf16() {
    static const Kernels kernels{product, avx512().expand, expand_half,
                                 avx512().attend, avx512().attend_bf16, tiled, split};
    return kernels;
}

}  // namespace apt
#pragma GCC pop_options
#endif
