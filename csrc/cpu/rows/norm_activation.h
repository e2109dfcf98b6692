// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/rows/row_statistics.h"
#include "cpu/simd/kernels.h"

// The activation of a norm over the last dimension, of x between -limit and limit:
//   y = act(z), z = n weight + bias, n = (x - mean) / sqrt(var + eps); not centred: n = x / sqrt(mean of x^2 + eps).
// Backward, with q = grad act'(z) and d = q weight: dx = (d - mean(d) - n mean(d n)) / sqrt(var + eps), without mean(d)
// if not centred; it is 0 outside the limit; dweight = sum over rows of q n, dbias = sum over rows of q.
namespace fastasr::cpu {

template <typename T>
struct NormActivation {
  const T* x;
  const compute_t<T>*weight, *bias;  // bias may be null
  double eps;
  compute_t<T> limit;  // infinite if x is not limited
  bool centred;
  int activation;
  int64_t channels;
};

// Returns the elements of scratch that a call needs.
FASTASR_INLINE constexpr int64_t norm_activation_scratch(int64_t channels) { return 2 * channels; }

// Each call computes rows [begin, end). All tensors are contiguous. statistics, one per row of the whole, may be null:
// then the forward does not keep them and the backward computes them again. dweight and dbias (channels each,
// overwritten) are the sums over these rows: the caller adds the parts of fixed row blocks in order.
template <typename T>
struct NormActivationKernels {
  void (*forward)(const NormActivation<T>& p, int64_t begin, int64_t end, T* y, RowStatistics<compute_t<T>>* statistics,
                  compute_t<T>* scratch);
  void (*backward)(const NormActivation<T>& p, const T* grad, const RowStatistics<compute_t<T>>* statistics,
                   int64_t begin, int64_t end, T* dx, compute_t<T>* dweight, compute_t<T>* dbias,
                   compute_t<T>* scratch);
};

}  // namespace fastasr::cpu
