// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/conv_subsampling.h"

#include <memory>
#include <tuple>

#include "bindings/dispatch.h"
#include "bindings/pooled.h"

namespace fastasr::bindings::conv_subsampling {
namespace {

using cpu::SubsamplingSizes;

SubsamplingSizes checked(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& depthwise_weight,
                         const Optional& mask, int64_t left, const char* op) {
  check(x.dim() == 3 && x.size(1) >= 7 && x.size(2) >= 3, op, "x is not (batch, frames >= 7, bins >= 3)");
  check_like(x, x, op, "x");
  check(left == 1 || left == 2, op, "left");
  check(weight.dim() == 4 && weight.size(0) > 0, op, "weight has another shape");
  const SubsamplingSizes s{x.size(0), x.size(1), x.size(2), weight.size(0), left};
  check(is_dense(weight, dtype_of(x), {s.channels, 1, 3, 3}), op, "weight has another shape or dtype");
  check(is_dense(depthwise_weight, dtype_of(x), {s.channels, 1, 3, 3}), op,
        "depthwise_weight has another shape or dtype");
  if (bias) check(is_dense(*bias, dtype_of(x), {s.channels}), op, "bias has another shape or dtype");
  if (mask)
    check(is_dense(*mask, ScalarType::Bool, {s.batch, s.first_frames()}), op,
          "mask is not a contiguous bool tensor (batch, frames of the first convolution)");
  return s;
}

// A thread of its own pays off for this many blocks.
int64_t grain(const SubsamplingSizes& s) {
  const int64_t block = cpu::kSubsamplingFrames * s.out_width() * s.channels;
  return std::max<int64_t>(1, kGrain / 4 / block);
}

Tensor conv_subsampling_forward(const Tensor& x, const Tensor& weight, const Optional& bias,
                                const Tensor& depthwise_weight, const Optional& depthwise_bias, const Optional& mask,
                                int64_t left) {
  const char* op = "conv_subsampling_forward";
  const SubsamplingSizes s = checked(x, weight, bias, depthwise_weight, mask, left, op);
  if (depthwise_bias)
    check(is_dense(*depthwise_bias, dtype_of(x), {s.channels}), op, "depthwise_bias has another shape or dtype");
  Tensor y = new_pooled(x, {s.batch, s.out_frames(), s.out_width(), s.channels});
  with_kernel_type(dtype_of(x), op, [&]<typename T>() {
    const cpu::SubsamplingInputs<T> in{data<T>(x),
                                       data<T>(weight),
                                       data_or_null<T>(bias),
                                       data<T>(depthwise_weight),
                                       data_or_null<T>(depthwise_bias),
                                       data_or_null<bool>(mask)};
    T* out = mutable_data<T>(y);
    parallel_range(cpu::subsampling_blocks(s), grain(s), [&](int64_t b, int64_t e) {
      cpu::kernels<cpu::ConvSubsamplingKernels<T>>().forward(s, in, out, b, e);
    });
  });
  return y;
}

// Returns dx, without elements if it is not needed, and the gradients of the four parameters.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_subsampling_backward(const Tensor& grad, const Tensor& x,
                                                                             const Tensor& weight, const Optional& bias,
                                                                             const Tensor& depthwise_weight,
                                                                             const Optional& mask, int64_t left,
                                                                             bool need_x) {
  const char* op = "conv_subsampling_backward";
  const SubsamplingSizes s = checked(x, weight, bias, depthwise_weight, mask, left, op);
  check(is_dense(grad, dtype_of(x), {s.batch, s.out_frames(), s.out_width(), s.channels}), op,
        "grad has another shape or dtype");
  Tensor dx = need_x ? new_like(x) : new_without_elements(x);
  Tensor dweight = new_like(weight), dbias = new_contiguous(x, {s.channels});
  Tensor ddepthwise_weight = new_like(weight), ddepthwise_bias = new_contiguous(x, {s.channels});
  with_kernel_type(dtype_of(x), op, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::ConvSubsamplingKernels<T>>();
    const cpu::SubsamplingInputs<T> in{
        data<T>(x), data<T>(weight),         data_or_null<T>(bias), data<T>(depthwise_weight),
        nullptr,    data_or_null<bool>(mask)};
    const int64_t blocks = cpu::subsampling_blocks(s), groups = cpu::subsampling_groups(s);
    const auto numbers = [](int64_t n) { return std::unique_ptr<double[]>(new double[static_cast<size_t>(n)]); };
    const auto parts = numbers(groups * cpu::kSubsamplingSums * s.channels);
    const auto dx_parts = numbers(need_x ? blocks * cpu::kSubsamplingRows * s.bins : 0);
    const int64_t per_group = (blocks + groups - 1) / std::max<int64_t>(1, groups);
    parallel_range(groups, std::max<int64_t>(1, grain(s) / std::max<int64_t>(1, per_group)), [&](int64_t b, int64_t e) {
      kernel.backward(s, in, data<T>(grad), parts.get(), need_x ? dx_parts.get() : nullptr, b, e);
    });
    kernel.reduce(s, parts.get(), mutable_data<T>(dweight), mutable_data<T>(dbias), mutable_data<T>(ddepthwise_weight),
                  mutable_data<T>(ddepthwise_bias));
    if (need_x) {
      T* to = mutable_data<T>(dx);
      parallel_tasks(s.batch, s.frames * s.bins,
                     [&](int64_t b, int64_t e) { kernel.add_blocks(s, dx_parts.get(), to, b, e); });
    }
  });
  return {dx, dweight, dbias, ddepthwise_weight, ddepthwise_bias};
}

}  // namespace

FASTASR_OPERATORS({"conv_subsampling_forward(Tensor x, Tensor weight, Tensor? bias, Tensor depthwise_weight, "
                   "Tensor? depthwise_bias, Tensor? mask, int left) -> Tensor",
                   Boxed<conv_subsampling_forward>::call},
                  {"conv_subsampling_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, "
                   "Tensor depthwise_weight, Tensor? mask, int left, bool need_x) -> (Tensor, Tensor, Tensor, Tensor, "
                   "Tensor)",
                   Boxed<conv_subsampling_backward>::call})

}  // namespace fastasr::bindings::conv_subsampling
