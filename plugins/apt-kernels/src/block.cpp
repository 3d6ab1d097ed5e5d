// One token through a block of LLaMA: norms, products, rotary embedding, attention and MLP in one call.
// Results are rounded to the dtype of the model after the same steps as in transformers.
#include <cstring>

#include "products.h"

namespace apt {

struct Block {
    const Matrix *q, *k, *v, *o, *gate, *up, *down;
    // The vectors are in the memory of the model, in the dtype of its inputs, so that a change is seen.
    const void *q_bias, *k_bias, *v_bias, *o_bias;  // or null
    const void *input_norm, *output_norm;           // (hidden): before attention, before the MLP
    const void *q_norm, *k_norm;                    // (head_width), or null
    int64_t hidden, heads, kv_heads, head_width;
    float epsilon, scaling;
    int32_t level;
};

namespace {

inline void put(float value, float *to) { *to = value; }
inline void put(float value, uint16_t *to) { *to = to_bf16(value); }

// A value, rounded to an element of T.
template <class T>
inline float rounded(float value) {
    T element;
    put(value, &element);
    return widened(element);
}

// The input of products: its values, and zeros up to a whole word.
template <class T>
class Input {
  public:
    explicit Input(int64_t width)
        : wide_((width + WORD - 1) / WORD * WORD), half_(sizeof(T) == 2 ? wide_.size() : 0) {}

    float *values() { return wide_.data(); }

    // To be called after all values are set.
    void finish() {
        for (size_t i = 0; i < half_.size(); ++i) half_[i] = to_bf16(wide_[i]);
    }

    SplitVectors split(const Matrix &m, const Kernels &kernels) const {
        return SplitVectors(m, wide_.data(), 1, kernels);
    }

    Vectors vectors(const Matrix &m, const SplitVectors &split) const {
        const bool half = m.kind == BF16 && !half_.empty();
        return split.vectors(1, wide_.data(), half ? half_.data() : nullptr);
    }

