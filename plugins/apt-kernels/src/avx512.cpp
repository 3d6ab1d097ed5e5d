// AVX-512 with VBMI2: a load of consecutive values is expanded to the places of the mask.
#if defined(__x86_64__) && defined(__GNUC__)
#include "matrix.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,fma,f16c,popcnt,avx2")
#include "expand512.inc"

namespace apt {
namespace {

constexpr int LANES = 16;
using Lanes = __m512;

inline Lanes zero() { return _mm512_setzero_ps(); }
inline Lanes same(float value) { return _mm512_set1_ps(value); }
inline Lanes load(const float *x) { return _mm512_loadu_ps(x); }
inline Lanes widened_bf16(__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Lanes load(const uint16_t *x) {
    return widened_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(x)));
}
inline void store(float *x, Lanes lanes) { _mm512_storeu_ps(x, lanes); }
inline void store(uint16_t *x, Lanes lanes) {  // rounded as in to_bf16
    const __m512i bits = _mm512_castps_si512(lanes);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i more = _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff));
    const __m512i nan = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(lanes, lanes, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_mov_epi32(_mm512_add_epi32(bits, more), is_nan, nan);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(x),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline Lanes scaled(Lanes lanes, float factor) { return _mm512_mul_ps(lanes, same(factor)); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes sum) { return _mm512_fmadd_ps(a, b, sum); }
inline float total(Lanes lanes) { return _mm512_reduce_add_ps(lanes); }

inline Lanes widened_int8(__m128i quarter) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter));
}

// 64 values of 16 bits in their columns.
struct Word16 {
    __m512i halves[2];
    Word16(const uint8_t *values, uint64_t bits) {
        const __mmask32 low = static_cast<__mmask32>(bits), high = static_cast<__mmask32>(bits >> 32);
        halves[0] = expanded16(values, low);
        halves[1] = expanded16(values + 2 * __builtin_popcount(low), high);
    }
    inline __m256i quarter(int part) const {
        const __m512i half = halves[part >> 1];
        return part & 1 ? _mm512_extracti64x4_epi64(half, 1) : _mm512_castsi512_si256(half);
    }
};

// 64 integers of 8 bits in their columns.
struct Word8 {
    __m512i bytes;
    inline __m128i quarter(int part) const {
        switch (part) {
            case 0: return _mm512_castsi512_si128(bytes);
            case 1: return _mm512_extracti32x4_epi32(bytes, 1);
            case 2: return _mm512_extracti32x4_epi32(bytes, 2);
            default: return _mm512_extracti32x4_epi32(bytes, 3);
        }
    }
};

template <int32_t kind>
struct Word;

template <>
struct Word<BF16> : Word16 {
    using Word16::Word16;
    inline Lanes lanes(int part) const { return widened_bf16(quarter(part)); }
};

template <>
struct Word<FP16> : Word16 {
    using Word16::Word16;
    inline Lanes lanes(int part) const { return _mm512_cvtph_ps(quarter(part)); }
};

template <>
struct Word<FP32> {
    const uint8_t *values[4];
    __mmask16 masks[4];
    Word(const uint8_t *begin, uint64_t bits) {
        for (int i = 0; i < 4; ++i) {
            masks[i] = static_cast<__mmask16>(bits >> (16 * i));
            values[i] = begin;
            begin += 4 * __builtin_popcount(masks[i]);
        }
    }
    inline Lanes lanes(int part) const {
        return expanded32(values[part], masks[part]);
    }
};

template <>
struct Word<INT8> : Word8 {
    Word(const uint8_t *values, uint64_t bits) {
        bytes = expanded8(_mm512_loadu_si512(values), bits);
    }
    inline Lanes lanes(int part) const { return widened_int8(quarter(part)); }
};

template <>
struct Word<INT4> : Word8 {
    Word(const uint8_t *values, uint64_t bits, bool upper) {
        const __m512i pairs = _mm512_loadu_si512(values);
        const __m512i moved = upper ? _mm512_srli_epi16(pairs, 4) : pairs;
        const __m512i eight = _mm512_set1_epi8(8);
        const __m512i halves = _mm512_and_si512(moved, _mm512_set1_epi8(15));
        bytes = expanded8(_mm512_sub_epi8(_mm512_xor_si512(halves, eight), eight), bits);
    }
    inline Lanes lanes(int part) const { return widened_int8(quarter(part)); }
};

}  // namespace
#include "vectors.inc"

namespace {

// bf16 values need no conversion.
void expand_half(const Matrix &m, int64_t first, int64_t last, uint16_t *dense) {
    if (m.kind != BF16) return expand<uint16_t>(m, first, last, dense);
    const uint8_t *values = static_cast<const uint8_t *>(m.values);
    for (int64_t row = first; row < last; ++row) {
        const uint8_t *place = values + m.offsets[row];
        for (int64_t word = 0; word < m.words; ++word, dense += WORD) {
            const uint64_t bits = m.mask[row * m.mask_stride + word];
            const Word16 found(place, bits);
            place += 2 * __builtin_popcountll(bits);
            _mm512_storeu_si512(dense, found.halves[0]);
            _mm512_storeu_si512(dense + 32, found.halves[1]);
        }
    }
}

}  // namespace

const Kernels &avx512() {
    static const Kernels kernels{product, expand<float>, expand_half,
                                 attend<float>, attend<uint16_t>, nullptr, nullptr};
    return kernels;
}

}  // namespace apt
#pragma GCC pop_options
#endif
