// What pytorch's simulated accelerator lacks for real work; `.ci/device` compiles it in.
//
// An operator without a kernel runs on the CPU, and torch moves its results to the device of the
// first tensor. For `1 - x` that is the number, which is on the CPU. Here the results move to the
// device of any tensor that is not on the CPU, as they do on real accelerators.
#pragma once

#include <ATen/ATen.h>
#include <ATen/native/CPUFallback.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

namespace apt {

inline void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  std::optional<c10::Device> device;
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor() && value.toTensor().defined() && !value.toTensor().is_cpu()) {
      device = value.toTensor().device();
    }
  }
  at::native::cpu_fallback(op, stack);
  for (size_t back = 1; device && back <= op.schema().returns().size(); ++back) {
    c10::IValue& value = *(stack->end() - back);
    if (value.isTensor() && value.toTensor().defined() && value.toTensor().is_cpu()) {
      value = value.toTensor().to(*device);
    }
  }
}

inline at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                              at::IntArrayRef output_padding, int64_t groups) {
  std::optional<at::Tensor> own;
  if (bias && bias->defined()) own = bias->cpu();
  return at::convolution(input.cpu(), weight.cpu(), own, stride, padding, dilation, transposed,
                         output_padding, groups).to(input.device());
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& input, const at::Tensor& weight,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> wanted) {
  std::vector<int64_t> biases{gradient.size(1)};
  auto [a, b, c] = at::convolution_backward(gradient.cpu(), input.cpu(), weight.cpu(),
                                            at::IntArrayRef(biases), stride, padding, dilation,
                                            transposed, output_padding, groups, wanted);
  auto there = [&](const at::Tensor& x) { return x.defined() ? x.to(input.device()) : x; };
  return {there(a), there(b), there(c)};
}

// Torch has no fallback for convolutions.
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

}  // namespace apt
