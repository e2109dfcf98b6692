// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/bypass.h"

#include <tuple>
#include <vector>

#include "bindings/dispatch.h"

namespace fastasr {
namespace {

int64_t checked_rows(const Tensor& x_orig, const Tensor& x, const Tensor& scale, const char* op) {
  check_like(x, x, op, "x");
  check_same_size(x_orig, x, op, "x_orig");
  check_like(scale, x, op, "scale");
  check(x_orig.dim() == x.dim() && scale.dim() >= 1 && scale.dim() <= x.dim(), op, "dimensions");
  for (int64_t d = 0; d < x.dim(); d++) check(x_orig.size(d) == x.size(d), op, "x_orig has another shape");
  for (int64_t d = 1; d <= scale.dim(); d++)
    check(scale.size(scale.dim() - d) == x.size(x.dim() - d), op, "scale is not x's trailing dimensions");
  const int64_t period = scale.numel();
  check(period > 0 ? x.numel() % period == 0 : x.numel() == 0, op, "scale does not divide x");
  return period == 0 ? 0 : x.numel() / period;
}

Tensor bypass_forward(const Tensor& x_orig, const Tensor& x, const Tensor& scale) {
  const int64_t rows = checked_rows(x_orig, x, scale, "bypass_forward"), period = scale.numel();
  Tensor y = new_like(x);
  with_kernel_type(x.scalar_type(), "bypass_forward", [&]<typename T>() {
    const T *op = data<T>(x_orig), *xp = data<T>(x), *sp = data<T>(scale);
    T* yp = mutable_data<T>(y);
    const auto& kernel = cpu::kernels<cpu::BypassKernels<T>>();
    parallel_range(rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, period)), [&](int64_t b, int64_t e) {
      kernel.forward(op + b * period, xp + b * period, sp, yp + b * period, e - b, period);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> bypass_backward(const Tensor& grad, const Tensor& x_orig, const Tensor& x,
                                                   const Tensor& scale) {
  const int64_t rows = checked_rows(x_orig, x, scale, "bypass_backward"), period = scale.numel();
  check_same_size(grad, x, "bypass_backward", "grad");
  Tensor dx_orig = new_like(x), dx = new_like(x);
  Tensor dscale = new_like(scale);
  with_kernel_type(x.scalar_type(), "bypass_backward", [&]<typename T>() {
    const T *gp = data<T>(grad), *op = data<T>(x_orig), *xp = data<T>(x), *sp = data<T>(scale);
    T *dop = mutable_data<T>(dx_orig), *dxp = mutable_data<T>(dx);
    const auto& kernel = cpu::kernels<cpu::BypassKernels<T>>();
    const RowBlocks blocks(rows, period);
    std::vector<cpu::compute_t<T>> parts(blocks.count * period);
    parallel_range(blocks.count, std::max<int64_t>(1, kGrain / (blocks.rows_per_block * std::max<int64_t>(1, period))),
                   [&](int64_t b, int64_t e) {
                     for (int64_t k = b; k < e; k++) {
                       const int64_t at = blocks.begin(k) * period;
                       kernel.backward(gp + at, op + at, xp + at, sp, dop + at, dxp + at, parts.data() + k * period,
                                       blocks.size(k), period);
                     }
                   });
    reduce_blocks<T>(parts.data(), blocks.count, period, mutable_data<T>(dscale));
  });
  return {dx_orig, dx, dscale};
}

}  // namespace

FASTASR_OPERATORS({"bypass_forward(Tensor x_orig, Tensor x, Tensor scale) -> Tensor", TORCH_BOX(&bypass_forward)},
                  {"bypass_backward(Tensor grad, Tensor x_orig, Tensor x, Tensor scale) -> (Tensor, Tensor, Tensor)",
                   TORCH_BOX(&bypass_backward)})

}  // namespace fastasr
