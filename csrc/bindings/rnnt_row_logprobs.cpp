// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/rnnt_joiner.h"

#include <array>

#include "bindings/dispatch.h"

namespace fastasr::bindings::rnnt_row_logprobs {
namespace {

using Three = std::array<int64_t, 3>;

// Finds elements of a tensor (A, B, C), or rows of one of (A, B, C, V), by its strides: slices and repeated rows are
// not copied.
struct Places {
  Three strides;
  explicit Places(const Tensor& t) : strides{t.stride(0), t.stride(1), t.stride(2)} {}
  int64_t operator[](const Three& i) const { return i[0] * strides[0] + i[1] * strides[1] + i[2] * strides[2]; }
};

struct Rows {
  Three sizes;
  int64_t outputs;

  int64_t count() const { return sizes[0] * sizes[1] * sizes[2]; }
  Three index(int64_t i) const { return {i / sizes[2] / sizes[1], i / sizes[2] % sizes[1], i % sizes[2]}; }
  bool fit(const Tensor& t, ScalarType dtype) const {
    return dtype_of(t) == dtype && has_sizes(t, {sizes[0], sizes[1], sizes[2]});
  }
};

Rows checked_rows(const Tensor& logits, const Tensor& symbols, int64_t blank, const char* op) {
  check(logits.dim() == 4 && logits.size(3) >= 1 && logits.stride(3) == 1, op, "logits");
  const Rows rows{{logits.size(0), logits.size(1), logits.size(2)}, logits.size(3)};
  check(rows.fit(symbols, ScalarType::Long), op, "symbols");
  check(blank >= 0 && blank < rows.outputs, op, "blank");
  const int64_t* y = data<int64_t>(symbols);
  const Places at(symbols);
  bool right = true;
  for (int64_t i = 0; i < rows.count(); i++) {
    const int64_t symbol = y[at[rows.index(i)]];
    right = right && symbol >= 0 && symbol < rows.outputs;
  }
  check(right, op, "a symbol is out of range");
  return rows;
}

std::tuple<Tensor, Tensor, Tensor> rnnt_row_logprobs_forward(const Tensor& logits, const Tensor& symbols, int64_t blank,
                                                             bool hat) {
  const char* op = "rnnt_row_logprobs_forward";
  const Rows rows = checked_rows(logits, symbols, blank, op);
  const auto make = [&] { return new_contiguous(logits, rows.sizes, compute_type(dtype_of(logits))); };
  Tensor px = make(), py = make(), normaliser = make();
  with_kernels<cpu::JoinerKernels>(logits, op, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const Places logits_at(logits), symbols_at(symbols);
    const T* x = data<T>(logits);
    const int64_t* y = data<int64_t>(symbols);
    C *xp = mutable_data<C>(px), *yp = mutable_data<C>(py), *lp = mutable_data<C>(normaliser);
    parallel_tasks(rows.count(), rows.outputs, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const Three at = rows.index(i);
        kernel.row_scores(x + logits_at[at], rows.outputs, y[symbols_at[at]], blank, hat, xp + i, yp + i, lp + i);
      }
    });
  });
  return {px, py, normaliser};
}

// Writes dlogits to `logits` and returns a tensor without elements, or returns dlogits.
Tensor rnnt_row_logprobs_backward(const Tensor& grad_px, const Tensor& grad_py, Tensor logits, const Tensor& symbols,
                                  const Tensor& normaliser, int64_t blank, bool hat, bool in_place) {
  const char* op = "rnnt_row_logprobs_backward";
  const Rows rows = checked_rows(logits, symbols, blank, op);
  Tensor found =
      in_place ? logits : new_contiguous(logits, {rows.sizes[0], rows.sizes[1], rows.sizes[2], rows.outputs});
  with_kernels<cpu::JoinerKernels>(logits, op, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    for (const Tensor* t : {&grad_px, &grad_py, &normaliser})
      check(rows.fit(*t, kComputeType<T>), op, "gradients, normaliser");
    const Places logits_at(logits), symbols_at(symbols), gx_at(grad_px), gy_at(grad_py), normaliser_at(normaliser);
    const Places found_at(found);
    const T* x = data<T>(logits);
    const int64_t* y = data<int64_t>(symbols);
    const C *gx = data<C>(grad_px), *gy = data<C>(grad_py), *l = data<C>(normaliser);
    T* out = mutable_data<T>(found);
    parallel_tasks(rows.count(), rows.outputs, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const Three at = rows.index(i);
        kernel.row_gradient(x + logits_at[at], l[normaliser_at[at]], gx[gx_at[at]], gy[gy_at[at]], rows.outputs,
                            y[symbols_at[at]], blank, hat, out + found_at[at]);
      }
    });
  });
  return in_place ? new_without_elements(logits) : found;
}

}  // namespace

FASTASR_UNDECLARED("fastasr/rnnt/rows.py registers the operator over it, with its fake function and gradients",
                   FASTASR_TYPED(rnnt_row_logprobs_forward), FASTASR_TYPED(rnnt_row_logprobs_backward))

}  // namespace fastasr::bindings::rnnt_row_logprobs
