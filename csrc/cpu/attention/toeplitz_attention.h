// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/gemm/tile_gemm.h"
#include "cpu/math/number.h"
#include "cpu/support/sequence.h"

// Gated attention with a Toeplitz bias, per sequence and chunk (a "unit"), 32 queries at a time (a "block"):
//   z = act(query_key), q = (z w0 + b0) / sqrt(d), k = z w1 + b1, S_ij = q_i k_j + bias[j - i], A = softmax_j(S) M,
//   h = A v, y = h act(gate).
// Scores are held transposed, one row per key with the 32 queries as lanes: the softmax needs no sum across lanes, the
// bias of a row is a contiguous slice of the reversed vector, and A is already packed for its products. A block sees
// all its keys at once (one pass, exact maximum); keys behind its last query are skipped when causal. Backward, with g
// = dy act(gate): dA = g v^T M, dS = A (dA - sum_j A dA), dv = A^T g, dq = dS k, dk = dS^T q, dbias = diagonal sums.
namespace fastasr::cpu {

struct ToeplitzSizes {
  int64_t length, batch, d, v, reach;
  int64_t size, count;  // frames per chunk, chunks
  bool causal, activate_value;
  int activation;

  // All sizes except the keys' are padded to whole panels: frames of a chunk, blocks, panels of d and v.
  FASTASR_MEMBER int64_t rows() const { return (size + kPanel - 1) / kPanel * kPanel; }
  FASTASR_MEMBER int64_t keys() const { return (size + kTileRows - 1) / kTileRows * kTileRows; }  // in whole tiles
  FASTASR_MEMBER int64_t blocks() const { return rows() / kPanel; }
  FASTASR_MEMBER int64_t d_panels() const { return (d + kPanel - 1) / kPanel; }
  FASTASR_MEMBER int64_t v_panels() const { return (v + kPanel - 1) / kPanel; }
  FASTASR_MEMBER int64_t units() const { return batch * count; }
};

template <typename T>
struct ToeplitzAttention : ToeplitzSizes {
  using C = compute_t<T>;
  Sequence<const T> query_key, gate, value;
  const C *qk_weight, *qk_bias;  // (2, d)
  const C* position_bias;        // of distance 0; `reach` entries on either side
  const uint8_t* padding;        // (B, L), or null
  const C* dropout;              // (B, count, size, size), or null
};

// A unit's packed operands; sizes are in elements of C. Only the backward uses the second group.
template <typename C>
struct ToeplitzUnit {
  C *query_t, *key, *value, *reversed_bias;             // [block][d][32], [panel][row][32] twice, [2 rows + 32]
  C *query, *grad, *weights, *dscores, *dquery, *dkey;  // panels; weights, dscores: [block][key][32 queries]
  uint8_t* hidden;                                      // [row]: the key is not to be seen
};
template <typename T>
int64_t toeplitz_unit_elements(const ToeplitzAttention<T>& p, bool backward) {
  const int64_t rows = p.rows(), d = p.d_panels() * kPanel * rows, v = p.v_panels() * kPanel * rows;
  const int64_t common = 2 * d + v + 2 * rows + kPanel + rows / static_cast<int64_t>(sizeof(compute_t<T>));
  return common + (backward ? 3 * d + v + 2 * rows * rows : 0);
}
template <typename T>
ToeplitzUnit<compute_t<T>> toeplitz_unit(const ToeplitzAttention<T>& p, bool backward, compute_t<T>* memory) {
  const int64_t rows = p.rows(), d = p.d_panels() * kPanel * rows, v = p.v_panels() * kPanel * rows;
  const auto take = [&](int64_t n) {
    compute_t<T>* at = memory;
    memory += n;
    return at;
  };
  ToeplitzUnit<compute_t<T>> u{};
  u.query_t = take(d), u.key = take(d), u.value = take(v), u.reversed_bias = take(2 * rows + kPanel);
  if (backward) {
    u.query = take(d), u.grad = take(v), u.weights = take(rows * rows), u.dscores = take(rows * rows);
    u.dquery = take(d), u.dkey = take(d);
  }
  u.hidden = reinterpret_cast<uint8_t*>(memory);
  return u;
}

// Frames of a sequence lie far apart: their values and gates are read and written this many panels at a time.
constexpr int64_t kToeplitzPanels = 4;

// A call on one block needs this many elements of C for itself.
template <typename T>
int64_t toeplitz_scratch_elements(const ToeplitzAttention<T>& p) {
  return std::max(p.rows() + 2 * kPanel, (3 * kToeplitzPanels + 1) * kPanel) * kPanel;
}

// The backward reads and writes these beside the unit. Gradients are contiguous.
template <typename T>
struct ToeplitzGradients {
  using C = compute_t<T>;
  Sequence<const T> grad, mixed;  // of y; h
  T *dquery_key, *dgate, *dvalue;
};

template <typename T>
struct ToeplitzAttentionKernels {
  using C = compute_t<T>;
  void (*pack)(const ToeplitzAttention<T>& p, int64_t unit, bool backward, const ToeplitzUnit<C>& u, C* scratch);
  void (*pack_value)(const ToeplitzAttention<T>& p, int64_t unit, int64_t block, const ToeplitzUnit<C>& u);
  // Computes y and, when h is not null, h of one block.
  void (*forward)(const ToeplitzAttention<T>& p, int64_t unit, int64_t block, const ToeplitzUnit<C>& u, T* y, T* mixed,
                  C* scratch);
  // Computes dgate, and into u the weights, dscores, grad and dquery of one block.
  void (*backward)(const ToeplitzAttention<T>& p, const ToeplitzGradients<T>& g, int64_t unit, int64_t block,
                   const ToeplitzUnit<C>& u, C* scratch);
  // Computes dvalue, and dkey into u, of the 32 keys of a block.
  void (*backward_keys)(const ToeplitzAttention<T>& p, const ToeplitzGradients<T>& g, int64_t unit, int64_t block,
                        const ToeplitzUnit<C>& u, C* scratch);
  // Computes dquery_key and this unit's sums: dparameters (4, d) holds dweight's rows 0 and 1 and dbias's rows 0 and 1;
  // dposition (2 size - 1)
  void (*backward_parameters)(const ToeplitzAttention<T>& p, const ToeplitzGradients<T>& g, int64_t unit,
                              const ToeplitzUnit<C>& u, double* dparameters, double* dposition, C* scratch);
};

}  // namespace fastasr::cpu
