// One token of each of some sequences through a block of LLaMA: norms, products, rotary embedding,
// attention and MLP in one call.
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

// The inputs of products, one for each sequence: their values, each with zeros up to a whole word.
template <class T>
class Inputs {
  public:
    Inputs(int64_t batch, int64_t width)
        : batch_(batch), stride_((width + WORD - 1) / WORD * WORD), wide_(batch * stride_),
          half_(sizeof(T) == 2 ? wide_.size() : 0) {}

    int64_t batch() const { return batch_; }

    float *values(int64_t sequence) { return wide_.data() + sequence * stride_; }

    // To be called after all values are set.
    void finish() {
        for (size_t i = 0; i < half_.size(); ++i) half_[i] = to_bf16(wide_[i]);
    }

    SplitVectors split(const Matrix &m, const Kernels &kernels) const {
        return SplitVectors(m, wide_.data(), batch_, kernels);
    }

    Vectors vectors(const Matrix &m, const SplitVectors &split) const {
        const bool half = m.kind == BF16 && !half_.empty();
        return split.vectors(batch_, wide_.data(), half ? half_.data() : nullptr);
    }

  private:
    int64_t batch_, stride_;
    std::vector<float> wide_;
    std::vector<uint16_t> half_;
};

// The products of a matrix with all inputs, and their results: (batch, rows).
class Outputs {
  public:
    Outputs(const Matrix *matrix, int64_t batch)
        : matrix(matrix), all_(batch * matrix->rows) {}

    const Matrix *matrix;

    float *values(int64_t sequence) { return all_.data() + sequence * matrix->rows; }

  private:
    std::vector<float> all_;
};

