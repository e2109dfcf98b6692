// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/number.h"

// A depthwise convolution over time added to its input, batch first. x (B, T, C); K odd, P = K / 2, x 0 outside [0, T):
//   y[t] = x[t] + bias + sum_k weight[k] x[t + k - P]
// Backward: dx[t] = g[t] + sum_k weight[k] g[t - k + P], dweight[k] = sum g[t] x[t + k - P], dbias = sum g.
namespace fastasr::cpu {

template <typename T>
struct DepthwiseConvResidual {
  const T* x;
  int64_t x_batch, x_time;           // strides; channels are contiguous
  const compute_t<T>*weight, *bias;  // (C, K), (C) or null
  int64_t batch, frames, channels, taps;

  int64_t pad() const { return taps / 2; }
};

// Stripes of kResidualStripe channels.
constexpr int64_t kResidualStripe = 32;

// forward: tasks [begin, end) of stripes x batch; y (B, T, C) contiguous.
// backward: stripes [begin, end), each over the whole batch, so that sums need no second pass. grad and dx (B, T, C)
// contiguous, dweight (C, K), dbias (C).
#define FASTASR_DECLARE(T)                                                                                   \
  void depthwise_conv_residual_forward(const DepthwiseConvResidual<T>& p, T* y, int64_t begin, int64_t end); \
  void depthwise_conv_residual_backward(const DepthwiseConvResidual<T>& p, const T* grad, T* dx,             \
                                        compute_t<T>* dweight, compute_t<T>* dbias, int64_t begin, int64_t end);
FASTASR_DECLARE(float)
FASTASR_DECLARE(double)
FASTASR_DECLARE(bfloat16)
FASTASR_DECLARE(float16)
#undef FASTASR_DECLARE

}  // namespace fastasr::cpu
