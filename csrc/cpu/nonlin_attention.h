// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/number.h"

// What surrounds the two products of fastasr/ops/nonlin_attention.py. Rows are those of (frames, batch), frame first;
// s, v and z are the thirds of a row of p, `stride` apart; o and dx are (batch, frames, width).
namespace fastasr::cpu {

struct NonlinAttentionRows {
  int64_t batch, frames, width, stride;
  // Where row r of (frames, batch) lies in (batch, frames).
  int64_t batch_major(int64_t r) const { return (r % batch * frames + r / batch) * width; }
};

// x = v tanh(s); y = o z; u = grad z, and x again; dp = (dx v (1 - tanh(s)^2), dx tanh(s), grad o), dense. Rows [begin,
// end), all pointers at row 0.
#define FASTASR_DECLARE(T)                                                                                    \
  void nonlin_attention_gate(const T* p, T* x, const NonlinAttentionRows& rows, int64_t begin, int64_t end);  \
  void nonlin_attention_product(const T* p, const T* o, T* y, const NonlinAttentionRows& rows, int64_t begin, \
                                int64_t end);                                                                 \
  void nonlin_attention_operands(const T* grad, const T* p, T* x, T* u, const NonlinAttentionRows& rows,      \
                                 int64_t begin, int64_t end);                                                 \
  void nonlin_attention_gradient(const T* dx, const T* grad, const T* p, const T* o, T* dp,                   \
                                 const NonlinAttentionRows& rows, int64_t begin, int64_t end);
FASTASR_DECLARE(float)
FASTASR_DECLARE(double)
FASTASR_DECLARE(bfloat16)
FASTASR_DECLARE(float16)
#undef FASTASR_DECLARE

}  // namespace fastasr::cpu