// Products of matrices with the same inputs. Each thread calls then(first, last) when these rows of
// all matrices are done, if they have equally many.
template <class T, size_t count, class Then>
void multiply(Outputs *const (&outputs)[count], const Inputs<T> &x, const Kernels &kernels,
              int threads, Then then) {
    std::vector<SplitVectors> splits;
    int64_t rows = 0;
    for (const Outputs *each : outputs) {
        splits.push_back(x.split(*each->matrix, kernels));
        rows += each->matrix->rows;
    }
    const int64_t most = rows / least_rows(*outputs[0]->matrix);
    const int parts = static_cast<int>(std::clamp<int64_t>(most, 1, threads));
    parallel(parts, [&](int part) {
        for (size_t i = 0; i < count; ++i) {
            const Matrix &m = *outputs[i]->matrix;
            const int64_t first = m.rows * part / parts, last = m.rows * (part + 1) / parts;
            kernels.product(m, x.vectors(m, splits[i]), first, last, outputs[i]->values(0));
        }
        const int64_t all = outputs[0]->matrix->rows;
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

// Keys or values: (batch, kv_heads, length, head_width).
template <class T>
struct Cache {
    T *values;
    int64_t sequence_stride, head_stride, length;

    T *of(int64_t sequence, int64_t head) const {
        return values + sequence * sequence_stride + head * head_stride;
    }
};

// Writes the keys or the values of a sequence's token to the cache, at the last place.
template <class T>
void remember(const Block &b, const float *given, const Cache<T> &cache, int64_t sequence) {
    for (int64_t head = 0; head < b.kv_heads; ++head) {
        T *to = cache.of(sequence, head) + (cache.length - 1) * b.head_width;
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

// The rotary embedding of the positions: (batch, head_width), or (head_width) with a stride of 0.
template <class T>
struct Angles {
    const T *cosines, *sines;
    int64_t stride;
};

template <class T>
void step(const Block &b, int64_t batch, const T *x, T *out, const Angles<T> &angles,
          const Cache<T> &keys, const Cache<T> &values, const int64_t *starts, int threads) {
    const Kernels &kernels = kernels_of(b.level);
    const int64_t width = b.head_width, hidden = b.hidden;
    const auto nothing = [](int64_t, int64_t) {};
    std::vector<float> stream(batch * hidden);
    for (int64_t i = 0; i < batch * hidden; ++i) stream[i] = widened(x[i]);

    Inputs<T> normed(batch, hidden);
    const auto normalise_stream = [&](const void *norm) {
        for (int64_t s = 0; s < batch; ++s) {
            normalise<T>(stream.data() + s * hidden, hidden, norm, b.epsilon, normed.values(s));
        }
        normed.finish();
    };
    normalise_stream(b.input_norm);
    Outputs q(b.q, batch), k(b.k, batch), v(b.v, batch);
    multiply({&q, &k, &v}, normed, kernels, threads, nothing);
    for (int64_t s = 0; s < batch; ++s) {
        const T *cosines = angles.cosines + s * angles.stride, *sines = angles.sines + s * angles.stride;
        finish<T>(q.values(s), b.q->rows, b.q_bias);
        finish<T>(k.values(s), b.k->rows, b.k_bias);
        finish<T>(v.values(s), b.v->rows, b.v_bias);
        place(b, q.values(s), b.heads, b.q_norm, cosines, sines);
        place(b, k.values(s), b.kv_heads, b.k_norm, cosines, sines);
        remember(b, k.values(s), keys, s);
        remember(b, v.values(s), values, s);
    }

    Inputs<T> attended(batch, b.heads * width);
    const int64_t share = b.heads / b.kv_heads, heads = batch * b.heads, length = keys.length;
    const int64_t work = heads * width * length;
    const int parts = static_cast<int>(std::clamp<int64_t>(work / 32768, 1, threads));
    parallel(parts, [&](int part) {
        std::vector<float> scores(length);
        for (int64_t i = heads * part / parts; i < heads * (part + 1) / parts; ++i) {
            const int64_t s = i / b.heads, head = i % b.heads, start = starts ? starts[s] : 0;
            float *to = attended.values(s) + head * width;
            attend(kernels, q.values(s) + head * width, keys.of(s, head / share) + start * width,
                   values.of(s, head / share) + start * width, length - start, width, b.scaling,
                   scores.data(), to);
            for (int64_t j = 0; j < width; ++j) to[j] = rounded<T>(to[j]);
        }
    });
    attended.finish();
    Outputs o(b.o, batch);
    multiply({&o}, attended, kernels, threads, nothing);
    for (int64_t s = 0; s < batch; ++s) {
        const float *added = o.values(s);
        finish<T>(o.values(s), hidden, b.o_bias);
        float *to = stream.data() + s * hidden;
        for (int64_t i = 0; i < hidden; ++i) to[i] = rounded<T>(to[i] + added[i]);
    }

    normalise_stream(b.output_norm);
    Inputs<T> middle(batch, b.gate->rows);
    Outputs gate(b.gate, batch), up(b.up, batch);
    multiply({&gate, &up}, normed, kernels, threads, [&](int64_t first, int64_t last) {
        for (int64_t s = 0; s < batch; ++s) {
            const float *gates = gate.values(s), *ups = up.values(s);
            float *to = middle.values(s);
            for (int64_t i = first; i < last; ++i) {
                const float given = rounded<T>(gates[i]);
                const float active = rounded<T>(given / (1.0f + std::exp(-given)));
                to[i] = rounded<T>(active * rounded<T>(ups[i]));
            }
        }
    });
    middle.finish();
    Outputs down(b.down, batch);
    multiply({&down}, middle, kernels, threads, nothing);
    for (int64_t i = 0; i < batch * hidden; ++i) put(stream[i] + rounded<T>(down.values(0)[i]), out + i);
}

}  // namespace

void softmax(float *scores, int64_t length) {
    float most = -INFINITY, sum = 0.0f;
    for (int64_t t = 0; t < length; ++t) most = std::max(most, scores[t]);
    for (int64_t t = 0; t < length; ++t) sum += scores[t] = std::exp(scores[t] - most);
    for (int64_t t = 0; t < length; ++t) scores[t] /= sum;
}

}  // namespace apt

// out (batch, hidden) = the block of x (batch, hidden), the last of `length` tokens of each sequence.
// Their keys and values are written to the cache: keys and values (batch, kv_heads, length, head_width),
// with `sequence_stride` elements from a sequence to the next, and `head_stride` from a head to the
// next. From the cosines and sines of a sequence to those of the next are `angle_stride` elements.
// All are bf16 or all fp32. `starts` (batch), or null, is the first position that a sequence attends to.
EXPORT void apt_decode(const apt::Block *block, int64_t batch, const void *x, void *out,
                       const void *cosines, const void *sines, int64_t angle_stride, void *keys,
                       void *values, int64_t sequence_stride, int64_t head_stride, int64_t length,
                       const int64_t *starts, int bf16, int threads) {
    const auto call = [&](auto element) {
        using T = decltype(element);
        const auto cache = [&](void *all) {
            return apt::Cache<T>{static_cast<T *>(all), sequence_stride, head_stride, length};
        };
        apt::step<T>(*block, batch, static_cast<const T *>(x), static_cast<T *>(out),
                     {static_cast<const T *>(cosines), static_cast<const T *>(sines), angle_stride},
                     cache(keys), cache(values), starts, threads);
    };
    bf16 ? call(uint16_t{}) : call(float{});
}
