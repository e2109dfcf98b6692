// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// The steps around the two products of fastasr/ops/nonlin_attention.py. Rows are those of (frames, batch), frame first;
// s, v and z are the thirds of a row of p, `stride` apart; o and dx are (batch, frames, width).
namespace fastasr::cpu {

struct NonlinAttentionRows {
  int64_t batch, frames, width, stride;
  // Returns where row r of (frames, batch) lies in (batch, frames).
  FASTASR_MEMBER int64_t batch_major(int64_t r) const { return (r % batch * frames + r / batch) * width; }
};

// Each function works on the rows [begin, end); all pointers are at row 0.
template <typename T>
struct NonlinAttentionKernels {
  // x = v tanh(s)
  void (*gate)(const T* p, T* x, const NonlinAttentionRows& rows, int64_t begin, int64_t end);
  // y = o z
  void (*product)(const T* p, const T* o, T* y, const NonlinAttentionRows& rows, int64_t begin, int64_t end);
  // u = grad z, and x again
  void (*operands)(const T* grad, const T* p, T* x, T* u, const NonlinAttentionRows& rows, int64_t begin, int64_t end);
  // dp = (dx v (1 - tanh(s)^2), dx tanh(s), grad o), dense
  void (*gradient)(const T* dx, const T* grad, const T* p, const T* o, T* dp, const NonlinAttentionRows& rows,
                   int64_t begin, int64_t end);
};

}  // namespace fastasr::cpu
