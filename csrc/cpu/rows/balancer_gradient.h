// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// The gradient of a balancer, see fastasr/ops/balancer_gradient.py. Two passes over x: the sums of x - shift and of its
// square per channel (shift near the mean, so that nothing cancels), and y = grad + |grad| (offset + slope (x -
// shift)).
namespace fastasr::cpu {

struct BalancerLimits {
  double min_mean, max_mean, min_rms, max_rms, grad_scale;
};

// *_rows: rows of `channels` elements, those of x `stride` apart; shift, offset and slope are per channel.
// *_run: n elements of one channel.
// Sums are overwritten: s1 and s2, (channels) each, or one each.
template <typename T>
struct BalancerKernels {
  void (*sums_rows)(const T* x, int64_t stride, const compute_t<T>* shift, double* s1, double* s2, int64_t rows,
                    int64_t channels);
  void (*sums_run)(const T* x, compute_t<T> shift, double* s1, double* s2, int64_t n);
  void (*apply_rows)(const T* grad, const T* x, int64_t stride, const compute_t<T>* shift, const compute_t<T>* offset,
                     const compute_t<T>* slope, T* y, int64_t rows, int64_t channels);
  void (*apply_run)(const T* grad, const T* x, compute_t<T> shift, compute_t<T> offset, compute_t<T> slope, T* y,
                    int64_t n);
};

// Returns offset and slope of one channel of `count` elements, whose sums are s1 and s2.
void balancer_coefficients(double s1, double s2, double shift, int64_t count, const BalancerLimits& limits,
                           double* offset, double* slope);

}  // namespace fastasr::cpu
