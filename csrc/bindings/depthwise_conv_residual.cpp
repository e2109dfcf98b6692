// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/depthwise_conv_residual.h"

#include <tuple>

#include "bindings/channel_parameters.h"
#include "bindings/dispatch.h"
#include "bindings/pooled.h"

namespace fastasr::bindings::depthwise_conv_residual {
namespace {

using cpu::DepthwiseConvResidual;

template <typename T>
DepthwiseConvResidual<T> checked(const Tensor& x, const Tensor& weight, const Optional& bias, const char* op) {
  using C = cpu::compute_t<T>;
  check(x.dim() == 3 && x.size(2) > 0, op, "x is not (B, T, C)");
  check(x.stride(2) == 1 || x.size(2) == 1 || !x.numel(), op, "the channels of x are not contiguous");
  const int64_t channels = x.size(2);
  check_taps<T>(weight, channels, op);
  if (bias) check_vector<T>(*bias, channels, op, "bias");
  return {data<T>(x),
          x.stride(0),
          x.stride(1),
          data<C>(weight),
          data_or_null<C>(bias),
          x.size(0),
          x.size(1),
          channels,
          weight.size(weight.dim() - 1)};
}

template <typename T>
int64_t stripes(const DepthwiseConvResidual<T>& p) {
  return (p.channels + cpu::kResidualStripe - 1) / cpu::kResidualStripe;
}

// A thread of its own pays off for this many tasks of `rows` frames.
int64_t grain(int64_t rows, int64_t taps) {
  return std::max<int64_t>(1, 2 * kGrain / std::max<int64_t>(1, rows * cpu::kResidualStripe * (taps / 8 + 1)));
}

Tensor depthwise_conv_residual_forward(const Tensor& x, const Tensor& weight, const Optional& bias) {
  const char* op = "depthwise_conv_residual_forward";
  Tensor y = new_without_elements(x);
  with_kernel_type(dtype_of(x), op, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::DepthwiseConvResidualKernels<T>>();
    const auto p = checked<T>(x, weight, bias, op);
    y = new_pooled(x, {p.batch, p.frames, p.channels});
    T* out = mutable_data<T>(y);
    parallel_range(stripes(p) * p.batch, grain(p.frames, p.taps),
                   [&](int64_t b, int64_t e) { kernel.forward(p, out, b, e); });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv_residual_backward(const Tensor& grad, const Tensor& x,
                                                                    const Tensor& weight) {
  const char* op = "depthwise_conv_residual_backward";
  Tensor dx = new_without_elements(x), dweight = new_like(weight), dbias = new_without_elements(weight);
  with_kernel_type(dtype_of(x), op, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::DepthwiseConvResidualKernels<T>>();
    using C = cpu::compute_t<T>;
    const auto p = checked<T>(x, weight, {}, op);
    check_same_size(grad, x, op, "grad");
    dx = new_pooled(x, {p.batch, p.frames, p.channels});
    const int64_t one = 1;
    dbias = new_strided(weight, 1, &p.channels, &one);
    const T* g = data<T>(grad);
    T* out = mutable_data<T>(dx);
    C *dw = mutable_data<C>(dweight), *db = mutable_data<C>(dbias);
    parallel_range(stripes(p), grain(2 * p.batch * p.frames, p.taps),
                   [&](int64_t b, int64_t e) { kernel.backward(p, g, out, dw, db, b, e); });
  });
  return {dx, dweight, dbias};
}

}  // namespace

FASTASR_OPERATORS({"depthwise_conv_residual_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
                   Boxed<depthwise_conv_residual_forward>::call},
                  {"depthwise_conv_residual_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)",
                   Boxed<depthwise_conv_residual_backward>::call})

}  // namespace fastasr::bindings::depthwise_conv_residual
