// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/attention/weights_dropout.h"
#include "cpu/attention/zipformer_attention_weights.h"

// Attention with relative positions of Transformer-XL, without the weights: see fastasr/ops/rel_attention.py. It shares
// strips of a few queries, masks, tiles and the softmax with Zipformer's attention; here positions have as many
// channels as keys. Scores of a strip by offset are one product of its queries with consecutive rows of R, the band:
// row m of it is the strip's row m, m columns further left, and is shifted when it is added to the scores by key.
// Backward, the band of dS is dS itself, read with rows one element further apart. In the forward pass blocks of
// queries meet blocks of keys, as in zipformer_attention.h; keys outside the context of a whole strip are left out. In
// the backward pass a block of queries keeps its weights and their gradient, for all keys that one of them may see, in
// the second cache; the products then have the block's depth. Memory is O(keys): packed operands, weights of one block
// of queries and sums of dR. Keys outside R's span have its first or last row: their scores of positions are one number
// per query and side, and so are their sums of dS; only keys that the span meets form products with rows. A bias by
// offset is one more row of the packed positions, times the query's gate; a bias by key is one more row of the packed
// keys.
namespace fastasr::cpu {

inline constexpr int64_t kRelAttentionQueries = 64;  // A forward call takes at most this many queries.

// A query sees the keys from `left` frames before its chunk of `chunk` frames to `right` frames behind it. A negative
// side has no limit.
struct Context {
  int64_t left = -1, right = -1, chunk = 1;
};

// R has a row for each key from `left` frames before the query to `right` behind it; keys beyond have the nearest row.
// `first` rows of the tensor come before these.
struct PositionSpan {
  int64_t left, right, first = 0;
  int64_t rows() const { return left + right + 1; }
};

// A call, or a part of it: a sequence, or a recording among the frames of one. Kernels get a part, unless they say
// otherwise, with the operands of the whole call.
struct RelAttention {
  // pos_dim = query_dim, no chunks; `left` keys stand before the first query; pos_batch is not read
  AttentionProblem problem;
  int64_t all_frames, all_keys;     // of a sequence of the call
  int64_t sequence = 0, first = 0;  // of a part: its sequence, and its first frame and key there
  KeyRange range{};                 // of a part
  int64_t value_dim;
  WeightsDropout dropout;
  Context context;
  int64_t pos_heads = 0;  // 1 or heads; 0: no R
  PositionSpan span{};    // of the call: a part may have fewer keys
  bool has_offset_bias = false;
  int64_t key_bias_batch = 0, key_bias_heads = 0;  // each 1 or that of the problem; 0: none
  double soft_cap = 0;                             // 0: none

  // Elements of the compute type.
  int64_t key_rows() const { return problem.padded_keys(); }
  int64_t dim() const;                    // padded
  int64_t values() const;                 // padded
  int64_t keys_transposed_size() const {  // per head
    return (problem.query_dim + (key_bias_heads > 0)) * key_rows();
  }
  int64_t values_size() const { return values() * key_rows(); }                // per head
  int64_t key_sums_size() const { return key_bias_heads > 0 ? all_keys : 0; }  // per head and sequence
  int64_t position_channels() const { return pos_heads ? problem.query_dim : 0; }
  int64_t positions() const;  // padded rows of R
  // R and the bias by offset are packed once for each table: that of a head, or of all.
  int64_t tables() const { return has_offset_bias ? problem.heads : pos_heads; }
  int64_t table_of(int64_t head) const { return tables() == 1 ? 0 : head; }
  int64_t positions_transposed_size() const {  // per table
    return position_channels() * positions() + has_offset_bias * problem.padded_offsets();
  }
  int64_t positions_size() const { return pos_heads ? dim() * positions() : 0; }           // per table, or head's sums
  int64_t biases_size() const { return 4 * problem.query_dim; }                            // per head
  int64_t offsets_size() const { return has_offset_bias ? problem.padded_offsets() : 0; }  // per head
  int64_t forward_scratch() const;                                                         // per thread
  int64_t few_queries_scratch() const;                                                     // per thread
  int64_t backward_scratch() const;                                                        // per thread

  // Says whether rel_attention_few_queries serves the forward pass in float32.
  bool has_few_queries() const;

  // Returns the part of a call with these frames. With fewer than all there is no cache, and keys are those of the
  // part.
  RelAttention part(int64_t sequence, int64_t first, int64_t frames) const;
};

// The operands, contiguous: (batch, frames or keys, heads, dim or value_dim), (offsets, heads, dim), (heads, dim),
// (offsets, heads), (batch, frames, heads), (batch or 1, heads or 1, keys). All but the first three may be null.
template <typename T>
struct RelAttentionOperands {
  const T *q, *k, *v, *pos, *bias_u, *bias_v, *offset_bias = nullptr, *offset_gate = nullptr, *key_bias = nullptr;
};

// The sums over one head's sequences: dR in rows (positions, dim), du, dw and what keys beyond the span add to dR's
// first and last row, the offset bias's gradient, and, of one sequence, the key bias's.
template <typename C>
struct RelAttentionSums {
  C* positions;
  double* biases;   // (4, query_dim)
  double* offsets;  // (padded_offsets)
  double* keys;     // (all_keys)
};

// The gradients of the operands; those of absent ones may be null.
template <typename T>
struct RelAttentionGradients {
  T *q, *k, *v, *pos, *bias_u, *bias_v, *offset_bias, *offset_gate, *key_bias;
};

template <typename T>
struct RelAttentionKernels {
  static constexpr bool kCompiledOnce = true;
  using C = compute_t<T>;
  using Operands = RelAttentionOperands<T>;
  void (*pack_keys)(const RelAttention& r, const Operands& t, int64_t head, C* keys_transposed, C* values);
  // Packs R of one table of a call by channel, with the offset bias behind it, and, when `rows` is not null, R by row.
  void (*pack_positions)(const RelAttention& r, const Operands& t, int64_t table, C* transposed, C* rows);
  // Computes rows [begin, end) of y (batch, frames, heads, value_dim) and lse (batch, heads, frames); begin is a
  // multiple of kRelAttentionQueries, end - begin at most that.
  void (*forward)(const RelAttention& r, const Operands& t, const C* keys_transposed, const C* values,
                  const C* positions_transposed, int64_t head, int64_t begin, int64_t end, T* y, C* lse, C* scratch);
  // Computes the gradients of q, k, v and the gate of one head, and adds to the sums.
  void (*backward)(const RelAttention& r, const T* grad, const Operands& t, const C* positions_transposed,
                   const C* positions, int64_t head, const RelAttentionGradients<T>& gradients,
                   const RelAttentionSums<C>& sums, C* scratch);
  // Computes the other gradients of one head of a call: `parts` sums, added in their order and in double. That of an R
  // which the heads share is computed with head 0, whose sums the others' follow.
  void (*store_sums)(const RelAttention& r, const RelAttentionSums<C>& sums, int64_t parts, int64_t head,
                     const RelAttentionGradients<T>& gradients);
  // Computes the key bias's gradient of a call from the sums of every head and sequence, (heads, batch, keys).
  void (*store_key_bias)(const RelAttention& r, const double* sums, T* gradient);
};

// Computes y and lse of one head of a stream's chunk, without packed operands.
void rel_attention_few_queries(const RelAttention& r, const RelAttentionOperands<float>& t, int64_t head, float* y,
                               float* lse, float* scratch);

}  // namespace fastasr::cpu
