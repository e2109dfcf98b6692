// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/nonlin_attention.h"

#include "bindings/layer_parts.h"

namespace fastasr::bindings::nonlin_attention {
namespace {

cpu::NonlinAttentionRows checked(const Tensor& p, const char* op) {
  check(p.dim() == 3 && p.size(2) % 3 == 0, op, "projected must be (frames, batch, 3 width)");
  return {p.size(1), p.size(0), p.size(2) / 3, row_stride(p, op, "projected")};
}

Tensor make(const Tensor& like, const cpu::NonlinAttentionRows& rows, int64_t width) {
  return new_contiguous(like, {rows.frames, rows.batch, width});
}

void check_rows(const Tensor& t, const Tensor& p, bool batch_major, const char* op, const char* name) {
  check_like(t, p, op, name);
  check(t.dim() == 3 && t.size(0) == p.size(batch_major ? 1 : 0) && t.size(1) == p.size(batch_major ? 0 : 1) &&
            t.size(2) == p.size(2) / 3,
        op, name, " has another shape");
}

template <typename F>
void over_rows(const cpu::NonlinAttentionRows& rows, F f) {
  parallel_tasks(rows.batch * rows.frames, rows.width, f);
}

}  // namespace

Tensor nonlin_attention_gate(const Tensor& p) {
  const auto rows = checked(p, "nonlin_attention_gate");
  Tensor x = make(p, rows, rows.width);
  with_kernels<cpu::NonlinAttentionKernels>(p, "nonlin_attention_gate", [&]<typename T>(const auto& kernel) {
    const T* pp = data<T>(p);
    T* xp = mutable_data<T>(x);
    over_rows(rows, [&](int64_t b, int64_t e) { kernel.gate(pp, xp, rows, b, e); });
  });
  return x;
}

Tensor nonlin_attention_product(const Tensor& p, const Tensor& o) {
  const auto rows = checked(p, "nonlin_attention_product");
  check_rows(o, p, true, "nonlin_attention_product", "o");
  Tensor y = make(p, rows, rows.width);
  with_kernels<cpu::NonlinAttentionKernels>(p, "nonlin_attention_product", [&]<typename T>(const auto& kernel) {
    const T *pp = data<T>(p), *op = data<T>(o);
    T* yp = mutable_data<T>(y);
    over_rows(rows, [&](int64_t b, int64_t e) { kernel.product(pp, op, yp, rows, b, e); });
  });
  return y;
}

namespace {

std::tuple<Tensor, Tensor> nonlin_attention_operands(const Tensor& grad, const Tensor& p) {
  const auto rows = checked(p, "nonlin_attention_operands");
  check_rows(grad, p, false, "nonlin_attention_operands", "grad");
  Tensor x = new_like(grad), u = new_like(grad);
  with_kernels<cpu::NonlinAttentionKernels>(p, "nonlin_attention_operands", [&]<typename T>(const auto& kernel) {
    const T *gp = data<T>(grad), *pp = data<T>(p);
    T *xp = mutable_data<T>(x), *up = mutable_data<T>(u);
    over_rows(rows, [&](int64_t b, int64_t e) { kernel.operands(gp, pp, xp, up, rows, b, e); });
  });
  return {x, u};
}

Tensor nonlin_attention_gradient(const Tensor& dx, const Tensor& grad, const Tensor& p, const Tensor& o) {
  const auto rows = checked(p, "nonlin_attention_gradient");
  check_rows(dx, p, true, "nonlin_attention_gradient", "dx");
  check_rows(grad, p, false, "nonlin_attention_gradient", "grad");
  check_rows(o, p, true, "nonlin_attention_gradient", "o");
  Tensor dp = make(p, rows, 3 * rows.width);
  with_kernels<cpu::NonlinAttentionKernels>(p, "nonlin_attention_gradient", [&]<typename T>(const auto& kernel) {
    const T *dxp = data<T>(dx), *gp = data<T>(grad), *pp = data<T>(p), *op = data<T>(o);
    T* dpp = mutable_data<T>(dp);
    over_rows(rows, [&](int64_t b, int64_t e) { kernel.gradient(dxp, gp, pp, op, dpp, rows, b, e); });
  });
  return dp;
}

}  // namespace

FASTASR_OPERATORS(FASTASR_TYPED(nonlin_attention_gate), FASTASR_TYPED(nonlin_attention_product),
                  FASTASR_TYPED(nonlin_attention_operands), FASTASR_TYPED(nonlin_attention_gradient))

}  // namespace fastasr::bindings::nonlin_attention
