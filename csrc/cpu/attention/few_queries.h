// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// Attention of a few queries to the keys and values of one head, without positions, in float32:
//   y_i = sum_j softmax_j(scale q_i k_j + mask_ij) v_j, or 0 where the whole mask is -infinity.
// Reading keys and values is most of the cost, so both are read once, where they lie. Sums over keys run in chains of
// kFewQueriesChain, which are then added.
namespace fastasr::cpu {

inline constexpr int64_t kFewQueriesChain = 128;

// Rows are `*_row` elements apart, their elements next to each other.
struct FewQueries {
  const float* q;
  int64_t q_row;
  const float* k;
  int64_t k_row;
  const float* v;
  int64_t v_row;
  float* y;
  int64_t y_row;
  int64_t queries, keys, key_dim, value_dim;  // 1 to kFewRows queries, 1 or more keys
  float scale;
  const float* mask = nullptr;  // a row for each query, mask_row apart, or null
  int64_t mask_row = 0;
  float* weights = nullptr;  // softmax_j, a row for each query, weights_row apart, or null
  int64_t weights_row = 0;

  int64_t padded_keys() const { return (keys + 31) / 32 * 32; }
  int64_t scratch() const { return queries * (padded_keys() + value_dim); }  // floats
};

struct FewQueriesKernels {
  void (*attend)(const FewQueries& a, float* scratch);
};

}  // namespace fastasr::cpu