  private:
    std::vector<float> wide_;
    std::vector<uint16_t> half_;
};

// A product, and the memory for its result.
struct Target {
    const Matrix *matrix;
    float *values;
};

// Products of matrices with the same input. Each thread calls then(first, last) when these rows of all
// matrices are done, if they have equally many.
template <class T, size_t count, class Then>
void multiply(const Target (&targets)[count], const Input<T> &x, const Kernels &kernels,
              int threads, Then then) {
    std::vector<SplitVectors> splits;
    int64_t rows = 0;
    for (const Target &each : targets) {
        splits.push_back(x.split(*each.matrix, kernels));
        rows += each.matrix->rows;
    }
    const int64_t most = rows / least_rows(*targets[0].matrix);
    const int parts = static_cast<int>(std::clamp<int64_t>(most, 1, threads));
    parallel(parts, [&](int part) {
        for (size_t i = 0; i < count; ++i) {
            const Matrix &m = *targets[i].matrix;
            const int64_t first = m.rows * part / parts, last = m.rows * (part + 1) / parts;
            kernels.product(m, x.vectors(m, splits[i]), first, last, targets[i].values);
        }
        const int64_t all = targets[0].matrix->rows;
        then(all * part / parts, all * (part + 1) / parts);
    });
}

template <class T>
void normalise(const float *x, int64_t width, const void *weights, float epsilon, float *to) {
    const T *weight = static_cast<const T *>(weights);
    float sum = 0.0f;
    for (int64_t i = 0; i < width; ++i) sum += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(width) + epsilon);
    for (int64_t i = 0; i < width; ++i) {
        to[i] = rounded<T>(widened(weight[i]) * rounded<T>(x[i] * factor));
    }
}

// Rounds the result of a product, and adds the bias if there is one.
template <class T>
void finish(float *values, int64_t count, const void *biases) {
    const T *bias = static_cast<const T *>(biases);
    for (int64_t i = 0; i < count; ++i) values[i] = rounded<T>(values[i]);
    if (!bias) return;
    for (int64_t i = 0; i < count; ++i) values[i] = rounded<T>(values[i] + widened(bias[i]));
}

// Normalises the heads, if there is a weight for it, and rotates them.
template <class T>
void place(const Block &b, float *heads, int64_t count, const void *norm, const T *cosines,
           const T *sines) {
    const int64_t width = b.head_width, half = width / 2;
    std::vector<float> turned(width);
    for (int64_t head = 0; head < count; ++head, heads += width) {
        if (norm) normalise<T>(heads, width, norm, b.epsilon, heads);
        for (int64_t i = 0; i < width; ++i) {
            const float other = i < half ? -heads[i + half] : heads[i - half];
            turned[i] = rounded<T>(rounded<T>(heads[i] * widened(cosines[i])) +
                                   rounded<T>(other * widened(sines[i])));
        }
        std::copy(turned.begin(), turned.end(), heads);
    }
}

// Writes the key and the value of the token to the cache, at the last of `length` places.
template <class T>
void remember(const Block &b, const float *given, T *cache, int64_t stride, int64_t length) {
    for (int64_t head = 0; head < b.kv_heads; ++head) {
        T *to = cache + head * stride + (length - 1) * b.head_width;
        for (int64_t i = 0; i < b.head_width; ++i) put(given[head * b.head_width + i], to + i);
    }
}

void attend(const Kernels &kernels, const float *query, const float *keys, const float *values,
            int64_t length, int64_t width, float scaling, float *scores, float *out) {
    kernels.attend(query, keys, values, length, width, scaling, scores, out);
}

void attend(const Kernels &kernels, const float *query, const uint16_t *keys,
            const uint16_t *values, int64_t length, int64_t width, float scaling, float *scores,
            float *out) {
    kernels.attend_bf16(query, keys, values, length, width, scaling, scores, out);
}

template <class T>
void step(const Block &b, const T *x, T *out, const T *cosines, const T *sines, T *keys, T *values,
          int64_t stride, int64_t length, int threads) {
    const Kernels &kernels = kernels_of(b.level);
    const int64_t width = b.head_width;
    const auto nothing = [](int64_t, int64_t) {};
    std::vector<float> stream(b.hidden), result(b.hidden);
    for (int64_t i = 0; i < b.hidden; ++i) stream[i] = widened(x[i]);

    Input<T> normed(b.hidden);
    normalise<T>(stream.data(), b.hidden, b.input_norm, b.epsilon, normed.values());
    normed.finish();
    std::vector<float> q(b.heads * width), k(b.kv_heads * width), v(b.kv_heads * width);
    multiply({{b.q, q.data()}, {b.k, k.data()}, {b.v, v.data()}}, normed, kernels, threads, nothing);
    finish<T>(q.data(), q.size(), b.q_bias);
    finish<T>(k.data(), k.size(), b.k_bias);
    finish<T>(v.data(), v.size(), b.v_bias);
    place(b, q.data(), b.heads, b.q_norm, cosines, sines);
    place(b, k.data(), b.kv_heads, b.k_norm, cosines, sines);
    remember(b, k.data(), keys, stride, length);
    remember(b, v.data(), values, stride, length);

    Input<T> attended(b.heads * width);
    const int64_t share = b.heads / b.kv_heads, work = b.heads * width * length;
    const int parts = static_cast<int>(std::clamp<int64_t>(work / 32768, 1, threads));
    parallel(parts, [&](int part) {
        std::vector<float> scores(length);
        for (int64_t head = b.heads * part / parts; head < b.heads * (part + 1) / parts; ++head) {
            float *to = attended.values() + head * width;
            const int64_t place = head / share * stride;
            attend(kernels, q.data() + head * width, keys + place, values + place, length, width,
                   b.scaling, scores.data(), to);
            for (int64_t i = 0; i < width; ++i) to[i] = rounded<T>(to[i]);
        }
    });
    attended.finish();
    multiply({{b.o, result.data()}}, attended, kernels, threads, nothing);
    finish<T>(result.data(), b.hidden, b.o_bias);
    for (int64_t i = 0; i < b.hidden; ++i) stream[i] = rounded<T>(stream[i] + result[i]);

    normalise<T>(stream.data(), b.hidden, b.output_norm, b.epsilon, normed.values());
    normed.finish();
    Input<T> middle(b.gate->rows);
    std::vector<float> gate(b.gate->rows), up(b.gate->rows);
    multiply({{b.gate, gate.data()}, {b.up, up.data()}}, normed, kernels, threads,
             [&](int64_t first, int64_t last) {
                 for (int64_t i = first; i < last; ++i) {
                     const float given = rounded<T>(gate[i]);
                     const float active = rounded<T>(given / (1.0f + std::exp(-given)));
                     middle.values()[i] = rounded<T>(active * rounded<T>(up[i]));
                 }
             });
    middle.finish();
    multiply({{b.down, result.data()}}, middle, kernels, threads, nothing);
    for (int64_t i = 0; i < b.hidden; ++i) put(stream[i] + rounded<T>(result[i]), out + i);
}

}  // namespace

void softmax(float *scores, int64_t length) {
    float most = -INFINITY, sum = 0.0f;
    for (int64_t t = 0; t < length; ++t) most = std::max(most, scores[t]);
    for (int64_t t = 0; t < length; ++t) sum += scores[t] = std::exp(scores[t] - most);
    for (int64_t t = 0; t < length; ++t) scores[t] /= sum;
}

}  // namespace apt

// out (hidden) = the block of x (hidden), the last of `length` tokens. Its key and value are written to
// the cache: keys and values (kv_heads, length, head_width), with `stride` elements from a head to the
// next. All are bf16 or all fp32.
EXPORT void apt_block(const apt::Block *block, const void *x, void *out, const void *cosines,
                      const void *sines, void *keys, void *values, int64_t stride, int64_t length,
                      int bf16, int threads) {
    const auto call = [&](auto element) {
        using T = decltype(element);
        apt::step(*block, static_cast<const T *>(x), static_cast<T *>(out),
                  static_cast<const T *>(cosines), static_cast<const T *>(sines),
                  static_cast<T *>(keys), static_cast<T *>(values), stride, length, threads);
    };
    bf16 ? call(uint16_t{}) : call(float{});
}
