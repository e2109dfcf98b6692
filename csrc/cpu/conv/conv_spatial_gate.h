// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/rows/row_statistics.h"
#include "cpu/simd/kernels.h"

// The convolutional spatial gating unit, batch first. x (B, T, 2 C) = (r, g); K odd, P = K / 2:
//   n = (g - mean g) / sqrt(var g + eps)      u = n norm_weight + norm_bias, 0 where masked and outside [0, T)
//   z[t] = bias + sum_k weight[k] u[t + k - P]        y = r act(z)
// Backward: dr = dy act(z), q = dy r act'(z), du[t] = sum_k weight[k] q[t - k + P] (0 where masked), and with
// d = du norm_weight: dg = (d - mean d - n mean(d n)) / sqrt(var g + eps).
namespace fastasr::cpu {

template <typename T>
struct ConvSpatialGate {
  const T* x;
  int64_t x_batch, x_time;                     // strides; channels are contiguous
  const compute_t<T>*norm_weight, *norm_bias;  // (C)
  const compute_t<T>*weight, *bias;            // (C, K), (C) or null
  const bool* mask;                            // (B, T) or null; true: padding
  int64_t batch, frames, channels, taps;
  double eps;
  int activation;

  FASTASR_MEMBER int64_t pad() const { return taps / 2; }
  FASTASR_MEMBER int64_t rows() const { return batch * frames; }
  FASTASR_MEMBER const T* gate(int64_t row) const {
    return x + row / frames * x_batch + row % frames * x_time + channels;
  }
};

// Work is cut into stripes of kSpatialGateStripe channels.
constexpr int64_t kSpatialGateStripe = 32;

template <typename T>
struct ConvSpatialGateKernels {
  using C = compute_t<T>;
  // Computes the statistics of rows [begin, end) of g, for the other passes. scratch has C elements.
  void (*statistics)(const ConvSpatialGate<T>& p, RowStatistics<C>* statistics, int64_t begin, int64_t end, C* scratch);
  // Computes tasks [begin, end) of stripes x batch; y (B, T, C) is contiguous.
  void (*forward)(const ConvSpatialGate<T>& p, const RowStatistics<C>* statistics, T* y, int64_t begin, int64_t end);
  // Computes stripes [begin, end), each over the whole batch, so that sums need no second pass. dx (B, T, 2 C) is
  // contiguous: its first half is written. du has rows of C values du_row elements apart, which may lie in dx's second
  // half. The sums are dweight (C, K) and dbias (C).
  void (*backward)(const ConvSpatialGate<T>& p, const RowStatistics<C>* statistics, const T* grad, T* dx, C* du,
                   int64_t du_row, C* dweight, C* dbias, int64_t begin, int64_t end);
  // Turns rows [begin, end) of du into dx's second half. dnorm_weight and dnorm_bias (C each, overwritten) are the sums
  // over these rows.
  void (*norm_backward)(const ConvSpatialGate<T>& p, const RowStatistics<C>* statistics, const C* du, int64_t du_row,
                        T* dx, C* dnorm_weight, C* dnorm_bias, int64_t begin, int64_t end);
};

}  // namespace fastasr::cpu
