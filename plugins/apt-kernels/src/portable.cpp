// Kernels in plain C++, for processors without one of the instruction sets.
#include "matrix.h"

namespace apt {
namespace {

float value_at(int32_t kind, const uint8_t *values, int index, bool upper) {
    switch (kind) {
        case BF16: {
            uint16_t bits;
            std::memcpy(&bits, values + 2 * index, 2);
            return from_bf16(bits);
        }
        case FP16: {
            uint16_t bits;
            std::memcpy(&bits, values + 2 * index, 2);
            return from_fp16(bits);
        }
        case FP32: {
            float value;
            std::memcpy(&value, values + 4 * index, 4);
            return value;
        }
        case INT8: return static_cast<float>(reinterpret_cast<const int8_t *>(values)[index]);
        default: return static_cast<float>(nibble(values, index, upper));
    }
}

float scale_of(const Matrix &m, int64_t row, int64_t word) {
    if (!m.group_words) return 1.0f;
    const int64_t groups = (m.words + m.group_words - 1) / m.group_words;
    return m.scales[row * groups + word / m.group_words];
}

// Calls visit(word, bit, value) for each kept weight of a row; integers are not scaled.
template <class Visit>
void each_kept(const Matrix &m, int64_t row, Visit visit) {
    Places places(m, row);
    for (int64_t word = 0; word < m.words; ++word) {
        uint64_t bits = m.mask[row * m.mask_stride + word];
        const uint8_t *values = places.take(m.kind, word, __builtin_popcountll(bits));
        const bool upper = Places::upper(m.kind, word);
        for (int index = 0; bits; bits &= bits - 1, ++index) {
            visit(word, __builtin_ctzll(bits), value_at(m.kind, values, index, upper));
        }
    }
}

void product(const Matrix &m, const Vectors &x, int64_t first, int64_t last, float *y) {
    const int64_t width = WORD * m.words;
    for (int64_t row = first; row < last; ++row) {
        for (int64_t b = 0; b < x.batch; ++b) y[b * m.rows + row] = 0.0f;
        each_kept(m, row, [&](int64_t word, int bit, float value) {
            value *= scale_of(m, row, word);
            for (int64_t b = 0; b < x.batch; ++b) {
                y[b * m.rows + row] += value * x.fp32[b * width + word * WORD + bit];
            }
        });
    }
}

void write(float *to, float value) { *to = value; }
void write(uint16_t *to, float value) { *to = to_bf16(value); }

template <class T>
void expand(const Matrix &m, int64_t first, int64_t last, T *dense) {
    const int64_t width = WORD * m.words;
    std::memset(dense, 0, sizeof(T) * (last - first) * width);
    for (int64_t row = first; row < last; ++row) {
        T *to = dense + (row - first) * width;
        each_kept(m, row, [&](int64_t word, int bit, float value) {
            write(to + word * WORD + bit, value * scale_of(m, row, word));
        });
    }
}

template <class T>
void attend(const float *query, const T *keys, const T *values, int64_t length, int64_t width,
            float scaling, float *scores, float *out) {
    for (int64_t t = 0; t < length; ++t) {
        float sum = 0.0f;
        for (int64_t i = 0; i < width; ++i) sum += query[i] * widened(keys[t * width + i]);
        scores[t] = scaling * sum;
    }
    softmax(scores, length);
    for (int64_t i = 0; i < width; ++i) {
        out[i] = 0.0f;
        for (int64_t t = 0; t < length; ++t) out[i] += scores[t] * widened(values[t * width + i]);
    }
}

}  // namespace

const Kernels &portable() {
    static const Kernels kernels{product, expand<float>, expand<uint16_t>,
                                 attend<float>, attend<uint16_t>, nullptr, nullptr};
    return kernels;
}

}  // namespace apt
