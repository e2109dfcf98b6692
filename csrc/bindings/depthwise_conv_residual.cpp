// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/depthwise_conv_residual.h"

#include "bindings/written/depthwise_conv_residual.h"

namespace fastasr::bindings::depthwise_conv_residual {
namespace {

using cpu::DepthwiseConvResidual;

template <typename T>
DepthwiseConvResidual<T> problem(const auto& a, const Optional& bias) {
  using C = cpu::compute_t<T>;
  const int64_t past = a.K / 2 + a.delay;
  check(past >= 0 && past < a.K, a.kName, "delay");
  const bool* mask = data_or_null<bool>(a.padding_mask);
  return {data<T>(a.x), a.x.stride(0), a.x.stride(1), data<C>(a.weight), data_or_null<C>(bias), mask, a.B, a.T,
          a.C,          a.K,           past};
}

template <typename T>
int64_t stripes(const DepthwiseConvResidual<T>& p) {
  return (p.channels + cpu::kResidualStripe - 1) / cpu::kResidualStripe;
}

Tensor depthwise_conv_residual_forward(const DepthwiseConvResidualForward& a) {
  Tensor y = new_contiguous(a.x, {a.B, a.T, a.C});
  with_kernels<cpu::DepthwiseConvResidualKernels>(a.x, a.kName, [&]<typename T>(const auto& kernel) {
    const auto p = problem<T>(a, a.bias);
    T* out = mutable_data<T>(y);
    parallel_tasks(stripes(p) * p.batch, depthwise_work(p.frames * cpu::kResidualStripe, p.taps),
                   [&](int64_t b, int64_t e) { kernel.forward(p, out, b, e); });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv_residual_backward(const DepthwiseConvResidualBackward& a) {
  Tensor dx = new_contiguous(a.x, {a.B, a.T, a.C}), dweight = new_like(a.weight);
  Tensor dbias = new_contiguous(a.weight, {a.C});
  with_kernels<cpu::DepthwiseConvResidualKernels>(a.x, a.kName, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const auto p = problem<T>(a, {});
    const T* g = data<T>(a.grad_y);
    T* out = mutable_data<T>(dx);
    C *dw = mutable_data<C>(dweight), *db = mutable_data<C>(dbias);
    parallel_tasks(stripes(p), depthwise_work(2 * p.batch * p.frames * cpu::kResidualStripe, p.taps),
                   [&](int64_t b, int64_t e) { kernel.backward(p, g, out, dw, db, b, e); });
  });
  return {dx, dweight, dbias};
}

}  // namespace

FASTASR_OPERATORS(written<depthwise_conv_residual_forward>, written<depthwise_conv_residual_backward>)

}  // namespace fastasr::bindings::depthwise_conv_residual
