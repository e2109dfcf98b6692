// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// The matrix products of attention with relative positions, computed on strips of a few query rows by all keys. Lanes
// run over keys (scores, dp, dR) or over channels (dq, dk); a tile of rows x lanes stays in registers, of a size that
// depends on the instruction set. The tables cover float and double.
namespace fastasr::cpu {

// Strips, packed keys and packed positions are padded to multiples of this many elements.
inline constexpr int64_t kAttentionPad = 32;
// Zeros on both sides of a strip of dS and of the packed positions, so that shifted loads need no bounds.
inline constexpr int64_t kAttentionMargin = 64;
inline constexpr int kAttentionRows = 8;       // most rows of a tile
inline constexpr int kAttentionPositions = 4;  // Position channels come in groups of this many, padded.

// j0 and j1 are multiples of kAttentionPad. Row m of a strip starts at m * stride.
template <typename C>
struct AttentionTiles {
  int rows;

  // s[m][j] = sum_d q[d][m] kt[d][j] + sum_e p[e][m] rt[e][j - m] for j0 <= j < j1. `next` (may be null) is memory that
  // will be written: `next_bytes` of it per key are prefetched.
  void (*scores)(const C* q, const C* kt, int64_t kt_stride, int64_t depth, const C* p, const C* rt, int64_t rt_stride,
                 int64_t positions, int64_t j0, int64_t j1, C* s, int64_t s_stride, const char* next,
                 int64_t next_bytes);

  // dq[m][d] = sum_j ds[m][j] k[j][d], j0 <= j < j1, d < depth (padded).
  void (*queries)(const C* ds, int64_t stride, const C* k, int64_t depth, int64_t j0, int64_t j1, C* dq);

  // Does the same for a depth that is a multiple of kAttentionPad / 2 alone.
  void (*narrow)(const C* ds, int64_t stride, const C* k, int64_t depth, int64_t j0, int64_t j1, C* dq);

  // dk[j][d] += sum_m ds[m][j] q[m][d], m < queries, j0 <= j < j1. There is at least one query; the queries are added
  // in one chain.
  void (*keys)(const C* ds, int64_t stride, int64_t queries, const C* q, int64_t depth, int64_t j0, int64_t j1, C* dk,
               const char* next0, const char* next1, int64_t next_bytes);

  // Does the same for a depth that is a multiple of kAttentionPad / 2 alone, without prefetching.
  void (*narrow_keys)(const C* ds, int64_t stride, int64_t queries, const C* q, int64_t depth, int64_t j0, int64_t j1,
                      C* dk);

  // dp[m][e] = sum_j ds[m][j] rt[e][j - m], e < 4.
  void (*positions)(const C* ds, int64_t stride, const C* rt, int64_t rt_stride, int64_t j0, int64_t j1, C* dp,
                    int64_t dp_stride);

  // drt[e][u] += sum_m ds[m][u + m] p[m][e], e < 4: u = j - m runs over every offset of the strip; ds is zero outside
  // [j0, j1).
  void (*offsets)(const C* ds, int64_t stride, const C* p, int64_t p_stride, int64_t j0, int64_t j1, C* drt,
                  int64_t drt_stride);
};

}  // namespace fastasr::cpu
