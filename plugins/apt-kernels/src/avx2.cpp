// AVX2: eight columns at a time. For a byte of the mask, a table has the index of each column's value.
#if defined(__x86_64__) && defined(__GNUC__)
#include "matrix.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi")
#include <immintrin.h>

namespace apt {
namespace {

constexpr int LANES = 8;
using Lanes = __m256;

inline Lanes zero() { return _mm256_setzero_ps(); }
inline Lanes same(float value) { return _mm256_set1_ps(value); }
inline Lanes load(const float *x) { return _mm256_loadu_ps(x); }
inline Lanes load(const uint16_t *x) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline void store(float *x, Lanes lanes) { _mm256_storeu_ps(x, lanes); }
inline void store(uint16_t *x, Lanes lanes) {
    alignas(32) float values[LANES];
    _mm256_store_ps(values, lanes);
    for (int i = 0; i < LANES; ++i) x[i] = to_bf16(values[i]);
}
inline Lanes scaled(Lanes lanes, float factor) { return _mm256_mul_ps(lanes, same(factor)); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes sum) { return _mm256_fmadd_ps(a, b, sum); }
inline float total(Lanes lanes) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

// For each byte of the mask and each of its columns: the index of the column's value, or 128 if it
// has none.
struct Table {
    uint8_t places[256][8];
    constexpr Table() : places() {
        for (int byte = 0; byte < 256; ++byte) {
            uint8_t next = 0;
            for (int bit = 0; bit < 8; ++bit) places[byte][bit] = byte >> bit & 1 ? next++ : 128;
        }
    }
};
constexpr Table TABLE;

// Eight consecutive values, moved to the columns of a byte of the mask; the others are zero.
inline Lanes placed(Lanes values, uint8_t byte) {
    const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(TABLE.places[byte]));
    const __m256i wide = _mm256_cvtepi8_epi32(places);  // below zero where there is no value
    const Lanes moved = _mm256_permutevar8x32_ps(values, wide);
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(wide, 31)), moved);
}

inline __m128i load16(const void *values) {
    return _mm_loadu_si128(static_cast<const __m128i *>(values));
}

template <int32_t kind>
inline Lanes eight(const uint8_t *values, int index);

template <>
inline Lanes eight<FP16>(const uint8_t *values, int index) {
    return _mm256_cvtph_ps(load16(values + 2 * index));
}
template <>
inline Lanes eight<FP32>(const uint8_t *values, int index) {
    return _mm256_loadu_ps(reinterpret_cast<const float *>(values + 4 * index));
}
template <int32_t kind>
struct Word {
    const uint8_t *values;
    uint64_t bits;
    Word(const uint8_t *begin, uint64_t mask) : values(begin), bits(mask) {}
    inline Lanes lanes(int part) const {
        const uint64_t before = part ? bits & ((uint64_t{1} << (8 * part)) - 1) : 0;
        const Lanes found = eight<kind>(values, __builtin_popcountll(before));
        return placed(found, static_cast<uint8_t>(bits >> (8 * part)));
    }
};

// Like `Table`, for a shuffle of bytes: a column's value of `size` bytes becomes the highest bytes of 32
// bits.
template <int size>
struct HighTable {
    uint8_t places[256][32];
    constexpr HighTable() : places() {
        for (int byte = 0; byte < 256; ++byte) {
            int index = 0;
            for (int bit = 0; bit < 8; ++bit) {
                const bool is_kept = byte >> bit & 1;
                for (int i = 0; i < 4; ++i) {
                    const bool has_value = is_kept && i >= 4 - size;
                    const int place = has_value ? size * index + i - (4 - size) : 128;
                    places[byte][4 * bit + i] = static_cast<uint8_t>(place);
                }
                index += is_kept;
            }
        }
    }
};
template <int size>
alignas(32) constexpr HighTable<size> HIGH;

// Values of one or two bytes, moved to the highest bits of the columns.
template <int size>
struct High {
    const uint8_t *values;
    uint64_t bits;
    inline __m256i highest(int part) const {
        const uint64_t before = part ? bits & ((uint64_t{1} << (8 * part)) - 1) : 0;
        const uint8_t *begin = values + size * __builtin_popcountll(before);
        const auto byte = static_cast<uint8_t>(bits >> (8 * part));
        const auto *places = reinterpret_cast<const __m256i *>(HIGH<size>.places[byte]);
        const __m128i eight = size == 1 ? _mm_loadl_epi64(reinterpret_cast<const __m128i *>(begin))
                                        : load16(begin);
        const __m256i twice = size == 1 ? _mm256_broadcastq_epi64(eight)
                                        : _mm256_broadcastsi128_si256(eight);
        return _mm256_shuffle_epi8(twice, _mm256_load_si256(places));
    }
};

template <>
struct Word<BF16> : High<2> {
    Word(const uint8_t *begin, uint64_t mask) : High<2>{begin, mask} {}
    inline Lanes lanes(int part) const { return _mm256_castsi256_ps(highest(part)); }
};

// The conversion of an integer moves it from the highest bits of 32 to the lowest ones, with its sign.
template <>
struct Word<INT8> : High<1> {
    Word(const uint8_t *begin, uint64_t mask) : High<1>{begin, mask} {}
    inline Lanes lanes(int part) const {
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(highest(part), 24));
    }
};

template <>
struct Word<INT4> : High<1> {
    __m256i left;
    Word(const uint8_t *begin, uint64_t mask, bool upper)
        : High<1>{begin, mask}, left(_mm256_set1_epi32(upper ? 0 : 4)) {}
    inline Lanes lanes(int part) const {
        const __m256i moved = _mm256_sllv_epi32(highest(part), left);
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(moved, 28));
    }
};

}  // namespace
#include "vectors.inc"

const Kernels &avx2() {
    static const Kernels kernels{product, expand<float>, expand<uint16_t>,
                                 attend<float>, attend<uint16_t>, nullptr, nullptr};
    return kernels;
}

}  // namespace apt
#pragma GCC pop_options
#endif
