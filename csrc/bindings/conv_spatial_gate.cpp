// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/conv_spatial_gate.h"

#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bindings/channel_parameters.h"
#include "bindings/dispatch.h"
#include "bindings/pooled.h"
#include "cpu/math/activation.h"

namespace fastasr::bindings::conv_spatial_gate {
namespace {

using cpu::ConvSpatialGate;

struct Operands {
  const Tensor &x, &norm_weight, &norm_bias, &weight;
  const Optional &bias, &mask;
  double eps;
  int64_t activation;
};

template <typename T>
ConvSpatialGate<T> checked(const Operands& o, const char* op) {
  using C = cpu::compute_t<T>;
  check(o.x.dim() == 3 && o.x.size(2) >= 2 && o.x.size(2) % 2 == 0, op, "x is not (B, T, 2 C)");
  check(o.x.stride(2) == 1 || !o.x.numel(), op, "the channels of x are not contiguous");
  const int64_t batch = o.x.size(0), frames = o.x.size(1), channels = o.x.size(2) / 2;
  check_taps<T>(o.weight, channels, op);
  const int64_t taps = o.weight.size(o.weight.dim() - 1);
  check_vector<T>(o.norm_weight, channels, op, "norm_weight");
  check_vector<T>(o.norm_bias, channels, op, "norm_bias");
  if (o.bias) check_vector<T>(*o.bias, channels, op, "bias");
  if (o.mask)
    check(is_dense(*o.mask, ScalarType::Bool, {batch, frames}), op,
          "padding_mask is not a contiguous bool tensor (B, T)");
  check(o.eps >= 0, op, "eps");
  check(o.activation >= 0 && o.activation < cpu::kActivations, op, "activation");
  return {data<T>(o.x),
          o.x.stride(0),
          o.x.stride(1),
          data<C>(o.norm_weight),
          data<C>(o.norm_bias),
          data<C>(o.weight),
          data_or_null<C>(o.bias),
          data_or_null<bool>(o.mask),
          batch,
          frames,
          channels,
          taps,
          o.eps,
          static_cast<int>(o.activation)};
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

// A thread of its own pays off for this many tasks of `rows` frames.
int64_t grain(int64_t rows, int64_t taps) {
  return std::max<int64_t>(1, 2 * kGrain / std::max<int64_t>(1, rows * cpu::kSpatialGateStripe * (taps / 8 + 1)));
}

template <typename T>
int64_t stripes(const ConvSpatialGate<T>& p) {
  return (p.channels + cpu::kSpatialGateStripe - 1) / cpu::kSpatialGateStripe;
}

Tensor conv_spatial_gate_forward(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                                 const Tensor& weight, const Optional& bias, const Optional& padding_mask, double eps,
                                 int64_t activation) {
  const char* op = "conv_spatial_gate_forward";
  Tensor y = new_without_elements(x);
  with_kernel_type(dtype_of(x), op, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::ConvSpatialGateKernels<T>>();
    const auto p = checked<T>({x, norm_weight, norm_bias, weight, bias, padding_mask, eps, activation}, op);
    y = new_pooled(x, {p.batch, p.frames, p.channels});
    T* out = mutable_data<T>(y);
    const auto statistics = statistics_of(p);
    parallel_range(stripes(p) * p.batch, grain(p.frames, p.taps),
                   [&](int64_t b, int64_t e) { kernel.forward(p, statistics.data(), out, b, e); });
  });
  return y;
}

// Writes dx and du, the gradient of the normalised gate; for float and double tensors du is kept in dx's second half.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_spatial_gate_backward(
    const Tensor& grad, const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& weight,
    const Optional& bias, const Optional& padding_mask, double eps, int64_t activation) {
  const char* op = "conv_spatial_gate_backward";
  Tensor dx = new_contiguous(x), dnorm_weight = new_like(norm_weight), dnorm_bias = new_like(norm_bias),
         dweight = new_like(weight), dbias = new_like(norm_bias);
  with_kernel_type(dtype_of(x), op, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::ConvSpatialGateKernels<T>>();
    using C = cpu::compute_t<T>;
    const auto p = checked<T>({x, norm_weight, norm_bias, weight, bias, padding_mask, eps, activation}, op);
    const int64_t n = p.channels;
    check_like(grad, x, op, "grad");
    check(has_sizes(grad, {p.batch, p.frames, n}), op, "grad has another shape");
    const T* g = data<T>(grad);
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
    parallel_range(stripes(p), grain(3 * p.rows(), p.taps), [&](int64_t b, int64_t e) {
      kernel.backward(p, statistics.data(), g, out, du, du_row, dw, db, b, e);
    });
    const RowBlocks blocks(p.rows(), n);
    const std::unique_ptr<C[]> parts(new C[static_cast<size_t>(blocks.count * 2 * n)]);  // every block is written
    blocks.parallel(4 * n, [&](int64_t b, int64_t e) {
      for (int64_t k = b; k < e; k++) {
        C* part = parts.get() + k * 2 * n;
        kernel.norm_backward(p, statistics.data(), du, du_row, out, part, part + n, blocks.begin(k),
                             blocks.begin(k) + blocks.size(k));
      }
    });
    reduce_blocks(parts.get(), blocks.count, 2 * n, dnorm_weight);
    reduce_blocks(parts.get() + n, blocks.count, 2 * n, dnorm_bias);
  });
  return {dx, dnorm_weight, dnorm_bias, dweight, dbias};
}

}  // namespace

FASTASR_OPERATORS(
    {"conv_spatial_gate_forward(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? bias, Tensor? "
     "padding_mask, float eps, int activation) -> Tensor",
     Boxed<conv_spatial_gate_forward>::call},
    {"conv_spatial_gate_backward(Tensor grad, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? "
     "bias, Tensor? padding_mask, float eps, int activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
     Boxed<conv_spatial_gate_backward>::call})

}  // namespace fastasr::bindings::conv_spatial_gate
