// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/zipformer_attention_weights.h"

// Values weighted by attention with relative positions, without the weights:
//   y[i] = sum_j softmax_j(s[i,j]) v[j], s as in zipformer_attention_weights.h, masked scores -1000.
// Forward: blocks of queries meet blocks of keys; per row stand the largest score so far, the sum of exponentials and
// the weighted sum, rescaled when the largest score grows. Backward: strips of a few queries meet all keys; the strip's
// weights and their gradient stay in the second cache, so that nothing but the inputs is needed of the forward pass:
//   dV = W^T G, dW = G V^T, and from dW as there.
// Memory: O(keys) for packed operands and for the parts of dk, dV and dR.
namespace fastasr::cpu {

// Queries that share what is read of keys and values.
inline constexpr int64_t kAttentionQueries = 64;

struct ValueShape {
  int64_t heads;  // the first of the problem's heads
  int64_t dim;    // channels of each
  int64_t padded_dim() const;
};

int64_t attention_values_size(const AttentionProblem& a, const ValueShape& v);     // packed, per head and sequence
int64_t attention_values_scratch(const AttentionProblem& a, const ValueShape& v);  // per thread
int64_t attention_values_transposed_size(const AttentionProblem& a, const ValueShape& v);   // packed for backward
int64_t attention_values_backward_scratch(const AttentionProblem& a, const ValueShape& v);  // per thread

// f for one head and sequence, hb = h * batch + b.
#define FASTASR_DECLARE(T)                                                                                            \
  /* values (keys, batch, heads * dim) of one head and sequence as rows of padded_dim() */                            \
  void attention_pack_values(const AttentionProblem& a, const ValueShape& v, const T* values, int64_t hb,             \
                             compute_t<T>* packed);                                                                   \
  /* rows [begin, end) of y (frames, batch, heads * dim); end - begin <= kAttentionQueries, begin a multiple of it */ \
  void attention_forward(const AttentionProblem& a, const ValueShape& v, const KeyRange* ranges, const T* x,          \
                         const compute_t<T>* keys_transposed, const compute_t<T>* positions,                          \
                         const compute_t<T>* packed_values, int64_t hb, int64_t begin, int64_t end, T* y,             \
                         compute_t<T>* scratch);                                                                      \
  /* values (keys, batch, heads * dim) of one head and sequence, channels by keys */                                  \
  void attention_transpose_values(const AttentionProblem& a, const ValueShape& v, const T* values, int64_t hb,        \
                                  compute_t<T>* transposed);                                                          \
  /* dx of the queries' and positions' channels at rows [begin, end), begin a multiple of attention_rows(); dk        \
     (padded_keys, padded_dim), drt (positions_size) and dv (padded_keys, v.padded_dim) of these rows alone */        \
  void attention_backward(const AttentionProblem& a, const ValueShape& v, const KeyRange* ranges, const T* grad,      \
                          const T* x, const compute_t<T>* keys_transposed, const compute_t<T>* key_rows,              \
                          const compute_t<T>* positions, const compute_t<T>* values_transposed, int64_t hb,           \
                          int64_t begin, int64_t end, T* dx, compute_t<T>* dk, compute_t<T>* drt, compute_t<T>* dv,   \
                          compute_t<T>* scratch);                                                                     \
  /* adds the parts of dv and writes them to dvalue (keys, batch, heads * dim) */                                     \
  void attention_store_values(const AttentionProblem& a, const ValueShape& v, const compute_t<T>* dv, int64_t parts,  \
                              int64_t hb, T* dvalue);
FASTASR_DECLARE(float)
FASTASR_DECLARE(double)
FASTASR_DECLARE(bfloat16)
FASTASR_DECLARE(float16)
#undef FASTASR_DECLARE

}  // namespace fastasr::cpu
