// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/conv_spatial_gate.h"

#include <memory>

#include "bindings/row_sums.h"
#include "bindings/written/conv_spatial_gate.h"

namespace fastasr::bindings::conv_spatial_gate {
namespace {

using cpu::ConvSpatialGate;

template <typename T>
ConvSpatialGate<T> problem(const auto& a) {
  using C = cpu::compute_t<T>;
  ConvSpatialGate<T> p{};
  p.x = data<T>(a.x), p.x_batch = a.x.stride(0), p.x_time = a.x.stride(1);
  p.norm_weight = data<C>(a.norm_weight), p.norm_bias = data<C>(a.norm_bias);
  p.weight = data<C>(a.weight), p.bias = data_or_null<C>(a.bias), p.mask = data_or_null<bool>(a.padding_mask);
  p.batch = a.B, p.frames = a.T, p.channels = a.C, p.taps = a.K, p.eps = a.eps;
  p.activation = static_cast<int>(a.activation);
  return p;
}

template <typename T, typename C = cpu::compute_t<T>>
std::vector<cpu::RowStatistics<C>> statistics_of(const ConvSpatialGate<T>& p) {
  const auto& kernel = cpu::kernels<cpu::ConvSpatialGateKernels<T>>();
  std::vector<cpu::RowStatistics<C>> statistics(p.rows());
  parallel_tasks(p.rows(), p.channels, [&](int64_t b, int64_t e) {
    std::vector<C> scratch(p.channels);
    kernel.statistics(p, statistics.data(), b, e, scratch.data());
  });
  return statistics;
}

template <typename T>
int64_t stripes(const ConvSpatialGate<T>& p) {
  return (p.channels + cpu::kSpatialGateStripe - 1) / cpu::kSpatialGateStripe;
}

Tensor conv_spatial_gate_forward(const ConvSpatialGateForward& a) {
  Tensor y = new_contiguous(a.x, {a.B, a.T, a.C});
  with_kernels<cpu::ConvSpatialGateKernels>(a.x, a.kName, [&]<typename T>(const auto& kernel) {
    const auto p = problem<T>(a);
    T* out = mutable_data<T>(y);
    const auto statistics = statistics_of(p);
    parallel_tasks(stripes(p) * p.batch, depthwise_work(p.frames * cpu::kSpatialGateStripe, p.taps),
                   [&](int64_t b, int64_t e) { kernel.forward(p, statistics.data(), out, b, e); });
  });
  return y;
}

// Writes dx and du, the gradient of the normalised gate; for float and double tensors du is kept in dx's second half.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_spatial_gate_backward(const ConvSpatialGateBackward& a) {
  Tensor dx = new_contiguous(a.x), dnorm_weight = new_like(a.norm_weight), dnorm_bias = new_like(a.norm_bias),
         dweight = new_like(a.weight), dbias = new_like(a.norm_bias);
  with_kernels<cpu::ConvSpatialGateKernels>(a.x, a.kName, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const auto p = problem<T>(a);
    const int64_t n = p.channels;
    const T* g = data<T>(a.grad_y);
    T* out = mutable_data<T>(dx);
    std::unique_ptr<C[]> scratch;
    C* du = nullptr;
    int64_t du_row = n;
    if constexpr (std::is_same_v<T, C>)
      du = out + n, du_row = 2 * n;
    else
      scratch.reset(new C[static_cast<size_t>(p.rows() * n)]), du = scratch.get();
    const auto statistics = statistics_of(p);
    C *dw = mutable_data<C>(dweight), *db = mutable_data<C>(dbias);
    parallel_tasks(
        stripes(p), depthwise_work(3 * p.rows() * cpu::kSpatialGateStripe, p.taps),
        [&](int64_t b, int64_t e) { kernel.backward(p, statistics.data(), g, out, du, du_row, dw, db, b, e); });
    sum_parts<T>(RowBlocks(p.rows(), n), n, {&dnorm_weight, &dnorm_bias}, 4 * n, 0,
                 [&](int64_t b, int64_t e, auto* d, auto*) {
                   kernel.norm_backward(p, statistics.data(), du, du_row, out, d, d + n, b, e);
                 });
  });
  return {dx, dnorm_weight, dnorm_bias, dweight, dbias};
}

}  // namespace

FASTASR_OPERATORS(written<conv_spatial_gate_forward>, written<conv_spatial_gate_backward>)

}  // namespace fastasr::bindings::conv_spatial_gate
