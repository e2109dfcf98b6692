// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/gemm/tile_gemm.h"

// The backward of a softmax over keys, for the first kLanes queries of a panel: element (j, l) is key j, query l.
namespace fastasr::cpu {
inline namespace FASTASR_SIMD {

// Computes dS = P (dP - D), D = sum_j P dP, in place of dP. `keys` is a multiple of kTileRows; a query without keys has
// P = 0. D is divided by the sum of P as it was rounded, and subtracted in two parts: the columns of dS then add up to
// zero as nearly as their elements allow, which later sums over keys rely on.
template <int64_t kLanes, typename C>
FASTASR_INLINE void softmax_backward(int64_t keys, const C* __restrict p, C* __restrict ds) {
  alignas(64) double sum[kLanes] = {}, one[kLanes] = {};
  alignas(64) C high[kLanes], low[kLanes];
  for (int64_t j0 = 0; j0 < keys; j0 += kTileRows) {
    alignas(64) C part[kLanes] = {}, weight[kLanes] = {};
    for (int64_t j = j0; j < j0 + kTileRows; j++) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes; l++) {
        part[l] += p[j * kPanel + l] * ds[j * kPanel + l];
        weight[l] += p[j * kPanel + l];
      }
    }
#pragma omp simd
    for (int64_t l = 0; l < kLanes; l++) {
      sum[l] += static_cast<double>(part[l]);
      one[l] += static_cast<double>(weight[l]);
    }
  }
  for (int64_t l = 0; l < kLanes; l++) {
    const double along = one[l] == 0 ? 0 : sum[l] / one[l];
    high[l] = static_cast<C>(along);
    low[l] = static_cast<C>(along - static_cast<double>(high[l]));
  }
  for (int64_t j = 0; j < keys; j++) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; l++)
      ds[j * kPanel + l] = p[j * kPanel + l] * ((ds[j * kPanel + l] - high[l]) - low[l]);
  }
}

}  // namespace FASTASR_SIMD
}  // namespace fastasr::cpu
