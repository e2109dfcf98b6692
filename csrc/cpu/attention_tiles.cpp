// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention_tiles.h"

#include "cpu/attention_rows.h"

// Accumulators start at zero and are added to memory at the end: a tile that starts from memory is left on the stack by
// GCC. One function per product: several inlined into one spill.
#define FASTASR_UNROLL _Pragma("GCC unroll 16")
#define FASTASR_SIMD _Pragma("omp simd")

namespace fastasr::cpu {
namespace {

template <typename C, int R, int L>
FASTASR_INLINE void zero(C (&tile)[R][L]) {
  FASTASR_UNROLL for (int m = 0; m < R; m++) { FASTASR_SIMD for (int n = 0; n < L; n++) tile[m][n] = 0; }
}

template <typename C, int R, int L>
FASTASR_INLINE void scores_body(const C* __restrict q, const C* __restrict kt, int64_t kt_stride, int64_t depth,
                                const C* __restrict p, const C* __restrict rt, int64_t rt_stride, int64_t positions,
                                int64_t j0, int64_t j1, C* __restrict s, int64_t s_stride, const char* next,
                                int64_t next_bytes) {
  for (int64_t j = j0; j < j1; j += L) {
    if (next)
      for (int64_t e = 0; e < L * next_bytes; e += 64) __builtin_prefetch(next + j * next_bytes + e, 1);
    alignas(64) C tile[R][L];
    zero(tile);
    for (int64_t d = 0; d < depth; d++) {
      const C* k = kt + d * kt_stride + j;
      FASTASR_UNROLL for (int m = 0; m < R; m++) {
        const C v = q[d * R + m];
        FASTASR_SIMD for (int n = 0; n < L; n++) tile[m][n] += v * k[n];
      }
    }
    FASTASR_UNROLL for (int m = 0; m < R; m++) {
      FASTASR_SIMD for (int n = 0; n < L; n++) s[m * s_stride + j + n] = tile[m][n];
    }
    if (positions == 0) continue;
    // A sum of its own: added to the other one by one, these terms would be rounded at its size.
    zero(tile);
    for (int64_t d = 0; d < positions; d++) {
      const C* r = rt + d * rt_stride + j;
      FASTASR_UNROLL for (int m = 0; m < R; m++) {
        const C v = p[d * R + m];
        FASTASR_SIMD for (int n = 0; n < L; n++) tile[m][n] += v * r[n - m];
      }
    }
    FASTASR_UNROLL for (int m = 0; m < R; m++) {
      FASTASR_SIMD for (int n = 0; n < L; n++) s[m * s_stride + j + n] += tile[m][n];
    }
  }
}

template <typename C, int R, int L>
FASTASR_INLINE void queries_body(const C* __restrict ds, int64_t stride, const C* __restrict k, int64_t depth,
                                 int64_t j0, int64_t j1, C* __restrict dq) {
  for (int64_t d = 0; d < depth; d += L) {
    alignas(64) C tile[R][L];
    zero(tile);
    for (int64_t j = j0; j < j1; j++) {
      const C* row = k + j * depth + d;
      FASTASR_UNROLL for (int m = 0; m < R; m++) {
        const C v = ds[m * stride + j];
        FASTASR_SIMD for (int n = 0; n < L; n++) tile[m][n] += v * row[n];
      }
    }
    FASTASR_UNROLL for (int m = 0; m < R; m++) {
      FASTASR_SIMD for (int n = 0; n < L; n++) dq[m * depth + d + n] = tile[m][n];
    }
  }
}

// A tile of R keys.
template <typename C, int R, int L>
FASTASR_INLINE void keys_body(const C* __restrict ds, int64_t stride, int64_t queries, const C* __restrict q,
                              int64_t depth, int64_t j0, int64_t j1, C* __restrict dk, const char* next0,
                              const char* next1, int64_t next_bytes) {
  for (int64_t j = j0; j < j1; j += R) {
    for (int64_t e = 0; e < R * next_bytes; e += 64) {
      if (next0) __builtin_prefetch(next0 + j * next_bytes + e);
      if (next1) __builtin_prefetch(next1 + j * next_bytes + e);
    }
    for (int64_t d = 0; d < depth; d += L) {
      alignas(64) C tile[R][L];
      zero(tile);
      const C *weight = ds + j, *row = q + d;
      int64_t m = 0;
      do {  // a loop that may be left at once would have the tile on the stack
        FASTASR_UNROLL for (int e = 0; e < R; e++) {
          const C v = weight[e];
          FASTASR_SIMD for (int n = 0; n < L; n++) tile[e][n] += v * row[n];
        }
        weight += stride, row += depth;
      } while (++m < queries);
      FASTASR_UNROLL for (int e = 0; e < R; e++) {
        FASTASR_SIMD for (int n = 0; n < L; n++) dk[(j + e) * depth + d + n] += tile[e][n];
      }
    }
  }
}

template <typename C, int R, int L>
FASTASR_INLINE void positions_body(const C* __restrict ds, int64_t stride, const C* __restrict rt, int64_t rt_stride,
                                   int64_t j0, int64_t j1, C* __restrict dp, int64_t dp_stride) {
  for (int m = 0; m < R; m++) {
    alignas(64) C tile[kAttentionPositions][L];
    zero(tile);
    for (int64_t j = j0; j < j1; j += L) {
      FASTASR_UNROLL for (int e = 0; e < kAttentionPositions; e++) {
        FASTASR_SIMD for (int n = 0; n < L; n++) tile[e][n] += ds[m * stride + j + n] * rt[e * rt_stride + j + n - m];
      }
    }
    for (int e = 0; e < kAttentionPositions; e++) dp[m * dp_stride + e] = sum_of_lanes(tile[e]);
  }
}

template <typename C, int R, int L>
FASTASR_INLINE void offsets_body(const C* __restrict ds, int64_t stride, const C* __restrict p, int64_t p_stride,
                                 int64_t j0, int64_t j1, C* __restrict drt, int64_t drt_stride) {
  for (int64_t u = j0 - R; u < j1; u += L) {
    alignas(64) C tile[kAttentionPositions][L];
    zero(tile);
    FASTASR_UNROLL for (int m = 0; m < R; m++) {
      FASTASR_UNROLL for (int e = 0; e < kAttentionPositions; e++) {
        const C v = p[m * p_stride + e];
        FASTASR_SIMD for (int n = 0; n < L; n++) tile[e][n] += ds[m * stride + u + m + n] * v;
      }
    }
    FASTASR_UNROLL for (int e = 0; e < kAttentionPositions; e++) {
      FASTASR_SIMD for (int n = 0; n < L; n++) drt[e * drt_stride + u + n] += tile[e][n];
    }
  }
}

}  // namespace

#define FASTASR_TILES(NAME, TARGET, C, R, L)                                                                           \
  TARGET __attribute__((noinline)) static void NAME##_scores(                                                          \
      const C* q, const C* kt, int64_t kt_stride, int64_t depth, const C* p, const C* rt, int64_t rt_stride,           \
      int64_t positions, int64_t j0, int64_t j1, C* s, int64_t s_stride, const char* next, int64_t next_bytes) {       \
    scores_body<C, R, L>(q, kt, kt_stride, depth, p, rt, rt_stride, positions, j0, j1, s, s_stride, next, next_bytes); \
  }                                                                                                                    \
  TARGET __attribute__((noinline)) static void NAME##_queries(const C* ds, int64_t stride, const C* k, int64_t depth,  \
                                                              int64_t j0, int64_t j1, C* dq) {                         \
    queries_body<C, R, L>(ds, stride, k, depth, j0, j1, dq);                                                           \
  }                                                                                                                    \
  TARGET __attribute__((noinline)) static void NAME##_narrow(const C* ds, int64_t stride, const C* k, int64_t depth,   \
                                                             int64_t j0, int64_t j1, C* dq) {                          \
    queries_body<C, R, L / 2>(ds, stride, k, depth, j0, j1, dq);                                                       \
  }                                                                                                                    \
  TARGET __attribute__((noinline)) static void NAME##_keys(const C* ds, int64_t stride, int64_t queries, const C* q,   \
                                                           int64_t depth, int64_t j0, int64_t j1, C* dk,               \
                                                           const char* next0, const char* next1, int64_t next_bytes) { \
    keys_body<C, R, L>(ds, stride, queries, q, depth, j0, j1, dk, next0, next1, next_bytes);                           \
  }                                                                                                                    \
  TARGET __attribute__((noinline)) static void NAME##_narrow_keys(                                                     \
      const C* ds, int64_t stride, int64_t queries, const C* q, int64_t depth, int64_t j0, int64_t j1, C* dk) {        \
    keys_body<C, R, L / 2>(ds, stride, queries, q, depth, j0, j1, dk, nullptr, nullptr, 0);                            \
  }                                                                                                                    \
  TARGET __attribute__((noinline)) static void NAME##_positions(                                                       \
      const C* ds, int64_t stride, const C* rt, int64_t rt_stride, int64_t j0, int64_t j1, C* dp, int64_t dp_stride) { \
    positions_body<C, R, L>(ds, stride, rt, rt_stride, j0, j1, dp, dp_stride);                                         \
  }                                                                                                                    \
  TARGET __attribute__((noinline)) static void NAME##_offsets(                                                         \
      const C* ds, int64_t stride, const C* p, int64_t p_stride, int64_t j0, int64_t j1, C* drt, int64_t drt_stride) { \
    offsets_body<C, R, L>(ds, stride, p, p_stride, j0, j1, drt, drt_stride);                                           \
  }                                                                                                                    \
  static constexpr AttentionTiles<C> NAME = {R,           NAME##_scores,      NAME##_queries,   NAME##_narrow,         \
                                             NAME##_keys, NAME##_narrow_keys, NAME##_positions, NAME##_offsets};

#if defined(__x86_64__) && !defined(FASTASR_NO_CLONES)
FASTASR_TILES(avx512_float, __attribute__((target("arch=x86-64-v4"))), float, 8, 32)
FASTASR_TILES(avx512_double, __attribute__((target("arch=x86-64-v4"))), double, 8, 16)
FASTASR_TILES(avx2_float, __attribute__((target("arch=x86-64-v3"))), float, 4, 16)
FASTASR_TILES(avx2_double, __attribute__((target("arch=x86-64-v3"))), double, 4, 8)
FASTASR_TILES(portable_float, , float, 4, 8)
FASTASR_TILES(portable_double, , double, 4, 4)

template <typename C>
static const AttentionTiles<C>& choose(const AttentionTiles<C>& avx512, const AttentionTiles<C>& avx2,
                                       const AttentionTiles<C>& portable) {
  const Simd level = simd();
  return level == Simd::avx512 ? avx512 : level == Simd::avx2 ? avx2 : portable;
}
template <>
const AttentionTiles<float>& attention_tiles<float>() {
  return choose(avx512_float, avx2_float, portable_float);
}
template <>
const AttentionTiles<double>& attention_tiles<double>() {
  return choose(avx512_double, avx2_double, portable_double);
}
#else
#if defined(__AVX512F__)
FASTASR_TILES(native_float, , float, 8, 32)
FASTASR_TILES(native_double, , double, 8, 16)
#elif defined(__AVX2__)
FASTASR_TILES(native_float, , float, 4, 16)
FASTASR_TILES(native_double, , double, 4, 8)
#else
FASTASR_TILES(native_float, , float, 4, 8)
FASTASR_TILES(native_double, , double, 4, 4)
#endif
template <>
const AttentionTiles<float>& attention_tiles<float>() {
  return native_float;
}
template <>
const AttentionTiles<double>& attention_tiles<double>() {
  return native_double;
}
#endif

}  // namespace fastasr::cpu
