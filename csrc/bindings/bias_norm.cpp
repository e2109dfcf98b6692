// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/bias_norm.h"

#include <cmath>
#include <tuple>
#include <vector>

#include "bindings/layer_parts.h"
#include "bindings/pooled.h"
#include "bindings/row_sums.h"

namespace fastasr::bindings::bias_norm {
namespace {

int64_t bias_norm_rows(const Tensor& x, const Tensor& bias, const Tensor& log_scale, const char* op) {
  check_like(x, x, op, "x");
  check_like(bias, x, op, "bias");
  check(x.dim() >= 1 && bias.dim() == 1 && bias.size(0) == x.size(x.dim() - 1), op,
        "bias does not match the last dimension");
  check(log_scale.dim() == 0, op, "log_scale");
  return bias.numel() == 0 ? 0 : x.numel() / bias.numel();
}

// log_scale keeps its own dtype: rounding it to a 16-bit x's dtype would change it by 2^-9.
double scale_of(const Tensor& log_scale) {
  double value = 0;
  with_kernel_type(dtype_of(log_scale), "bias_norm: log_scale",
                   [&]<typename T>() { value = static_cast<double>(cpu::load(*data<T>(log_scale))); });
  return std::exp(value);
}

}  // namespace

Tensor bias_norm_forward(const Tensor& x, const Tensor& bias, const Tensor& log_scale) {
  const int64_t rows = bias_norm_rows(x, bias, log_scale, "bias_norm_forward"), channels = bias.numel();
  Tensor y = new_pooled_like(x);
  with_kernel_type(dtype_of(x), "bias_norm_forward", [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::BiasNormKernels<T>>();
    const T *xp = data<T>(x), *bp = data<T>(bias);
    T* yp = mutable_data<T>(y);
    const double scale = scale_of(log_scale);
    parallel_tasks(rows, channels, [&](int64_t b, int64_t e) {
      kernel.forward(xp + b * channels, bp, scale, yp + b * channels, e - b, channels);
    });
  });
  return y;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> bias_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& bias,
                                                      const Tensor& log_scale) {
  const int64_t rows = bias_norm_rows(x, bias, log_scale, "bias_norm_backward"), channels = bias.numel();
  check_same_size(grad, x, "bias_norm_backward", "grad");
  Tensor dx = new_pooled_like(x), dbias = new_like(bias);
  Tensor dlog_scale = new_like(log_scale);
  with_kernel_type(dtype_of(x), "bias_norm_backward", [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::BiasNormKernels<T>>();
    const T *gp = data<T>(grad), *xp = data<T>(x), *bp = data<T>(bias);
    T* dp = mutable_data<T>(dx);
    const double scale = scale_of(log_scale);
    const RowBlocks blocks(rows, channels);
    std::vector<double> scale_parts(blocks.count);
    sum_parts<T>(blocks, channels, &dbias, [&](int64_t k, auto* part) {
      const int64_t at = blocks.begin(k) * channels;
      kernel.backward(gp + at, xp + at, bp, scale, dp + at, part, &scale_parts[k], blocks.size(k), channels);
    });
    double sum = 0;
    for (double v : scale_parts) sum += v;
    with_kernel_type(dtype_of(log_scale), "bias_norm_backward", [&]<typename S>() {
      cpu::store(mutable_data<S>(dlog_scale), static_cast<cpu::compute_t<S>>(sum));
    });
  });
  return {dx, dbias, dlog_scale};
}

}  // namespace

FASTASR_OPERATORS(
    {"bias_norm_forward(Tensor x, Tensor bias, Tensor log_scale) -> Tensor", Boxed<bias_norm_forward>::call},
    {"bias_norm_backward(Tensor grad, Tensor x, Tensor bias, Tensor log_scale) -> (Tensor, Tensor, Tensor)",
     Boxed<bias_norm_backward>::call})

}  // namespace fastasr::bindings::bias_norm
