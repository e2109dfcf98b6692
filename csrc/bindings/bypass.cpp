// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/bypass.h"

#include "bindings/layer_parts.h"
#include "bindings/row_sums.h"
#include "bindings/written/bypass.h"

namespace fastasr::bindings::bypass {
namespace {

// Kernels repeat scale over rows of its size: it has the trailing dimensions of x. Returns the number of rows.
int64_t rows_of(const Tensor& x, const Tensor& scale, const char* op) {
  const Sizes sizes = x.sizes(), last = scale.sizes();
  check(!last.empty() && last.size() <= sizes.size() && std::equal(last.rbegin(), last.rend(), sizes.rbegin()), op,
        "scale is not x's trailing dimensions");
  return scale.numel() ? product(sizes.slice(0, sizes.size() - last.size())) : 0;
}

}  // namespace

Tensor bypass_forward(const BypassForward& a) {
  const int64_t rows = rows_of(a.x, a.scale, a.kName), period = a.scale.numel();
  Tensor y = new_like(a.x);
  with_kernels<cpu::BypassKernels>(a.x, a.kName, [&]<typename T>(const auto& kernel) {
    const T *op = data<T>(a.x_orig), *xp = data<T>(a.x), *sp = data<T>(a.scale);
    T* yp = mutable_data<T>(y);
    parallel_tasks(rows, period, [&](int64_t b, int64_t e) {
      kernel.forward(op + b * period, xp + b * period, sp, yp + b * period, e - b, period);
    });
  });
  return y;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> bypass_backward(const BypassBackward& a) {
  const int64_t rows = rows_of(a.x, a.scale, a.kName), period = a.scale.numel();
  Tensor dx_orig = new_like(a.x), dx = new_like(a.x), dscale = new_like(a.scale);
  with_kernels<cpu::BypassKernels>(a.x, a.kName, [&]<typename T>(const auto& kernel) {
    const T *gp = data<T>(a.grad_y), *op = data<T>(a.x_orig), *xp = data<T>(a.x), *sp = data<T>(a.scale);
    T *dop = mutable_data<T>(dx_orig), *dxp = mutable_data<T>(dx);
    sum_parts<T>(RowBlocks(rows, period), period, {&dscale}, period, 0, [&](int64_t b, int64_t e, auto* part, auto*) {
      const int64_t at = b * period;
      kernel.backward(gp + at, op + at, xp + at, sp, dop + at, dxp + at, part, e - b, period);
    });
  });
  return {dx_orig, dx, dscale};
}

}  // namespace

FASTASR_OPERATORS(written<bypass_forward>, written<bypass_backward>)

}  // namespace fastasr::bindings::bypass
