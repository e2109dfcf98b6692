// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/ema_scan_block.h"
#include "cpu/number.h"

// What surrounds a block of ema_scan: tensors of any strides and dtype to and from buffers [steps][64] of C, and the
// activation.
namespace fastasr::cpu {

enum class EmaActivation : int { identity, silu, relu, tanh, gelu };

// buffer[s][j] = p[s step + j channel] for j < channels, 0 up to lanes and where mask[s mask_step] is set.
#define FASTASR_DECLARE(T)                                                                                        \
  void ema_load(const T* p, int64_t step, int64_t channel, const uint8_t* mask, int64_t mask_step, int64_t steps, \
                int64_t channels, int64_t lanes, compute_t<T>* buffer);                                           \
  void ema_store(const compute_t<T>* buffer, T* p, int64_t step, int64_t channel, int64_t steps, int64_t channels);
FASTASR_DECLARE(float)
FASTASR_DECLARE(double)
FASTASR_DECLARE(bfloat16)
FASTASR_DECLARE(float16)
#undef FASTASR_DECLARE

#define FASTASR_DECLARE(C)                                                                                             \
  /* z = act(z + residual x) */                                                                                        \
  void ema_activate(C* z, const C* x, const C* residual, EmaActivation activation, int64_t steps, int64_t lanes);      \
  /* z = dy act'(z + residual x) */                                                                                    \
  void ema_activate_backward(C* z, const C* x, const C* residual, const C* dy, EmaActivation activation,               \
                             int64_t steps, int64_t lanes);                                                            \
  /* dx = dx where mask is not set, + residual dy */                                                                   \
  void ema_finish_gradient(C* dx, const C* dy, const C* residual, const uint8_t* mask, int64_t mask_step,              \
                           int64_t steps, int64_t lanes);                                                              \
  /* sum[j] += sum over steps of a b, for at most kEmaSteps steps */                                                   \
  void ema_add_products(const C* a, const C* b, double* sum, int64_t steps, int64_t lanes);                            \
  /* sum += part */                                                                                                    \
  void ema_fold(const C* part, double* sum, int64_t n);                                                                \
  /* Rows of the parameters (n values each) to q (as ema_log_decay takes it), b = p expansion, c = scale projection.   \
   */                                                                                                                  \
  void ema_coefficients(const C* damping, const C* decay, const C* expansion, const C* projection, double scale, C* q, \
                        C* b, C* c, int64_t n);                                                                        \
  /* From the gradients of q, b and c (double) to those of the parameters. */                                          \
  void ema_coefficients_backward(const C* damping, const C* decay, const C* expansion, double scale, const double* dq, \
                                 const double* db, const double* dc, C* ddamping, C* ddecay, C* dexpansion,            \
                                 C* dprojection, int64_t n);
FASTASR_DECLARE(float)
FASTASR_DECLARE(double)
#undef FASTASR_DECLARE

}  // namespace fastasr::cpu
