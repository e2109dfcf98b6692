// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// The activation of BatchNorm over the rows that are not hidden:
//   y = act(z), z = n weight + bias, n = (x - mean) / sqrt(var + eps), mean and var per channel over N rows.
// Backward, with q = grad act'(z): dweight = sum over rows of q n, dbias = sum over rows of q,
// dx = weight / sqrt(var + eps) (q - (dbias + n dweight) / N). y and dx are 0 at hidden rows.
namespace fastasr::cpu {

// Sums over blocks of rows: `seen` of a block are not hidden, and s1 and s2 are the sums of x - shift and of its square
// over these. The shift is near their mean, so that nothing cancels.
template <typename T>
struct ChannelSums {
  const compute_t<T>* shift;  // (blocks, channels); what blocks without a row hold is not read
  const double *s1, *s2;      // likewise
  const int64_t* seen;
  int64_t blocks, channels;
};

// Four numbers per channel: x - mean is (x - high) - low, which is exact to double; scale is 1 / sqrt(var + eps); share
// is 1 / N, or 0 if all rows are hidden.
template <typename C>
struct ChannelStatistics {
  C *high, *low, *scale, *share;
};

template <typename T>
struct BatchNormActivation {
  const T* x;
  const bool* hidden;  // per row, or null
  const compute_t<T>*weight, *bias;
  ChannelStatistics<const compute_t<T>> of;
  int activation;
  int64_t channels;
};

// Returns the elements of scratch that a call needs.
FASTASR_INLINE constexpr int64_t batch_norm_activation_scratch(int64_t channels) { return 2 * channels; }

// All tensors are contiguous. Each call computes channels, or rows, [begin, end).
template <typename T>
struct BatchNormActivationKernels {
  // Adds up the blocks in order. variance is the unbiased one.
  void (*combine)(const ChannelSums<T>& sums, double eps, int64_t begin, int64_t end,
                  const ChannelStatistics<compute_t<T>>& of, compute_t<T>* mean, compute_t<T>* variance);
  void (*forward)(const BatchNormActivation<T>& p, int64_t begin, int64_t end, T* y, compute_t<T>* scratch);
  // dweight and dbias (channels each, overwritten) are the sums over these rows: the caller adds the parts of fixed row
  // blocks in order. Where T is the compute type, q is left in dx, for `backward`.
  void (*sums)(const BatchNormActivation<T>& p, const T* grad, int64_t begin, int64_t end, T* dx, compute_t<T>* dweight,
               compute_t<T>* dbias, compute_t<T>* scratch);
  void (*backward)(const BatchNormActivation<T>& p, const T* grad, const compute_t<T>* dweight,
                   const compute_t<T>* dbias, int64_t begin, int64_t end, T* dx, compute_t<T>* scratch);
};

}  // namespace fastasr::cpu
