// The common parts of the functions for Python: the choice of the instruction set, threads, and vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "matrix.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace apt {

const Kernels &kernels_of(int level);

// Runs work(part) for each part. On the threads of torch if they are known: they wait for the next
// operation by spinning, so threads beside them would get no processor.
void parallel(int parts, const std::function<void(int)> &work);

// The rows of a part at least: below 2^15 columns, a thread costs more.
inline int64_t least_rows(const Matrix &m) {
    return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, WORD * m.words));
}

// The vectors of a product with integers in two parts of 8 bits.
class Split {
  public:
    Split(const Matrix &m, const float *x, int64_t batch) {
        if (!m.group_words || !batch || std::min(m.group_words, m.words) > MOST) return;
        const int64_t width = WORD * m.words, step = WORD * m.group_words;
        const int64_t groups = (width + step - 1) / step;
        parts_.resize(2 * batch * width);
        scales_.resize(batch * groups);
        uint8_t *high = parts_.data(), *low = high + batch * width;
        for (int64_t b = 0; b < batch; ++b) {
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t begin = b * width + g * step;
                const int64_t count = std::min(step, width - g * step);
                scales_[b * groups + g] = split(x + begin, count, high + begin, low + begin);
                finite_ = finite_ && std::isfinite(scales_[b * groups + g]);
            }
        }
    }

    Vectors vectors(int64_t batch, const float *x, const uint16_t *xb) const {
        if (scales_.empty() || !finite_) return {batch, x, xb, nullptr, nullptr, nullptr};
        const uint8_t *high = parts_.data();
        return {batch, x, xb, high, high + parts_.size() / 2, scales_.data()};
    }

  private:
    static constexpr int64_t MOST = 128;  // words of a group; the sums of 130 overflow 32 bits

    static float split(const float *x, int64_t count, uint8_t *high, uint8_t *low) {
        float most = 0.0f, sum = 0.0f;  // the sum is not finite if a value is not
        for (int64_t i = 0; i < count; ++i) {
            most = std::max(most, std::fabs(x[i]));
            sum += x[i] * 0.0f;
        }
        if (!std::isfinite(sum)) return sum;
        const float scale = most / 32512.0f;
        const float inverse = most > 0.0f ? 32512.0f / most : 0.0f;
        for (int64_t i = 0; i < count; ++i) {
            const int whole = static_cast<int>(std::nearbyintf(x[i] * inverse)) + 32768;
            high[i] = static_cast<uint8_t>(whole >> 8);
            low[i] = static_cast<uint8_t>(whole & 255);
        }
        return scale;
    }

    std::vector<uint8_t> parts_;
    std::vector<float> scales_;
    bool finite_ = true;
};

}  // namespace apt
