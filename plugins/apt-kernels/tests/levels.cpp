// Products and expansions of this processor's instruction set against those in plain C++, without
// Python: for processors that are emulated. See .ci/neon.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../src/products.h"

extern "C" {
int apt_level();
int64_t apt_offsets(const uint64_t *, int64_t rows, int64_t words, int kind, int64_t *offsets);
void apt_product(const apt::Matrix *, const float *, const uint16_t *, int64_t batch, float *,
                 int threads, int level);
void apt_expand(const apt::Matrix *, int64_t first, int64_t last, int64_t columns, void *, int bf16,
                int threads, int level);
}

namespace {

std::mt19937 draw(0);

float normal() { return std::normal_distribution<float>()(draw); }

// Random values; those of floats are finite numbers around 0.
void fill(std::vector<uint8_t> &values, int kind, int64_t bytes) {
    for (auto &byte : values) byte = static_cast<uint8_t>(draw());
    if (kind == apt::FP32) {
        auto *to = reinterpret_cast<float *>(values.data());
        for (int64_t i = 0; i < bytes / 4; ++i) to[i] = normal();
    } else if (kind == apt::BF16 || kind == apt::FP16) {
        auto *to = reinterpret_cast<uint16_t *>(values.data());
        for (int64_t i = 0; i < bytes / 2; ++i) {
            to[i] = kind == apt::BF16 ? apt::to_bf16(normal()) : static_cast<uint16_t>(draw() & 0xbbff);
        }
    }
}

int compare(int kind, int64_t rows, int64_t words, double share, int64_t batch, int64_t group) {
    std::vector<uint64_t> mask(rows * words);
    std::bernoulli_distribution kept(1 - share);
    for (auto &word : mask) {
        for (int bit = 0; bit < 64; ++bit) word |= static_cast<uint64_t>(kept(draw)) << bit;
    }
    std::vector<int64_t> offsets(rows);
    const int64_t bytes = apt_offsets(mask.data(), rows, words, kind, offsets.data());
    std::vector<uint8_t> values(bytes + 256);
    fill(values, kind, bytes);
    const bool whole = kind == apt::INT8 || kind == apt::INT4;
    const int64_t step = whole ? group : 0;
    std::vector<float> scales(step ? rows * ((words + step - 1) / step) : 0);
    for (auto &scale : scales) scale = std::fabs(normal());
    const apt::Matrix matrix{mask.data(), words, values.data(), offsets.data(),
                             scales.empty() ? nullptr : scales.data(), rows, words, step, kind};
    const int64_t columns = 64 * words;
    std::vector<float> x(batch * columns), one(batch * rows), other(batch * rows);
    for (auto &value : x) value = normal();
    std::vector<float> plain(rows * columns), wide(rows * columns);
    apt_expand(&matrix, 0, rows, columns, plain.data(), 0, 1, 0);
    apt_expand(&matrix, 0, rows, columns, wide.data(), 0, 2, apt_level());
    std::vector<uint16_t> short_plain(rows * columns), short_wide(rows * columns);
    apt_expand(&matrix, 0, rows, columns, short_plain.data(), 1, 1, 0);
    apt_expand(&matrix, 0, rows, columns, short_wide.data(), 1, 2, apt_level());
    int wrong = plain != wide || short_plain != short_wide;
    apt_product(&matrix, x.data(), nullptr, batch, one.data(), 1, 0);
    apt_product(&matrix, x.data(), nullptr, batch, other.data(), 2, apt_level());
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t row = 0; row < rows; ++row) {
            double size = 1e-30;
            for (int64_t c = 0; c < columns; ++c) {
                size += std::fabs(double(plain[row * columns + c]) * x[b * columns + c]);
            }
            const double error = std::fabs(double(one[b * rows + row]) - other[b * rows + row]);
            wrong += !(error <= 1e-4 * size);
        }
    }
    if (wrong) std::printf("kind %d, %ld x %ld, share %g: %d wrong\n", kind, (long)rows,
                           (long)columns, share, wrong);
    return wrong;
}

// The attention of a head, with keys and values in bf16 and in fp32.
int compare_attention(int64_t length, int64_t width) {
    const apt::Kernels &plain = apt::kernels_of(0), &wide = apt::kernels_of(apt_level());
    std::vector<float> query(width), keys(length * width), values(length * width);
    std::vector<float> one(width), other(width), scores(length);
    for (auto *each : {&query, &keys, &values}) {
        for (auto &value : *each) value = apt::from_bf16(apt::to_bf16(normal()));
    }
    std::vector<uint16_t> half_keys(keys.size()), half_values(values.size());
    for (size_t i = 0; i < keys.size(); ++i) {
        half_keys[i] = apt::to_bf16(keys[i]);
        half_values[i] = apt::to_bf16(values[i]);
    }
    int wrong = 0;
    const auto check = [&] {
        for (int64_t i = 0; i < width; ++i) wrong += !(std::fabs(one[i] - other[i]) <= 1e-4f);
    };
    plain.attend(query.data(), keys.data(), values.data(), length, width, 0.2f, scores.data(), one.data());
    wide.attend(query.data(), keys.data(), values.data(), length, width, 0.2f, scores.data(), other.data());
    check();
    wide.attend_bf16(query.data(), half_keys.data(), half_values.data(), length, width, 0.2f,
                     scores.data(), other.data());
    check();
    if (wrong) std::printf("attention of %ld x %ld: %d wrong\n", (long)length, (long)width, wrong);
    return wrong;
}

}  // namespace

int main() {
    int wrong = 0, cases = 0;
    for (int kind = apt::BF16; kind <= apt::INT4; ++kind) {
        for (double share : {0.0, 0.3, 0.5, 0.9, 1.0}) {
            for (int64_t words : {1, 2, 9}) {
                for (int64_t batch : {1, 2, 3, 4, 7}) {
                    for (int64_t group : {1, 2}) {
                        wrong += compare(kind, 5, words, share, batch, group);
                        ++cases;
                    }
                }
            }
        }
    }
    for (int64_t width : {2, 6, 20, 64, 100}) {
        for (int64_t length : {1, 2, 37}) {
            wrong += compare_attention(length, width);
            ++cases;
        }
    }
    std::printf("level %d: %d cases, %d wrong\n", apt_level(), cases, wrong);
    return wrong != 0;
}
