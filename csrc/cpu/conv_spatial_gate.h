// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/number.h"
#include "cpu/row_statistics.h"

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

  int64_t pad() const { return taps / 2; }
  int64_t rows() const { return batch * frames; }
  const T* gate(int64_t row) const { return x + row / frames * x_batch + row % frames * x_time + channels; }
};

// Stripes of kSpatialGateStripe channels.
constexpr int64_t kSpatialGateStripe = 32;

// statistics: rows [begin, end) of those of g, for the other passes; scratch: C elements.
// forward: tasks [begin, end) of stripes x batch; y (B, T, C) contiguous.
// backward: stripes [begin, end), each over the whole batch, so that sums need no second pass. dx (B, T, 2 C)
// contiguous: its first half is written; du: rows of C values du_row elements apart, which may lie in dx's second half;
// dweight (C, K), dbias (C).
// norm_backward: rows [begin, end) of du to dx's second half; dnorm_weight, dnorm_bias (C each, overwritten) are the
// sums over these rows.
#define FASTASR_DECLARE(T)                                                                                         \
  void conv_spatial_gate_statistics(const ConvSpatialGate<T>& p, RowStatistics<compute_t<T>>* statistics,          \
                                    int64_t begin, int64_t end, compute_t<T>* scratch);                            \
  void conv_spatial_gate_forward(const ConvSpatialGate<T>& p, const RowStatistics<compute_t<T>>* statistics, T* y, \
                                 int64_t begin, int64_t end);                                                      \
  void conv_spatial_gate_backward(const ConvSpatialGate<T>& p, const RowStatistics<compute_t<T>>* statistics,      \
                                  const T* grad, T* dx, compute_t<T>* du, int64_t du_row, compute_t<T>* dweight,   \
                                  compute_t<T>* dbias, int64_t begin, int64_t end);                                \
  void conv_spatial_gate_norm_backward(const ConvSpatialGate<T>& p, const RowStatistics<compute_t<T>>* statistics, \
                                       const compute_t<T>* du, int64_t du_row, T* dx, compute_t<T>* dnorm_weight,  \
                                       compute_t<T>* dnorm_bias, int64_t begin, int64_t end);
FASTASR_DECLARE(float)
FASTASR_DECLARE(double)
FASTASR_DECLARE(bfloat16)
FASTASR_DECLARE(float16)
#undef FASTASR_DECLARE

}  // namespace fastasr::cpu
