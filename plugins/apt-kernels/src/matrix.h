// A matrix without its zeros, and the functions that each instruction set supplies.
#pragma once

#include <cstdint>
#include <cstring>

namespace apt {

// How the kept values are stored. Integers have a scale for each group of columns of a row.
enum Kind : int32_t { BF16 = 0, FP16 = 1, FP32 = 2, INT8 = 3, INT4 = 4 };

// Columns in a word of the mask. Rows of the mask are whole words.
constexpr int64_t WORD = 64;

struct Matrix {
    const uint64_t *mask;    // (rows, words); bit j of word w is column 64 w + j; 1 = kept
    int64_t mask_stride;     // words from a row of the mask to the next: `words`, or 0 if all rows have
                             // the same mask, as those of a dense matrix
    const void *values;      // the kept values, row by row; those of INT4 as `Places` has them
    const int64_t *offsets;  // (rows): bytes from `values` to the first value of a row. The kernels may
                             // read 256 bytes behind the last value of a row.
    const float *scales;     // (rows, groups), or null
    int64_t rows;
    int64_t words;
    int64_t group_words;  // words that share a scale; 0 without scales
    int32_t kind;
};

// The vectors of a product, each of 64 * words columns with zeros behind the last one.
struct Vectors {
    int64_t batch;
    const float *fp32;
    const uint16_t *bf16;  // null if they are not bf16
    // For products with integers, each as its kernel needs it; null if they are not needed.
    const int8_t *high, *low;  // (batch, 64 * words)
    const int32_t *starts;     // (batch, groups, LANES)
    const float *scales;       // (batch, groups)
};

// Rounds the `words` words of a group of columns to x = scale * (256 high + low), with the largest
// magnitude divided by 32512 as the scale, which is returned; it is not finite if this is impossible.
// Sums with weights that have the offset of their kind added begin at `start`, so that the offset is
// subtracted: lane i of 16 sums the bytes 4 i to 4 i + 3 of each word.
constexpr int64_t LANES_OF_SUMS = 16;
using Split = float (*)(int32_t kind, const float *x, int64_t words, int8_t *high, int8_t *low,
                        int32_t *start);

// The product of rows [first, last) with each vector: y[b * matrix.rows + row].
using Product = void (*)(const Matrix &, const Vectors &, int64_t first, int64_t last, float *y);

// Rows [first, last) with their zeros, in fp32 or bf16: (last - first, 64 * words).
template <class T>
using Expand = void (*)(const Matrix &, int64_t first, int64_t last, T *dense);

// The product of rows [first, last) with many vectors in bf16, rounded: y[b * matrix.rows + row].
using Tiled = void (*)(const Matrix &, const uint16_t *x, int64_t batch, int64_t first, int64_t last,
                       uint16_t *y);

// The attention of one head for one query (width): the softmax of its scaled products with the keys
// (length, width), times the values (length, width). `scores` (length) is overwritten.
template <class T>
using Attend = void (*)(const float *query, const T *keys, const T *values, int64_t length,
                        int64_t width, float scaling, float *scores, float *out);

struct Kernels {
    Product product;
    Expand<float> expand;
    Expand<uint16_t> expand_bf16;
    Attend<float> attend;
    Attend<uint16_t> attend_bf16;
    Tiled tiled;  // null if there is none
    Split split;  // null if products with integers use `Vectors::fp32`
};

const Kernels &portable();
#if defined(__x86_64__) && defined(__GNUC__)
const Kernels &avx2();
const Kernels &avx512();
const Kernels &avx512_bf16();
void tiled(const Matrix &, const uint16_t *x, int64_t batch, int64_t first, int64_t last, uint16_t *y);
#endif
#if defined(__aarch64__)
const Kernels &neon();
#endif

inline float from_bf16(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t to_bf16(float value) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 64);  // NaN
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float from_fp16(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t exponent = (bits >> 10) & 31, fraction = bits & 1023;
    float value;
    if (exponent == 0) {  // subnormal: fraction * 2^-24
        value = static_cast<float>(fraction) * 5.9604644775390625e-8f;
        uint32_t wide;
        std::memcpy(&wide, &value, 4);
        wide |= sign;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    const uint32_t wide = exponent == 31 ? sign | 0x7f800000u | (fraction << 13)
                                         : sign | ((exponent + 112) << 23) | (fraction << 13);
    std::memcpy(&value, &wide, 4);
    return value;
}

inline float widened(float value) { return value; }
inline float widened(uint16_t bits) { return from_bf16(bits); }

// The softmax, in place.
void softmax(float *scores, int64_t length);

// An INT4 value of a word: from -8 to 7, in two's complement.
inline int nibble(const uint8_t *values, int index, bool upper) {
    return static_cast<int8_t>(upper ? values[index] & 0xf0 : values[index] << 4) / 16;
}

// The bytes from the first of `count` values of a word to the first value behind them.
inline int64_t value_bytes(int32_t kind, int count) {
    switch (kind) {
        case FP32: return 4 * count;
        case INT8: return count;
        case INT4: return count;
        default: return 2 * count;
    }
}

// The places of the values of a row, word by word. INT4 values of words with an even number are in the
// lower halves of the bytes, those of the others in the upper halves of the same bytes. So the values
// of a word are in consecutive bytes, and none is moved from one byte to another when they are read.
class Places {
  public:
    Places(const Matrix &m, int64_t row)
        : next_{static_cast<const uint8_t *>(m.values) + m.offsets[row], next_[0]} {}

    static bool upper(int32_t kind, int64_t word) { return kind == INT4 && word % 2; }

    // The first value of the next word, which has `count` of them.
    const uint8_t *take(int32_t kind, int64_t word, int count) {
        const uint8_t *&next = next_[upper(kind, word)];
        const uint8_t *found = next;
        next += value_bytes(kind, count);
        return found;
    }

  private:
    const uint8_t *next_[2];
};

}  // namespace apt
