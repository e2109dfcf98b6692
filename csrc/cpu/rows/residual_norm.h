// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/rows/row_statistics.h"
#include "cpu/simd/kernels.h"

// A residual, gated or not, and LayerNorm over the last dimension:
//   y = LN(t), t = x + sigmoid(update) (a - x), a = act(candidate + hidden) mask; plain (candidate null): t = x +
//   update.
// Backward, with d = weight grad, n = (t - mean) / sigma: dt = (d - mean(d) - n mean(d n)) / sigma, and
//   dx = dt (1 - s), dupdate = dt (a - x) s (1 - s), dsum = dt s mask act'; plain: dx is dt, the gradient of both.
namespace fastasr::cpu {

// Rows are `stride` elements apart, their elements next to each other. A null pointer stands for an absent operand.
template <typename T>
struct Rows {
  const T* data = nullptr;
  int64_t stride = 0;
};

template <typename T>
struct ResidualNorm {
  Rows<T> x, update, candidate, hidden;
  const compute_t<T>* mask;  // contiguous, or null
  const compute_t<T>*weight, *bias;
  double eps;
  int activation;
  int64_t channels;
};

// Returns the elements of scratch that a call needs.
FASTASR_INLINE constexpr int64_t residual_norm_scratch(int64_t channels) { return 7 * channels; }

// Each call computes rows [begin, end). Outputs are contiguous. statistics, one per row of the whole, may be null: then
// the forward does not keep them and the backward computes them again. dweight, dbias (channels each, overwritten) are
// the sums over these rows: the caller adds the parts of fixed row blocks in order. dupdate and dsum are null in the
// plain form.
template <typename T>
struct ResidualNormKernels {
  void (*forward)(const ResidualNorm<T>& p, int64_t begin, int64_t end, T* y, RowStatistics<compute_t<T>>* statistics,
                  compute_t<T>* scratch);
  void (*backward)(const ResidualNorm<T>& p, const T* grad, const RowStatistics<compute_t<T>>* statistics,
                   int64_t begin, int64_t end, T* dx, T* dupdate, T* dsum, compute_t<T>* dweight, compute_t<T>* dbias,
                   compute_t<T>* scratch);
  // Copies n parameters that are stored as the rows are.
  void (*widen)(const T* from, compute_t<T>* to, int64_t n);
};

}  // namespace fastasr::cpu
