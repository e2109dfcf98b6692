// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"
#include "cpu/support/phase_barrier.h"

// LSTM with LayerNorm on the gates and on the cell, over T steps of B sequences with H units:
//   z = LN(x_t W_xᵀ + h W_hᵀ)   i, f, g, o: the quarters of z   c = LN(σ(f) c + σ(i) tanh(g))   h = σ(o) tanh(c)
// All arrays are contiguous; gates are (.., 4, H). Rows of weights are read in place, except for many sequences.
namespace fastasr::cpu {

// A unit of work has this many hidden units: results depend on it, and on the shape, never on the threads.
constexpr int64_t kLstmUnit = 64;

struct LstmSizes {
  int64_t steps, batch, hidden, inputs;
  FASTASR_MEMBER constexpr int64_t units() const { return (hidden + kLstmUnit - 1) / kLstmUnit; }
  // Says whether the forward pass packs hidden_weight first: for many sequences and rows that costs less than it saves.
  FASTASR_MEMBER constexpr bool packs() const { return batch >= 8 && steps * batch >= 128; }
  // The forward keeps these for the backward: the normalised gates (T, B, 4, H), the normalised cell (T, B, H), and 1 /
  // deviation of both (T, B, 2).
  FASTASR_MEMBER constexpr int64_t kept() const { return steps * batch * (5 * hidden + 2); }
};

template <typename C>
struct LayerNormLstm {
  LstmSizes size;
  const C* input;          // (T, B, 4, H), the product of the input; with input_weight x itself, (T, B, inputs)
  const C* input_weight;   // (4 H, inputs) or null
  const C* hidden_weight;  // (4 H, H)
  const C *gate_weight, *gate_bias;  // (4 H)
  const C *cell_weight, *cell_bias;  // (H)
  const C *hidden, *cell;            // (B, H), before the first step, or null: zeros
  double eps;
};

// The gradients that a call reads and writes. d(hidden) and d(cell) hold on entry the gradients of the last state and
// on return those of the first; dgates (T, B, 4, H) is the gradient of x W_xᵀ; the others are sums, overwritten.
template <typename C>
struct LayerNormLstmGradients {
  const C* y;  // (T, B, H), or null: zeros
  C *hidden, *cell, *gates, *gate_weight, *gate_bias, *cell_weight, *cell_bias;
  bool first_state;  // false: d(hidden) of the first state is not needed, and left as scratch
};

FASTASR_INLINE constexpr int64_t lstm_forward_scratch(const LstmSizes& s) {
  return s.batch * (4 * s.hidden + 4 * s.units()) + (s.packs() ? 4 * s.units() * kLstmUnit * s.hidden : 0);
}
FASTASR_INLINE constexpr int64_t lstm_backward_scratch(const LstmSizes& s) { return s.batch * 4 * s.units(); }

// Every thread that meets at the barrier calls this for the units [begin, end) that it owns.
template <typename C>
struct LayerNormLstmKernels {
  // y is (T, B, H), cell (B, H) the last one; kept may be null.
  void (*forward)(const LayerNormLstm<C>& p, C* y, C* cell, C* kept, C* scratch, PhaseBarrier& barrier, int64_t begin,
                  int64_t end);
  // sums holds 10 H zeros.
  void (*backward)(const LayerNormLstm<C>& p, const C* kept, const LayerNormLstmGradients<C>& grad, double* sums,
                   C* scratch, PhaseBarrier& barrier, int64_t begin, int64_t end);
};

}  // namespace fastasr::cpu
