// The common parts of the functions for Python: the choice of the instruction set, threads, and vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "matrix.h"

#if defined(_WIN32)
#define VISIBLE __declspec(dllexport)
#else
#define VISIBLE __attribute__((visibility("default")))
#endif
#define EXPORT extern "C" VISIBLE

namespace apt {

VISIBLE const Kernels &kernels_of(int level);  // tests/levels.cpp calls it

// Runs work(part) for each part. On the threads of torch if they are known: they wait for the next
// operation by spinning, so threads beside them would get no processor.
void parallel(int parts, const std::function<void(int)> &work);

// The rows of a part at least: below 2^15 columns, a thread costs more.
inline int64_t least_rows(const Matrix &m) {
    return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, WORD * m.words));
}

// The vectors of a product with integers in two parts of 8 bits, if its kernel needs them.
class SplitVectors {
  public:
    SplitVectors(const Matrix &m, const float *x, int64_t batch, const Kernels &kernels) {
        if (!kernels.split || !m.group_words || !batch) return;
        const int64_t step = std::min(m.group_words, m.words);
        if (!step || step > MOST) return;
        const int64_t groups = (m.words + step - 1) / step, width = WORD * m.words;
        const int64_t starts = LANES_OF_SUMS * groups * sizeof(int32_t);
        memory_.resize(batch * (2 * width + starts) + LINE);
        scales_.resize(batch * groups);
        void *begin = memory_.data();
        size_t size = memory_.size();
        high_ = static_cast<int8_t *>(std::align(LINE, size - LINE, begin, size));
        low_ = high_ + batch * width;
        starts_ = reinterpret_cast<int32_t *>(low_ + batch * width);
        for (int64_t b = 0; b < batch; ++b) {
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t place = b * width + WORD * step * g, i = b * groups + g;
                scales_[i] = kernels.split(m.kind, x + place, std::min(step, m.words - step * g),
                                           high_ + place, low_ + place, starts_ + LANES_OF_SUMS * i);
                finite_ = finite_ && std::isfinite(scales_[i]);
            }
        }
    }

    SplitVectors(SplitVectors &&) = default;  // a copy would point into the memory of the other one

    Vectors vectors(int64_t batch, const float *x, const uint16_t *xb) const {
        if (scales_.empty() || !finite_) return {batch, x, xb, nullptr, nullptr, nullptr, nullptr};
        return {batch, x, xb, high_, low_, starts_, scales_.data()};
    }

  private:
    static constexpr int64_t MOST = 128;  // words of a group; the sums of 130 overflow 32 bits
    static constexpr size_t LINE = 64;    // bytes of a line of the cache

    std::vector<uint8_t> memory_;
    std::vector<float> scales_;
    int8_t *high_ = nullptr, *low_ = nullptr;
    int32_t *starts_ = nullptr;
    bool finite_ = true;
};

}  // namespace apt
