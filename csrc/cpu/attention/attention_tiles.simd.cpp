// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/attention_tiles.h"

#include <algorithm>

#include "cpu/attention/attention_rows.h"

// Accumulators start at zero and are added to memory at the end: a tile that starts from memory is left on the stack by
// GCC. Each product has its own function: several inlined into one would spill.
#define UNROLL _Pragma("GCC unroll 16")
#define SIMD _Pragma("omp simd")

namespace fastasr::cpu {
namespace {

// A tile of kRows rows by kBytes of lanes, for which the instruction set has registers.
#if defined(__AVX512F__)
constexpr int kRows = 8, kBytes = 128;
#elif defined(__AVX2__)
constexpr int kRows = 4, kBytes = 64;
#elif defined(__aarch64__)
constexpr int kRows = 8, kBytes = 32;
#else
constexpr int kRows = 4, kBytes = 32;
#endif
template <typename C>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(C));

template <typename C, int R, int L>
FASTASR_INLINE void zero(C (&tile)[R][L]) {
  UNROLL for (int m = 0; m < R; m++) { SIMD for (int n = 0; n < L; n++) tile[m][n] = 0; }
}

// Where queries and keys have a mean, the rounding error of a score grows with the channels that are added in one
// chain. Libraries add shorter ones where a product is small.
constexpr int64_t kScoreChain = 32, kFewKeysChain = 8;

template <typename C, int L = kLanes<C>>
__attribute__((noinline)) void scores(const C* __restrict q, const C* __restrict kt, int64_t kt_stride, int64_t depth,
                                      const C* __restrict p, const C* __restrict rt, int64_t rt_stride,
                                      int64_t positions, int64_t j0, int64_t j1, C* __restrict s, int64_t s_stride,
                                      const char* next, int64_t next_bytes) {
  const int64_t chain = j1 - j0 > kAttentionPad ? kScoreChain : kFewKeysChain;
  for (int64_t j = j0; j < j1; j += L) {
    if (next)
      for (int64_t e = 0; e < L * next_bytes; e += 64) __builtin_prefetch(next + j * next_bytes + e, 1);
    alignas(64) C tile[kRows][L];
    int64_t d = 0;
    do {
      zero(tile);
      const int64_t first = d, end = std::min(depth, first + chain);
      for (; d < end; d++) {
        const C* k = kt + d * kt_stride + j;
        UNROLL for (int m = 0; m < kRows; m++) {
          const C v = q[d * kRows + m];
          SIMD for (int n = 0; n < L; n++) tile[m][n] += v * k[n];
        }
      }
      if (first == 0) {
        UNROLL for (int m = 0; m < kRows; m++) {
          SIMD for (int n = 0; n < L; n++) s[m * s_stride + j + n] = tile[m][n];
        }
      } else {
        UNROLL for (int m = 0; m < kRows; m++) {
          SIMD for (int n = 0; n < L; n++) s[m * s_stride + j + n] += tile[m][n];
        }
      }
    } while (d < depth);
    if (positions == 0) continue;
    // This sum is kept apart: added to the other one term by term, these terms would be rounded at its size.
    zero(tile);
    for (int64_t d = 0; d < positions; d++) {
      const C* r = rt + d * rt_stride + j;
      UNROLL for (int m = 0; m < kRows; m++) {
        const C v = p[d * kRows + m];
        SIMD for (int n = 0; n < L; n++) tile[m][n] += v * r[n - m];
      }
    }
    UNROLL for (int m = 0; m < kRows; m++) { SIMD for (int n = 0; n < L; n++) s[m * s_stride + j + n] += tile[m][n]; }
  }
}

template <typename C, int L = kLanes<C>>
__attribute__((noinline)) void queries(const C* __restrict ds, int64_t stride, const C* __restrict k, int64_t depth,
                                       int64_t j0, int64_t j1, C* __restrict dq) {
  for (int64_t d = 0; d < depth; d += L) {
    alignas(64) C tile[kRows][L];
    zero(tile);
    for (int64_t j = j0; j < j1; j++) {
      const C* row = k + j * depth + d;
      UNROLL for (int m = 0; m < kRows; m++) {
        const C v = ds[m * stride + j];
        SIMD for (int n = 0; n < L; n++) tile[m][n] += v * row[n];
      }
    }
    UNROLL for (int m = 0; m < kRows; m++) { SIMD for (int n = 0; n < L; n++) dq[m * depth + d + n] = tile[m][n]; }
  }
}

// Two chains of half the keys each: equal terms round alike, and the error of a chain grows with their number. There
// are registers for both, because a tile has half the lanes, and together they hide the latency of the multiply-adds.
template <typename C, int L = kLanes<C> / 2>
__attribute__((noinline)) void narrow(const C* __restrict ds, int64_t stride, const C* __restrict k, int64_t depth,
                                      int64_t j0, int64_t j1, C* __restrict dq) {
  for (int64_t d = 0; d < depth; d += L) {
    alignas(64) C even[kRows][L], odd[kRows][L];
    zero(even), zero(odd);
    for (int64_t j = j0; j < j1; j += 2) {
      const C *row = k + j * depth + d, *next = row + depth;
      UNROLL for (int m = 0; m < kRows; m++) {
        const C v = ds[m * stride + j], w = ds[m * stride + j + 1];
        SIMD for (int n = 0; n < L; n++) even[m][n] += v * row[n];
        SIMD for (int n = 0; n < L; n++) odd[m][n] += w * next[n];
      }
    }
    UNROLL for (int m = 0; m < kRows; m++) {
      SIMD for (int n = 0; n < L; n++) dq[m * depth + d + n] = even[m][n] + odd[m][n];
    }
  }
}

// A tile of kRows keys.
template <typename C, int L = kLanes<C>>
__attribute__((noinline)) void keys(const C* __restrict ds, int64_t stride, int64_t queries, const C* __restrict q,
                                    int64_t depth, int64_t j0, int64_t j1, C* __restrict dk, const char* next0,
                                    const char* next1, int64_t next_bytes) {
  for (int64_t j = j0; j < j1; j += kRows) {
    for (int64_t e = 0; e < kRows * next_bytes; e += 64) {
      if (next0) __builtin_prefetch(next0 + j * next_bytes + e);
      if (next1) __builtin_prefetch(next1 + j * next_bytes + e);
    }
    for (int64_t d = 0; d < depth; d += L) {
      alignas(64) C tile[kRows][L];
      zero(tile);
      const C *weight = ds + j, *row = q + d;
      int64_t m = 0;
      do {  // a loop that may end at once would keep the tile on the stack
        UNROLL for (int e = 0; e < kRows; e++) {
          const C v = weight[e];
          SIMD for (int n = 0; n < L; n++) tile[e][n] += v * row[n];
        }
        weight += stride, row += depth;
      } while (++m < queries);
      UNROLL for (int e = 0; e < kRows; e++) {
        SIMD for (int n = 0; n < L; n++) dk[(j + e) * depth + d + n] += tile[e][n];
      }
    }
  }
}

template <typename C, int L = kLanes<C>>
__attribute__((noinline)) void positions(const C* __restrict ds, int64_t stride, const C* __restrict rt,
                                         int64_t rt_stride, int64_t j0, int64_t j1, C* __restrict dp,
                                         int64_t dp_stride) {
  for (int m = 0; m < kRows; m++) {
    alignas(64) C tile[kAttentionPositions][L];
    zero(tile);
    for (int64_t j = j0; j < j1; j += L) {
      UNROLL for (int e = 0; e < kAttentionPositions; e++) {
        SIMD for (int n = 0; n < L; n++) tile[e][n] += ds[m * stride + j + n] * rt[e * rt_stride + j + n - m];
      }
    }
    for (int e = 0; e < kAttentionPositions; e++) dp[m * dp_stride + e] = sum_of_lanes(tile[e]);
  }
}

template <typename C, int L = kLanes<C>>
__attribute__((noinline)) void offsets(const C* __restrict ds, int64_t stride, const C* __restrict p, int64_t p_stride,
                                       int64_t j0, int64_t j1, C* __restrict drt, int64_t drt_stride) {
  for (int64_t u = j0 - kRows; u < j1; u += L) {
    alignas(64) C tile[kAttentionPositions][L];
    zero(tile);
    UNROLL for (int m = 0; m < kRows; m++) {
      UNROLL for (int e = 0; e < kAttentionPositions; e++) {
        const C v = p[m * p_stride + e];
        SIMD for (int n = 0; n < L; n++) tile[e][n] += ds[m * stride + u + m + n] * v;
      }
    }
    UNROLL for (int e = 0; e < kAttentionPositions; e++) {
      SIMD for (int n = 0; n < L; n++) drt[e * drt_stride + u + n] += tile[e][n];
    }
  }
}

// Does the same for a narrow depth, without prefetch.
template <typename C>
void narrow_keys(const C* ds, int64_t stride, int64_t queries, const C* q, int64_t depth, int64_t j0, int64_t j1,
                 C* dk) {
  keys<C, kLanes<C> / 2>(ds, stride, queries, q, depth, j0, j1, dk, nullptr, nullptr, 0);
}

}  // namespace

FASTASR_KERNELS_COMPUTE(AttentionTiles, .rows = kRows, .scores = scores<T>, .queries = queries<T>, .narrow = narrow<T>,
                        .keys = keys<T>, .narrow_keys = narrow_keys<T>, .positions = positions<T>,
                        .offsets = offsets<T>)

}  // namespace fastasr::cpu
