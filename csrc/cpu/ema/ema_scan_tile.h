// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/ema/ema_scan_block.h"

// The steps around a block of ema_scan: copies of tensors of any strides and dtype to and from buffers [steps][64] of
// C, and the activation.
namespace fastasr::cpu {

enum class EmaActivation : int { identity, silu, relu, tanh, gelu };

// Copies of a tensor of one dtype. With p the tensor's element `at`:
template <typename C>
struct EmaCopies {
  // buffer[s][j] = p[s step + j channel] for j < channels, 0 up to lanes and where mask[s mask_step] is set.
  void (*load)(const void* tensor, int64_t at, int64_t step, int64_t channel, const uint8_t* mask, int64_t mask_step,
               int64_t steps, int64_t channels, int64_t lanes, C* buffer);
  void (*store)(const C* buffer, void* tensor, int64_t at, int64_t step, int64_t channel, int64_t steps,
                int64_t channels);
};

// The copies of each dtype. Scans take them as an argument: they are then compiled for C alone.
template <typename T>
struct EmaTensor {
  EmaCopies<compute_t<T>> copies;
};

// Rows of a buffer are kEmaLanes apart.
template <typename C>
struct EmaTile {
  // z = act(z + residual x)
  void (*activate)(C* z, const C* x, const C* residual, EmaActivation activation, int64_t steps, int64_t lanes);
  // z = dy act'(z + residual x)
  void (*activate_backward)(C* z, const C* x, const C* residual, const C* dy, EmaActivation activation, int64_t steps,
                            int64_t lanes);
  // dx = dx where mask is not set, + residual dy
  void (*finish_gradient)(C* dx, const C* dy, const C* residual, const uint8_t* mask, int64_t mask_step, int64_t steps,
                          int64_t lanes);
  // sum[j] += sum over steps of a b, for at most kEmaSteps steps
  void (*add_products)(const C* a, const C* b, double* sum, int64_t steps, int64_t lanes);
  // sum += part
  void (*fold)(const C* part, double* sum, int64_t n);
  // Computes q (as ema_log_decay takes it), b = p expansion and c = scale projection from n values of each parameter.
  void (*coefficients)(const C* damping, const C* decay, const C* expansion, const C* projection, double scale, C* q,
                       C* b, C* c, int64_t n);
  // Computes the gradients of the parameters from those of q, b and c, which are in double.
  void (*coefficients_backward)(const C* damping, const C* decay, const C* expansion, double scale, const double* dq,
                                const double* db, const double* dc, C* ddamping, C* ddecay, C* dexpansion,
                                C* dprojection, int64_t n);
};

}  // namespace fastasr::cpu
