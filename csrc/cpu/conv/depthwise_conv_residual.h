// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// A depthwise convolution over time added to its input, batch first. x (B, T, C), 0 where masked and outside [0, T); P
// of K taps on past frames:
//   y[t] = x[t] + bias + sum_k weight[k] x[t + k - P]
// Backward: dx[t] = g[t] + sum_k weight[k] g[t - k + P], 0 where masked, dweight[k] = sum g[t] x[t + k - P], dbias =
// sum g.
namespace fastasr::cpu {

template <typename T>
struct DepthwiseConvResidual {
  const T* x;
  int64_t x_batch, x_time;           // strides; channels are contiguous
  const compute_t<T>*weight, *bias;  // (C, K), (C) or null
  const bool* mask;                  // (B, T) or null; true: padding
  int64_t batch, frames, channels, taps;
  int64_t past;  // P
};

// Work is cut into stripes of kResidualStripe channels.
constexpr int64_t kResidualStripe = 32;

template <typename T>
struct DepthwiseConvResidualKernels {
  // Computes tasks [begin, end) of stripes x batch; y (B, T, C) is contiguous.
  void (*forward)(const DepthwiseConvResidual<T>& p, T* y, int64_t begin, int64_t end);
  // Computes stripes [begin, end), each over the whole batch, so that sums need no second pass. grad and dx (B, T, C),
  // dweight (C, K) and dbias (C) are contiguous.
  void (*backward)(const DepthwiseConvResidual<T>& p, const T* grad, T* dx, compute_t<T>* dweight, compute_t<T>* dbias,
                   int64_t begin, int64_t end);
};

}  // namespace fastasr::cpu
