// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

namespace fastasr::cpu {

// BiasNorm over the last dimension: y = x s, s = e^log_scale m^(-1/2), m = mean_j (x_j - bias_j)^2. No epsilon.
// Backward, with G = sum_j g_j x_j: dx_j = g_j s - k (x_j - b_j), k = G s / (m C); db_j = sum over rows of
// k (x_j - b_j); dlog_scale = sum over rows of G s.
template <typename T>
struct BiasNormKernels {
  // scale = e^log_scale.
  void (*forward)(const T* x, const T* bias, double scale, T* y, int64_t rows, int64_t channels);
  // dbias (C, overwritten) and *dlog_scale are the sums over these rows alone: the caller adds the parts of fixed row
  // blocks in order, so the result does not depend on the number of threads.
  void (*backward)(const T* grad, const T* x, const T* bias, double scale, T* dx, compute_t<T>* dbias,
                   double* dlog_scale, int64_t rows, int64_t channels);
};

}  // namespace fastasr::cpu
