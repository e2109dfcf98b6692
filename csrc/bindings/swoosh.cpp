// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/swoosh.h"

#include <tuple>

#include "bindings/dispatch.h"
#include "bindings/pooled.h"

namespace fastasr {
namespace {

using cpu::Mask;
using cpu::Swoosh;

// x is seen as (outer, shared, inner): the mask has one value for all of the middle dimension.
struct MaskLayout {
  Mask kind = Mask::none;
  int64_t rows = 1, row_elements = 0, rows_per_mask_row = 1, mask_row_elements = 0;
};

MaskLayout mask_layout(const Tensor& x, const std::optional<Tensor>& mask, int64_t shared_dim, const char* op) {
  MaskLayout layout;
  layout.row_elements = x.numel();
  if (!mask.has_value()) return layout;
  check_like(*mask, x, op, "mask");
  layout.kind = Mask::elementwise;
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
  if (m.rows == 1) {
    const bool moving = m.kind == Mask::elementwise;
    parallel_range(m.row_elements, kGrain, [&](int64_t b, int64_t e) { f(b, moving ? b : 0, e - b); });
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, m.row_elements));
  parallel_range(m.rows, grain, [&](int64_t b, int64_t e) {
    for (int64_t r = b; r < e; r++)
      f(r * m.row_elements, r / m.rows_per_mask_row * m.mask_row_elements, m.row_elements);
  });
}

Tensor swoosh_forward(const Tensor& x, bool swoosh_r, const std::optional<Tensor>& mask, int64_t shared_dim) {
  check_like(x, x, "swoosh_forward", "x");
  const MaskLayout layout = mask_layout(x, mask, shared_dim, "swoosh_forward");
  Tensor y = new_pooled_like(x);
  with_kernel_type(x.scalar_type(), "swoosh_forward", [&]<typename T>() {
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

void backward_into(const Tensor& grad, const Tensor& x, bool swoosh_r, const std::optional<Tensor>& mask,
                   int64_t shared_dim, const Tensor& dx, const Tensor* y) {
  const MaskLayout layout = mask_layout(x, mask, shared_dim, "swoosh_backward");
  with_kernel_type(x.scalar_type(), "swoosh_backward", [&]<typename T>() {
    const T* gp = data<T>(grad);
    const T* xp = data<T>(x);
    const T* mp = data_or_null<T>(mask);
    T* dp = mutable_data<T>(dx);
    T* yp = y ? mutable_data<T>(*y) : nullptr;
    const Swoosh kind = swoosh_r ? Swoosh::R : Swoosh::L;
    for_each_piece(layout, [&](int64_t i, int64_t j, int64_t n) {
      cpu::kernels<cpu::SwooshKernels<T>>().backward(gp + i, xp + i, mp ? mp + j : nullptr, layout.kind, dp + i,
                                                     yp ? yp + i : nullptr, n, kind);
    });
  });
}

std::tuple<Tensor, Tensor> swoosh_backward(const Tensor& grad, const Tensor& x, bool swoosh_r,
                                           const std::optional<Tensor>& mask, int64_t shared_dim, bool need_output) {
  check_like(x, x, "swoosh_backward", "x");
  check_same_size(grad, x, "swoosh_backward", "grad");
  Tensor dx = new_pooled_like(x);
  Tensor y = need_output ? new_pooled_like(x) : new_without_elements(x);
  backward_into(grad, x, swoosh_r, mask, shared_dim, dx, need_output ? &y : nullptr);
  return {dx, y};
}

}  // namespace

FASTASR_OPERATORS(
    {"swoosh_forward(Tensor x, bool swoosh_r, Tensor? mask, int shared_dim) -> Tensor", TORCH_BOX(&swoosh_forward)},
    {"swoosh_backward(Tensor grad, Tensor x, bool swoosh_r, Tensor? mask, int shared_dim, bool need_output) -> "
     "(Tensor, Tensor)",
     TORCH_BOX(&swoosh_backward)})

}  // namespace fastasr
