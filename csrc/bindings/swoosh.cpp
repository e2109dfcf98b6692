// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/swoosh.h"

#include <tuple>

#include "bindings/layer_parts.h"
#include "bindings/pooled.h"

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

// x is rows (N, ...) of sequences that lie one after the other: `sequence` (N) says to which row of the mask each
// belongs.
MaskLayout packed_layout(const Tensor& x, const Tensor& mask, const Tensor& sequence, const char* op) {
  check_like(x, x, op, "x");
  check_like(mask, x, op, "mask");
  check(x.dim() > 0 && mask.dim() > 0 && is_dense(sequence, ScalarType::Long, {x.size(0)}), op, "sequence");
  MaskLayout layout{Mask::elementwise, x.size(0), 0, 1, 0, data<int64_t>(sequence)};
  layout.row_elements = layout.rows ? x.numel() / layout.rows : 0;
  layout.mask_row_elements = layout.row_elements;
  check(mask.numel() == mask.size(0) * layout.row_elements, op, "mask has another number of elements");
  for (int64_t r = 0; r < layout.rows; r++)
    check(layout.mask_row[r] >= 0 && layout.mask_row[r] < mask.size(0), op, "sequence");
  return layout;
}

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

Tensor forward(const Tensor& x, bool swoosh_r, const std::optional<Tensor>& mask, const MaskLayout& layout) {
  Tensor y = new_pooled_like(x);
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

}  // namespace

Tensor swoosh_forward(const Tensor& x, bool swoosh_r, const std::optional<Tensor>& mask, int64_t shared_dim) {
  check_like(x, x, "swoosh_forward", "x");
  return forward(x, swoosh_r, mask, mask_layout(x, mask, shared_dim, "swoosh_forward"));
}

namespace {

Tensor swoosh_packed_forward(const Tensor& x, bool swoosh_r, const Tensor& mask, const Tensor& sequence) {
  return forward(x, swoosh_r, mask, packed_layout(x, mask, sequence, "swoosh_packed_forward"));
}

void backward_into(const Tensor& grad, const Tensor& x, bool swoosh_r, const std::optional<Tensor>& mask,
                   const MaskLayout& layout, const Tensor& dx, const Tensor* y) {
  with_kernel_type(dtype_of(x), "swoosh_backward", [&]<typename T>() {
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
  const MaskLayout layout = mask_layout(x, mask, shared_dim, "swoosh_backward");
  backward_into(grad, x, swoosh_r, mask, layout, dx, need_output ? &y : nullptr);
  return {dx, y};
}

std::tuple<Tensor, Tensor> swoosh_packed_backward(const Tensor& grad, const Tensor& x, bool swoosh_r,
                                                  const Tensor& mask, const Tensor& sequence) {
  const MaskLayout layout = packed_layout(x, mask, sequence, "swoosh_packed_backward");
  check_same_size(grad, x, "swoosh_packed_backward", "grad");
  Tensor dx = new_pooled_like(x), y = new_pooled_like(x);
  backward_into(grad, x, swoosh_r, mask, layout, dx, &y);
  return {dx, y};
}

}  // namespace

FASTASR_OPERATORS(
    {"swoosh_forward(Tensor x, bool swoosh_r, Tensor? mask, int shared_dim) -> Tensor", Boxed<swoosh_forward>::call},
    {"swoosh_backward(Tensor grad, Tensor x, bool swoosh_r, Tensor? mask, int shared_dim, bool need_output) -> "
     "(Tensor, Tensor)",
     Boxed<swoosh_backward>::call})

FASTASR_UNDECLARED(
    "fastasr/models/common/packed.py calls it in a node of autograd, for plain tensors outside autocast and tracing",
    {"swoosh_packed_forward(Tensor x, bool swoosh_r, Tensor mask, Tensor sequence) -> Tensor",
     Boxed<swoosh_packed_forward>::call},
    {"swoosh_packed_backward(Tensor grad, Tensor x, bool swoosh_r, Tensor mask, Tensor sequence) -> (Tensor, Tensor)",
     Boxed<swoosh_packed_backward>::call})

}  // namespace fastasr::bindings::swoosh
