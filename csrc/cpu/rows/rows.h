// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// The tables of the kernels that work row by row and need no types of their own.
namespace fastasr::cpu {

// Bypass: y = x_orig + (x - x_orig) scale, with scale repeated every `period` elements (C, or B*C for a scale per
// sequence). Backward: dx = g scale, dx_orig = g (1 - scale), dscale = sum over rows of g (x - x_orig).
template <typename T>
struct BypassKernels {
  void (*forward)(const T* x_orig, const T* x, const T* scale, T* y, int64_t rows, int64_t period);
  // dscale (period, overwritten) is the sum over these rows alone, see BiasNormKernels.
  void (*backward)(const T* grad, const T* x_orig, const T* x, const T* scale, T* dx_orig, T* dx, compute_t<T>* dscale,
                   int64_t rows, int64_t period);
};

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

// The step after the product of a linear layer with an activation (cpu/math/activation.h): y = act(z), and backward dz
// = grad act'(z), dbias = the sum of dz over its rows.
template <typename T>
struct LinearActivationKernels {
  // n elements; y may be z.
  void (*forward)(int activation, const T* z, T* y, int64_t n);
  // Takes rows of `channels` elements. dz may be grad; dbias is their sum in the compute type (overwritten), or null.
  void (*backward)(int activation, const T* grad, const T* z, T* dz, compute_t<T>* dbias, int64_t rows,
                   int64_t channels);
};

// Computes out[j] = sum over blocks of parts[block][j] for j in [begin, end), in block order, in double.
template <typename T>
struct SumBlocks {
  void (*run)(const compute_t<T>* parts, int64_t blocks, int64_t width, int64_t begin, int64_t end, T* out);
};

// y += x, n elements.
struct AddKernel {
  void (*run)(const float* x, float* y, int64_t n);
};

}  // namespace fastasr::cpu
