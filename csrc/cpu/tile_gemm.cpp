// SPDX-License-Identifier: Apache-2.0
#include "cpu/tile_gemm.h"

#include <algorithm>

#include "cpu/simd.h"

namespace fastasr::cpu {
namespace {

constexpr int64_t kChain = 2;  // panels in a chain of sums: 64 terms cost 2 % of the rate of 128, 32 terms 8 %

#define UNROLL _Pragma("GCC unroll 16")
#define SIMD _Pragma("omp simd")

// R rows by N columns of accumulators: what an instruction set has registers for. They start at zero and are added to c
// at the end, else they would live on the stack.
template <int R, int N, typename C>
FASTASR_INLINE void rows_piece(const C* __restrict a, int64_t a_block, const C* __restrict b, int64_t blocks,
                               C* __restrict c, bool add) {
  for (int64_t first = 0; first == 0 || first < blocks; first += kChain) {  // no blocks: zeros
    const int64_t end = first + kChain < blocks ? first + kChain : blocks;
    alignas(64) C acc[R][N];
    UNROLL for (int m = 0; m < R; m++) SIMD for (int n = 0; n < N; n++) acc[m][n] = 0;
    for (int64_t i = first; i < end; i++) {
      const C* __restrict ai = a + i * a_block, * __restrict bi = b + i * kPanel * kPanel;
      for (int64_t k = 0; k < kPanel; k++) {
        UNROLL for (int m = 0; m < R; m++) {
          const C v = ai[m * kPanel + k];
          SIMD for (int n = 0; n < N; n++) acc[m][n] += v * bi[k * kPanel + n];
        }
      }
    }
    if (add) {
      UNROLL for (int m = 0; m < R; m++) SIMD for (int n = 0; n < N; n++) c[m * kPanel + n] += acc[m][n];
    } else {
      UNROLL for (int m = 0; m < R; m++) SIMD for (int n = 0; n < N; n++) c[m * kPanel + n] = acc[m][n];
    }
    add = true;
  }
}

template <int R, int N, typename C>
FASTASR_INLINE void columns_piece(const C* __restrict a, const C* __restrict b, int64_t depth, C* __restrict c,
                                  bool add) {
  for (int64_t first = 0; first == 0 || first < depth; first += kChain * kPanel) {
    const int64_t end = first + kChain * kPanel < depth ? first + kChain * kPanel : depth;
    alignas(64) C acc[R][N];
    UNROLL for (int m = 0; m < R; m++) SIMD for (int n = 0; n < N; n++) acc[m][n] = 0;
    for (int64_t k = first; k < end; k++) {
      UNROLL for (int m = 0; m < R; m++) {
        const C v = a[k * kPanel + m];
        SIMD for (int n = 0; n < N; n++) acc[m][n] += v * b[k * kPanel + n];
      }
    }
    if (add) {
      UNROLL for (int m = 0; m < R; m++) SIMD for (int n = 0; n < N; n++) c[m * kPanel + n] += acc[m][n];
    } else {
      UNROLL for (int m = 0; m < R; m++) SIMD for (int n = 0; n < N; n++) c[m * kPanel + n] = acc[m][n];
    }
    add = true;
  }
}

// One microkernel per function: several inlined into one would spill.
#define FASTASR_TILES(NAME, TARGET, R, BYTES)                                                                      \
  template <typename C>                                                                                            \
  TARGET __attribute__((noinline)) void NAME##_rows(const C* a, int64_t a_block, const C* b, int64_t blocks, C* c, \
                                                    bool add) {                                                    \
    constexpr int N = BYTES / sizeof(C);                                                                           \
    for (int m = 0; m < kTileRows; m += R)                                                                         \
      for (int n = 0; n < kPanel; n += N)                                                                          \
        rows_piece<R, N>(a + m * kPanel, a_block, b + n, blocks, c + m * kPanel + n, add);                         \
  }                                                                                                                \
  template <typename C>                                                                                            \
  TARGET __attribute__((noinline)) void NAME##_columns(const C* a, const C* b, int64_t depth, C* c, bool add) {    \
    constexpr int N = BYTES / sizeof(C);                                                                           \
    for (int m = 0; m < kTileRows; m += R)                                                                         \
      for (int n = 0; n < kPanel; n += N) columns_piece<R, N>(a + m, b + n, depth, c + m * kPanel + n, add);       \
  }

#if defined(__x86_64__) && !defined(FASTASR_NO_CLONES)
FASTASR_TILES(avx512, __attribute__((target("arch=x86-64-v4"))), 8, 128)
FASTASR_TILES(avx2, __attribute__((target("arch=x86-64-v3"))), 4, 64)
FASTASR_TILES(baseline, , 4, 32)

enum class Level { baseline, avx2, avx512 };
Level level() {
  static const Level found = __builtin_cpu_supports("x86-64-v4")   ? Level::avx512
                             : __builtin_cpu_supports("x86-64-v3") ? Level::avx2
                                                                   : Level::baseline;
  return found;
}
#define FASTASR_CALL(f, ...)            \
  switch (level()) {                    \
    case Level::avx512:                 \
      return avx512_##f(__VA_ARGS__);   \
    case Level::avx2:                   \
      return avx2_##f(__VA_ARGS__);     \
    default:                            \
      return baseline_##f(__VA_ARGS__); \
  }
#else
#if defined(__AVX512F__)
FASTASR_TILES(native, , 8, 128)
#elif defined(__AVX2__)
FASTASR_TILES(native, , 4, 64)
#else
FASTASR_TILES(native, , 4, 32)
#endif
#define FASTASR_CALL(f, ...) return native_##f(__VA_ARGS__)
#endif

}  // namespace

#define FASTASR_DEFINE(C)                                                                   \
  void tile_rows(const C* a, int64_t a_block, const C* b, int64_t blocks, C* c, bool add) { \
    FASTASR_CALL(rows, a, a_block, b, blocks, c, add);                                      \
  }                                                                                         \
  void tile_columns(const C* a, const C* b, int64_t depth, C* c, bool add) {                \
    FASTASR_CALL(columns, a, b, depth, c, add);                                             \
  }
FASTASR_DEFINE(float)
FASTASR_DEFINE(double)

}  // namespace fastasr::cpu
