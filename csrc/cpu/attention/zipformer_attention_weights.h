// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// Attention weights with relative positions, materialised:
//   s[h,b,i,j] = q[i] . k[j] + p[i] . R[T-1-i+j], masked scores -1000, W = softmax_j(s),
// for T queries and left + T keys; the first `left` keys come from a cache. A key is masked outside the chunk window,
// by padding or by the mask. Backward, with delta = sum_j W dW: dS = W (dW - delta), 0 where masked, plus the penalty
// on large scores; then dq = dS k, dk = dS^T q, dp[i] = sum_j dS R[T-1-i+j], dR[r] = sum of p over the diagonal r =
// T-1-i+j. With recordings in a row there is no cache; a query has weight on its own recording's keys alone, and R has
// 2 L - 1 rows, L in place of T, for keys less than L frames away. Queries see no others.
//
// Queries are processed in strips of `attention_rows()` rows. A strip has all its scores in the cache before the
// softmax, so there is no online maximum.
namespace fastasr::cpu {

inline constexpr int64_t kAttentionStep = 8;  // a multiple of every strip's rows

// The keys [begin, end) of the recording to which a frame belongs; begin is end for a frame that belongs to none.
struct Recording {
  int64_t begin, end;
};

struct AttentionProblem {
  int64_t frames, batch, heads, query_dim, pos_dim, left;
  int64_t pos_batch;           // 1 or batch; 0: no position scores
  int64_t chunk, left_chunks;  // window in chunks; chunk <= 0: none; left_chunks < 0: all
  const uint8_t* padding;      // (batch, keys), nonzero: masked; may be null
  const uint8_t* mask;         // (frames, keys), or (batch, frames, keys) when mask_per_sequence; may be null
  bool mask_per_sequence;
  int64_t mask_keys = 0;        // of a row of the mask; 0: keys()
  double penalty, limit;        // dS += penalty sign(s) where |s| > limit, before masking
  const Recording* recordings;  // (frames), or null; chunks count from a recording's first frame
  int64_t rows;                 // of R, with recordings

  int64_t keys() const { return left + frames; }
  int64_t width() const { return heads * (2 * query_dim + pos_dim); }
  int64_t offsets() const { return recordings ? rows : frames > 0 ? 2 * frames - 1 + left : 0; }  // rows of R
  int64_t center() const { return recordings ? rows / 2 : frames - 1; }  // the row of R of the first query and key
  // Packed sizes, in elements of the compute type.
  int64_t padded_keys() const;
  int64_t padded_offsets() const;
  int64_t padded_dim() const;
  int64_t padded_pos_dim() const;
  int64_t keys_transposed_size() const { return query_dim * padded_keys(); }      // per head and sequence
  int64_t key_rows_size() const { return padded_keys() * padded_dim(); }          // per head and sequence
  int64_t positions_size() const { return padded_pos_dim() * padded_offsets(); }  // per head and sequence of R
  int64_t forward_scratch() const;                                                // per thread
  int64_t backward_scratch() const;                                               // per thread
};

// Holds, of each sequence, the first and one past the last key that is not padding, and the first that is (or -1).
struct KeyRange {
  int64_t begin, end, masked;
};

int64_t attention_rows(bool wide);  // rows of a strip; wide: double

// Each function works on one head and sequence, pair = h * batch + b, and overwrites its outputs.
template <typename T>
struct AttentionWeightsKernels {
  static constexpr bool kCompiledOnce = true;
  using C = compute_t<T>;
  void (*pack_keys)(const AttentionProblem& a, const T* x, const T* cached, int64_t pair, C* transposed, C* rows);
  void (*pack_positions)(const AttentionProblem& a, const T* pos, int64_t head, int64_t sequence, C* packed);
  // Computes rows [begin, end) of W; begin is a multiple of attention_rows(). W's rows are `stride` apart.
  void (*forward)(const AttentionProblem& a, const KeyRange* ranges, const T* x, const C* keys_transposed,
                  const C* positions, int64_t pair, int64_t begin, int64_t end, T* weights, int64_t stride, C* scratch);
  // Computes dx of the queries' and positions' channels at rows [begin, end); dk (padded_keys, padded_dim) and drt
  // (positions_size) hold these rows' share.
  void (*backward)(const AttentionProblem& a, const KeyRange* ranges, const T* x, const T* weights,
                   int64_t weights_stride, const T* grad, int64_t grad_stride, const C* keys_transposed,
                   const C* key_rows, const C* positions, int64_t pair, int64_t begin, int64_t end, T* dx, C* dk,
                   C* drt, C* scratch);
  // Adds the parts of dk and writes the sum to dx and dcached.
  void (*store_keys)(const AttentionProblem& a, const C* dk, int64_t parts, int64_t pair, T* dx, T* dcached);
  // Adds the parts of drt, over the batch too when R is shared, in a fixed order and in double.
  void (*store_positions)(const AttentionProblem& a, const C* drt, int64_t parts, int64_t head, int64_t sequence,
                          T* dpos);
};

void attention_key_ranges(const AttentionProblem& a, KeyRange* ranges);

}  // namespace fastasr::cpu
