// NEON: eight columns at a time; a table moves the bytes of their values to the columns of a byte of
// the mask.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "matrix.h"

namespace apt {
namespace {

constexpr int LANES = 8;
struct Lanes {
    float32x4_t first, last;
};

inline Lanes same(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
inline Lanes zero() { return same(0.0f); }
inline Lanes load(const float *x) { return {vld1q_f32(x), vld1q_f32(x + 4)}; }
inline Lanes load(const uint16_t *x) {
    const uint16x8_t half = vld1q_u16(x);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(half), 16)),
            vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(half), 16))};
}
inline void store(float *x, Lanes lanes) {
    vst1q_f32(x, lanes.first);
    vst1q_f32(x + 4, lanes.last);
}
inline void store(uint16_t *x, Lanes lanes) {
    float values[LANES];
    store(values, lanes);
    for (int i = 0; i < LANES; ++i) x[i] = to_bf16(values[i]);
}
inline Lanes scaled(Lanes lanes, float factor) {
    return {vmulq_n_f32(lanes.first, factor), vmulq_n_f32(lanes.last, factor)};
}
inline Lanes multiply_add(Lanes a, Lanes b, Lanes sum) {
    return {vfmaq_f32(sum.first, a.first, b.first), vfmaq_f32(sum.last, a.last, b.last)};
}
inline float total(Lanes lanes) { return vaddvq_f32(vaddq_f32(lanes.first, lanes.last)); }

// For each byte of the mask: where each byte of its eight columns comes from, for values of `size`
// bytes; 255 if a column has none, for which the instructions give zero.
template <int size>
struct Table {
    uint8_t places[256][8 * size];
    constexpr Table() : places() {
        for (int byte = 0; byte < 256; ++byte) {
            int next = 0;
            for (int bit = 0; bit < 8; ++bit) {
                const bool kept = byte >> bit & 1;
                for (int k = 0; k < size; ++k) {
                    places[byte][bit * size + k] =
                        static_cast<uint8_t>(kept ? next * size + k : 255);
                }
                next += kept;
            }
        }
    }
};
constexpr Table<1> BYTES;
constexpr Table<2> HALVES;
constexpr Table<4> WHOLES;

inline uint16x8_t placed_halves(const uint8_t *values, uint8_t byte) {
    return vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(values), vld1q_u8(HALVES.places[byte])));
}

// The values from `values` on, at the columns of a byte of the mask; the others are zero.
template <int32_t kind>
inline Lanes placed(const uint8_t *values, uint8_t byte);

template <>
inline Lanes placed<BF16>(const uint8_t *values, uint8_t byte) {
    const uint16x8_t found = placed_halves(values, byte);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(found), 16)),
            vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(found), 16))};
}
template <>
inline Lanes placed<FP16>(const uint8_t *values, uint8_t byte) {
    const float16x8_t found = vreinterpretq_f16_u16(placed_halves(values, byte));
    return {vcvt_f32_f16(vget_low_f16(found)), vcvt_f32_f16(vget_high_f16(found))};
}
template <>
inline Lanes placed<FP32>(const uint8_t *values, uint8_t byte) {
    const uint8x16x2_t found = {{vld1q_u8(values), vld1q_u8(values + 16)}};
    const uint8_t *places = WHOLES.places[byte];
    return {vreinterpretq_f32_u8(vqtbl2q_u8(found, vld1q_u8(places))),
            vreinterpretq_f32_u8(vqtbl2q_u8(found, vld1q_u8(places + 16)))};
}
template <>
inline Lanes placed<INT8>(const uint8_t *values, uint8_t byte) {
    const uint8x8_t found = vtbl1_u8(vld1_u8(values), vld1_u8(BYTES.places[byte]));
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(found));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))),
            vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)))};
}

inline int before(uint64_t bits, int part) {
    return part ? __builtin_popcountll(bits & ((uint64_t{1} << (8 * part)) - 1)) : 0;
}
inline uint8_t byte_of(uint64_t bits, int part) { return static_cast<uint8_t>(bits >> (8 * part)); }

template <int32_t kind>
struct Word {
    const uint8_t *values;
    uint64_t bits;
    Word(const uint8_t *begin, uint64_t mask) : values(begin), bits(mask) {}
    inline Lanes lanes(int part) const {
        return placed<kind>(values + value_bytes(kind, before(bits, part)), byte_of(bits, part));
    }
};

template <>
struct Word<INT4> {
    uint8_t whole[WORD + 8];
    uint64_t bits;
    Word(const uint8_t *begin, uint64_t mask, bool upper) : bits(mask) {
        const int8x16_t left = vdupq_n_s8(upper ? 0 : 4);
        for (int i = 0; i < WORD; i += 16) {
            const int8x16_t pairs = vreinterpretq_s8_u8(vld1q_u8(begin + i));
            vst1q_u8(whole + i, vreinterpretq_u8_s8(vshrq_n_s8(vshlq_s8(pairs, left), 4)));
        }
    }
    inline Lanes lanes(int part) const {
        return placed<INT8>(whole + before(bits, part), byte_of(bits, part));
    }
};

}  // namespace
#include "vectors.inc"

const Kernels &neon() {
    static const Kernels kernels{product, expand<float>, expand<uint16_t>,
                                 attend<float>, attend<uint16_t>, nullptr, nullptr};
    return kernels;
}

}  // namespace apt
#endif
