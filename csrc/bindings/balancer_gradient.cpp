// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/balancer_gradient.h"

#include "bindings/column_sums.h"

namespace fastasr::bindings::balancer_gradient {
namespace {

constexpr int64_t kShiftSamples = 8;

// x is seen as (outer, channels, inner): inner is 1 where channels come last, and rows of x are then `stride` apart.
struct Layout {
  int64_t outer, channels, inner, stride;
  explicit Layout(const Tensor& x) : outer(x.size(0)), channels(x.size(1)), inner(1), stride(channels) {
    if (x.dim() == 3) {
      inner = x.size(2);
    } else if (outer > 1) {
      stride = x.stride(0);
    }
  }
};

// The mean of a few elements of each channel is near enough to the channel's mean for the sums.
template <typename T>
std::vector<cpu::compute_t<T>> shifts(const T* x, const Layout& l) {
  std::vector<cpu::compute_t<T>> shift(l.channels);
  const int64_t count = l.outer * l.inner;
  if (count == 0) return shift;
  for (int64_t c = 0; c < l.channels; c++) {
    double sum = 0;
    for (int64_t k = 0; k < kShiftSamples; k++) {
      const int64_t at = count * k / kShiftSamples, o = at / l.inner, i = at % l.inner;
      sum += cpu::load(l.inner == 1 ? x[o * l.stride + c] : x[(o * l.channels + c) * l.inner + i]);
    }
    shift[c] = static_cast<cpu::compute_t<T>>(sum / kShiftSamples);
  }
  return shift;
}

template <typename T>
std::vector<double> sums(const T* x, const Layout& l, const std::vector<cpu::compute_t<T>>& shift) {
  const int64_t channels = l.channels;
  if (l.inner == 1) return column_sums<T>(x, l.outer, l.stride, channels, shift);
  const auto& kernel = cpu::kernels<cpu::BalancerKernels<T>>();
  return sums_of_blocks(l.outer, channels * l.inner, channels, [&](int64_t k, double* s1, double* s2) {
    for (int64_t c = 0; c < channels; c++)
      kernel.sums_run(x + (k * channels + c) * l.inner, shift[c], s1 + c, s2 + c, l.inner);
  });
}

Tensor balancer_gradient(const Tensor& grad, const Tensor& x, double min_mean, double max_mean, double min_rms,
                         double max_rms, double grad_scale) {
  constexpr const char* kOp = "balancer_gradient";
  check(x.dim() == 2 || x.dim() == 3, kOp, "x must be (rows, channels) or (outer, channels, inner)");
  check(is_dense(grad, dtype_of(x), x.sizes()), kOp, "grad is not contiguous, or of another dtype or shape");
  check(x.is_contiguous() || (x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1)), kOp,
        "x is not contiguous, or not along its channels");
  const cpu::BalancerLimits limits{min_mean, max_mean, min_rms, max_rms, grad_scale};
  const Layout l(x);
  Tensor y = new_like(grad);
  if (grad.numel() == 0) return y;
  with_kernels<cpu::BalancerKernels>(x, kOp, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const T *gp = data<T>(grad), *xp = data<T>(x);
    T* yp = mutable_data<T>(y);
    std::vector<C> shift = shifts(xp, l);
    std::vector<double> total = sums(xp, l, shift);
    // the sums are no wider than the elements: nothing cancels once the mean is subtracted
    if constexpr (std::is_same_v<C, double>) {
      for (int64_t c = 0; c < l.channels; c++) shift[c] += total[c] / static_cast<double>(l.outer * l.inner);
      total = sums(xp, l, shift);
    }
    std::vector<C> offset(l.channels), slope(l.channels);
    for (int64_t c = 0; c < l.channels; c++) {
      double o, s;
      cpu::balancer_coefficients(total[c], total[l.channels + c], static_cast<double>(shift[c]), l.outer * l.inner,
                                 limits, &o, &s);
      offset[c] = static_cast<C>(o), slope[c] = static_cast<C>(s);
    }
    const int64_t row = l.channels * l.inner;
    parallel_tasks(l.outer, row, [&](int64_t b, int64_t e) {
      if (l.inner == 1) {
        kernel.apply_rows(gp + b * row, xp + b * l.stride, l.stride, shift.data(), offset.data(), slope.data(),
                          yp + b * row, e - b, l.channels);
        return;
      }
      for (int64_t k = b * l.channels; k < e * l.channels; k++) {
        const int64_t c = k % l.channels, at = k * l.inner;
        kernel.apply_run(gp + at, xp + at, shift[c], offset[c], slope[c], yp + at, l.inner);
      }
    });
  });
  return y;
}

}  // namespace

FASTASR_OPERATORS(FASTASR_TYPED(balancer_gradient))

}  // namespace fastasr::bindings::balancer_gradient
