// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/rows/row_statistics.h"
#include "cpu/simd/kernels.h"

// A residual and the norm of the sum over the last dimension:
//   u = update, or RMS(update) update_weight;  t = x + scale u, rounded;  y = norm(t) weight + bias,
// where RMS(v) = v / sqrt(mean of v^2 + eps), and norm is that or LayerNorm. Each norm reads its row between -limit and
// limit.
// Backward, with d = grad_y weight and n the normalised t: dt = grad_t + (d - mean(d) - n mean(d n)) / sigma, without
// mean(d) if not centred, and without the norm's part outside the limit; dx = dt, du = scale dt. With m the normalised
// update and e = du update_weight: dupdate = (e - m mean(e m)) / rms, 0 outside the limit, dupdate_weight = sum over
// rows of du m.
namespace fastasr::cpu {

template <typename T>
struct AddNorm {
  const T *x, *update;
  const compute_t<T>*update_weight, *weight, *bias;  // update_weight and bias may be null
  double eps;
  compute_t<T> scale, update_limit, limit;  // limits are infinite if there are none
  bool centred;
  int64_t channels;
};

// Returns the elements of scratch that a call needs.
FASTASR_INLINE constexpr int64_t add_norm_scratch(int64_t channels) { return 3 * channels; }

// Each call computes rows [begin, end). All tensors are contiguous. The backward computes t and the statistics again.
// grad_t may be null. dweight, dbias and dupdate_weight (channels each, overwritten) are the sums over these rows: the
// caller adds the parts of fixed row blocks in order.
template <typename T>
struct AddNormKernels {
  void (*forward)(const AddNorm<T>& p, int64_t begin, int64_t end, T* t, T* y, compute_t<T>* scratch);
  void (*backward)(const AddNorm<T>& p, const T* grad_t, const T* grad_y, int64_t begin, int64_t end, T* dx, T* dupdate,
                   compute_t<T>* dweight, compute_t<T>* dbias, compute_t<T>* dupdate_weight, compute_t<T>* scratch);
};

}  // namespace fastasr::cpu
