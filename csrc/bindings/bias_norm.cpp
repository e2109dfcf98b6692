// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/bias_norm.h"

#include <cmath>

#include "bindings/layer_parts.h"
#include "bindings/row_sums.h"
#include "bindings/written/bias_norm.h"

namespace fastasr::bindings::bias_norm {
namespace {

// log_scale keeps its own dtype: rounding it to a 16-bit x's dtype would change it by 2^-9.
double scale_of(const Tensor& log_scale) {
  double value = 0;
  with_kernel_type(dtype_of(log_scale), "bias_norm: log_scale",
                   [&]<typename T>() { value = static_cast<double>(cpu::load(*data<T>(log_scale))); });
  return std::exp(value);
}

}  // namespace

Tensor bias_norm_forward(const BiasNormForward& a) {
  check(a.C == a.D, a.kName, "bias does not match the last dimension");
  const int64_t rows = a.C ? product(a.S) : 0, channels = a.C;
  Tensor y = new_like(a.x);
  with_kernels<cpu::BiasNormKernels>(a.x, a.kName, [&]<typename T>(const auto& kernel) {
    const T *xp = data<T>(a.x), *bp = data<T>(a.bias);
    T* yp = mutable_data<T>(y);
    const double scale = scale_of(a.log_scale);
    parallel_tasks(rows, channels, [&](int64_t b, int64_t e) {
      kernel.forward(xp + b * channels, bp, scale, yp + b * channels, e - b, channels);
    });
  });
  return y;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> bias_norm_backward(const BiasNormBackward& a) {
  check(a.C == a.D, a.kName, "bias does not match the last dimension");
  const int64_t rows = a.C ? product(a.S) : 0, channels = a.C;
  Tensor dx = new_like(a.x), dbias = new_like(a.bias), dlog_scale = new_like(a.log_scale);
  with_kernels<cpu::BiasNormKernels>(a.x, a.kName, [&]<typename T>(const auto& kernel) {
    const T *gp = data<T>(a.grad_y), *xp = data<T>(a.x), *bp = data<T>(a.bias);
    T* dp = mutable_data<T>(dx);
    const double scale = scale_of(a.log_scale);
    const RowBlocks blocks(rows, channels);
    std::vector<double> scale_parts(blocks.count);
    sum_parts<T>(blocks, channels, {&dbias}, channels, 0, [&](int64_t b, int64_t e, auto* part, auto*) {
      const int64_t at = b * channels, k = b / blocks.rows_per_block;
      kernel.backward(gp + at, xp + at, bp, scale, dp + at, part, &scale_parts[k], e - b, channels);
    });
    double sum = 0;
    for (double v : scale_parts) sum += v;
    with_kernel_type(dtype_of(a.log_scale), a.kName, [&]<typename S>() {
      cpu::store(mutable_data<S>(dlog_scale), static_cast<cpu::compute_t<S>>(sum));
    });
  });
  return {dx, dbias, dlog_scale};
}

}  // namespace

FASTASR_OPERATORS(written<bias_norm_forward>, written<bias_norm_backward>)

}  // namespace fastasr::bindings::bias_norm
