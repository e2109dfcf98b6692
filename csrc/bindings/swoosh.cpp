// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/swoosh.h"

#include "bindings/layer_parts.h"

namespace fastasr::bindings::swoosh {
namespace {

using cpu::Mask;
using cpu::Swoosh;

// x is seen as (outer, shared, inner): the mask has one value for all of the middle dimension.
struct MaskLayout {
  Mask kind = Mask::none;
  int64_t rows = 1, row_elements = 0, rows_per_mask_row = 1, mask_row_elements = 0;
  const int64_t* mask_row = nullptr;  // the mask's row for every row of x, if given
};

MaskLayout mask_layout(const Tensor& x, const Optional& mask, int64_t shared_dim, const Optional& mask_row,
                       const char* op) {
  MaskLayout layout;
  layout.row_elements = x.numel();
  if (!mask.has_value()) return layout;
  check_like(*mask, x, op, "mask");
  layout.kind = Mask::elementwise;
  if (mask_row) {
    layout.rows = mask_row->numel();
    check(mask->dim() == 2 && layout.rows * mask->size(1) == x.numel(), op, "mask is not (R, K)");
    check(dtype_of(*mask_row) == ScalarType::Long && mask_row->is_cpu() && mask_row->is_contiguous(), op, "mask_row");
    layout.row_elements = layout.mask_row_elements = mask->size(1);
    layout.mask_row = data<int64_t>(*mask_row);
    for (int64_t r = 0; r < layout.rows; r++)
      check(layout.mask_row[r] >= 0 && layout.mask_row[r] < mask->size(0), op, "mask_row is out of range");
    return layout;
  }
  if (shared_dim < 0) {
    check(mask->numel() == x.numel(), op, "mask has another number of elements");
    layout.mask_row_elements = x.numel();
    return layout;
  }
  check(shared_dim < x.dim(), op, "shared_dim is out of range");
  int64_t outer = 1, inner = 1;
  for (int64_t d = 0; d < shared_dim; d++) outer *= x.size(d);
  for (int64_t d = shared_dim + 1; d < x.dim(); d++) inner *= x.size(d);
  const int64_t shared = x.size(shared_dim);
  check(mask->numel() == outer * inner, op, "mask has another number of elements");
  layout.mask_row_elements = inner;
  if (inner == 1) {
    layout.kind = Mask::scalar;
    layout.rows = outer;
    layout.row_elements = shared;
  } else {
    layout.rows = outer * shared;
    layout.row_elements = inner;
    layout.rows_per_mask_row = std::max<int64_t>(1, shared);
  }
  return layout;
}

// Calls f(offset in x, offset in the mask, elements) over pieces of rows.
template <typename F>
void for_each_piece(const MaskLayout& m, const F& f) {
  if (m.rows == 1 && !m.mask_row) {
    const bool moving = m.kind == Mask::elementwise;
    parallel_range(m.row_elements, kGrain, [&](int64_t b, int64_t e) { f(b, moving ? b : 0, e - b); });
    return;
  }
  parallel_tasks(m.rows, m.row_elements, [&](int64_t b, int64_t e) {
    for (int64_t r = b; r < e; r++)
      f(r * m.row_elements, (m.mask_row ? m.mask_row[r] : r / m.rows_per_mask_row) * m.mask_row_elements,
        m.row_elements);
  });
}

}  // namespace

Tensor swoosh_forward(const Tensor& x, bool swoosh_r, const Optional& mask, int64_t shared_dim,
                      const Optional& mask_row) {
  check_like(x, x, "swoosh_forward", "x");
  const MaskLayout layout = mask_layout(x, mask, shared_dim, mask_row, "swoosh_forward");
  Tensor y = new_like(x);
  with_kernel_type(dtype_of(x), "swoosh_forward", [&]<typename T>() {
    const T* xp = data<T>(x);
    const T* mp = data_or_null<T>(mask);
    T* yp = mutable_data<T>(y);
    const Swoosh kind = swoosh_r ? Swoosh::R : Swoosh::L;
    for_each_piece(layout, [&](int64_t i, int64_t j, int64_t n) {
      cpu::kernels<cpu::SwooshKernels<T>>().forward(xp + i, mp ? mp + j : nullptr, layout.kind, yp + i, n, kind);
    });
  });
  return y;
}

namespace {

std::tuple<Tensor, Tensor> swoosh_backward(const Tensor& grad, const Tensor& x, bool swoosh_r, const Optional& mask,
                                           int64_t shared_dim, const Optional& mask_row, bool need_output) {
  check_like(x, x, "swoosh_backward", "x");
  check_same_size(grad, x, "swoosh_backward", "grad");
  Tensor dx = new_like(x);
  Tensor y = need_output ? new_like(x) : new_without_elements(x);
  const MaskLayout layout = mask_layout(x, mask, shared_dim, mask_row, "swoosh_backward");
  with_kernel_type(dtype_of(x), "swoosh_backward", [&]<typename T>() {
    const T* gp = data<T>(grad);
    const T* xp = data<T>(x);
    const T* mp = data_or_null<T>(mask);
    T* dp = mutable_data<T>(dx);
    T* yp = need_output ? mutable_data<T>(y) : nullptr;
    const Swoosh kind = swoosh_r ? Swoosh::R : Swoosh::L;
    for_each_piece(layout, [&](int64_t i, int64_t j, int64_t n) {
      cpu::kernels<cpu::SwooshKernels<T>>().backward(gp + i, xp + i, mp ? mp + j : nullptr, layout.kind, dp + i,
                                                     yp ? yp + i : nullptr, n, kind);
    });
  });
  return {dx, y};
}

}  // namespace

FASTASR_OPERATORS(FASTASR_TYPED(swoosh_forward), FASTASR_TYPED(swoosh_backward))

}  // namespace fastasr::bindings::swoosh
