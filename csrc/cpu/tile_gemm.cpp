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
FASTASR_INLINE void rows_piece(const C* __restrict a, int64_t a_block, const C* __restrict b, int64_t depth,
                               C* __restrict c, bool add) {
  for (int64_t first = 0; first == 0 || first < depth; first += kChain * kPanel) {  // no terms: zeros
    const int64_t end = first + kChain * kPanel < depth ? first + kChain * kPanel : depth;
    alignas(64) C acc[R][N];
    UNROLL for (int m = 0; m < R; m++) SIMD for (int n = 0; n < N; n++) acc[m][n] = 0;
    for (int64_t i = first; i < end; i += kPanel) {
      const C* __restrict ai = a + i / kPanel * a_block, * __restrict bi = b + i * kPanel;
      const int64_t terms = end - i < kPanel ? end - i : kPanel;
      for (int64_t k = 0; k < terms; k++) {
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

// One microkernel per function: several inlined into one would spill. Pieces of R rows by BYTES of columns.
#define FASTASR_PIECES(NAME, TARGET, R, BYTES)                                                                     \
  template <typename C>                                                                                            \
  TARGET __attribute__((noinline)) void NAME##_rows(const C* a, int64_t a_block, const C* b, int64_t depth, C* c,  \
                                                    bool add, TilePart part) {                                     \
    constexpr int N = BYTES / sizeof(C);                                                                           \
    for (int m = 0; m < part.rows; m += R)                                                                         \
      for (int n = 0; n < part.columns; n += N)                                                                    \
        rows_piece<R, N>(a + m * kPanel, a_block, b + n, depth, c + m * kPanel + n, add);                          \
  }                                                                                                                \
  template <typename C>                                                                                            \
  TARGET __attribute__((noinline)) void NAME##_columns(const C* a, const C* b, int64_t depth, C* c, bool add,      \
                                                       TilePart part) {                                            \
    constexpr int N = BYTES / sizeof(C);                                                                           \
    for (int m = 0; m < part.rows; m += R)                                                                         \
      for (int n = 0; n < part.columns; n += N) columns_piece<R, N>(a + m, b + n, depth, c + m * kPanel + n, add); \
  }
// Whether pieces of so many bytes cover the columns without a rest.
#define FASTASR_FITS(C, BYTES) (part.columns * static_cast<int64_t>(sizeof(C)) % (BYTES) == 0)

#if defined(__x86_64__) && !defined(FASTASR_NO_CLONES)
FASTASR_PIECES(avx512, __attribute__((target("arch=x86-64-v4"))), 8, 128)
FASTASR_PIECES(avx512_narrow, __attribute__((target("arch=x86-64-v4"))), 8, 64)
FASTASR_PIECES(avx2_wide, __attribute__((target("arch=x86-64-v3"))), 4, 96)
FASTASR_PIECES(avx2, __attribute__((target("arch=x86-64-v3"))), 4, 64)
FASTASR_PIECES(avx2_narrow, __attribute__((target("arch=x86-64-v3"))), 4, 32)
FASTASR_PIECES(baseline, , 4, 32)

enum class Level { baseline, avx2, avx512 };
Level level() {
  static const Level found = __builtin_cpu_supports("x86-64-v4")   ? Level::avx512
                             : __builtin_cpu_supports("x86-64-v3") ? Level::avx2
                                                                   : Level::baseline;
  return found;
}
#define FASTASR_CALL(C, f, ...)                                                  \
  switch (level()) {                                                             \
    case Level::avx512:                                                          \
      if (part.columns * sizeof(C) <= 64) return avx512_narrow_##f(__VA_ARGS__); \
      return avx512_##f(__VA_ARGS__);                                            \
    case Level::avx2:                                                            \
      if (FASTASR_FITS(C, 96)) return avx2_wide_##f(__VA_ARGS__);                \
      if (FASTASR_FITS(C, 64)) return avx2_##f(__VA_ARGS__);                     \
      return avx2_narrow_##f(__VA_ARGS__);                                       \
    default:                                                                     \
      return baseline_##f(__VA_ARGS__);                                          \
  }
#else
#if defined(__AVX512F__)
FASTASR_PIECES(native, , 8, 128)
#elif defined(__AVX2__)
FASTASR_PIECES(native, , 4, 64)
#else
FASTASR_PIECES(native, , 4, 32)
#endif
#define FASTASR_CALL(C, f, ...) return native_##f(__VA_ARGS__)
#endif

}  // namespace

#define FASTASR_DEFINE(C)                                                                                 \
  void tile_rows(const C* a, int64_t a_block, const C* b, int64_t depth, C* c, bool add, TilePart part) { \
    FASTASR_CALL(C, rows, a, a_block, b, depth, c, add, part);                                            \
  }                                                                                                       \
  void tile_columns(const C* a, const C* b, int64_t depth, C* c, bool add, TilePart part) {               \
    FASTASR_CALL(C, columns, a, b, depth, c, add, part);                                                  \
  }
FASTASR_DEFINE(float)
FASTASR_DEFINE(double)

}  // namespace fastasr::cpu
