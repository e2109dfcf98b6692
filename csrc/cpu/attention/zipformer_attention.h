// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/attention/zipformer_attention_weights.h"

// Values weighted by attention with relative positions, without the weights:
//   y[i] = sum_j softmax_j(s[i,j]) v[j], s as in zipformer_attention_weights.h, masked scores -1000.
// In the forward pass blocks of queries meet blocks of keys; each row keeps the largest score so far, the sum of
// exponentials and the weighted sum, which are rescaled when the largest score grows. In the backward pass strips of a
// few queries meet all keys; the strip's weights and their gradient stay in the second cache, so that nothing but the
// inputs is needed of the forward pass:
//   dV = W^T G, dW = G V^T, and from dW as there.
// Equal weights, 1 / n on the n keys of a row whose weight is not 0, are constants: dW is 0.
// Memory is O(keys): packed operands and the parts of dk, dV and dR.
namespace fastasr::cpu {

// This many queries share each read of keys and values.
inline constexpr int64_t kAttentionQueries = 64;

struct ValueShape {
  int64_t heads;  // the first of the problem's heads
  int64_t dim;    // channels of each
  bool equal = false;
  int64_t padded_dim() const;
};

int64_t attention_values_size(const AttentionProblem& a, const ValueShape& v);     // packed, per head and sequence
int64_t attention_values_scratch(const AttentionProblem& a, const ValueShape& v);  // per thread
int64_t attention_values_transposed_size(const AttentionProblem& a, const ValueShape& v);   // packed for backward
int64_t attention_values_backward_scratch(const AttentionProblem& a, const ValueShape& v);  // per thread

// Each function works on one head and sequence, pair = h * batch + b.
template <typename T>
struct ZipformerAttentionKernels {
  static constexpr bool kCompiledOnce = true;
  using C = compute_t<T>;
  // Packs values (keys, batch, heads * dim) of one head and sequence as rows of padded_dim().
  void (*pack_values)(const AttentionProblem& a, const ValueShape& v, const T* values, int64_t pair, C* packed);
  // Computes rows [begin, end) of y (frames, batch, heads * dim); end - begin <= kAttentionQueries, begin is a multiple
  // of it.
  void (*forward)(const AttentionProblem& a, const ValueShape& v, const KeyRange* ranges, const T* x,
                  const C* keys_transposed, const C* positions, const C* packed_values, int64_t pair, int64_t begin,
                  int64_t end, T* y, C* scratch);
  // Packs values (keys, batch, heads * dim) of one head and sequence, channels by keys.
  void (*transpose_values)(const AttentionProblem& a, const ValueShape& v, const T* values, int64_t pair,
                           C* transposed);
  // Computes dx of the queries' and positions' channels at rows [begin, end), begin a multiple of attention_rows(); dk
  // (padded_keys, padded_dim), drt (positions_size) and dv (padded_keys, v.padded_dim) hold these rows' share.
  void (*backward)(const AttentionProblem& a, const ValueShape& v, const KeyRange* ranges, const T* grad, const T* x,
                   const C* keys_transposed, const C* key_rows, const C* positions, const C* values_transposed,
                   int64_t pair, int64_t begin, int64_t end, T* dx, C* dk, C* drt, C* dv, C* scratch);
  // Adds the parts of dv and writes the sum to dvalue (keys, batch, heads * dim).
  void (*store_values)(const AttentionProblem& a, const ValueShape& v, const C* dv, int64_t parts, int64_t pair,
                       T* dvalue);
};

}  // namespace fastasr::cpu
