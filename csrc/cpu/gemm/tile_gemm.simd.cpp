// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/tile_gemm.h"

namespace fastasr::cpu {
namespace {

constexpr int64_t kChain = 2;  // panels in a chain of sums: 64 terms cost 2 % of the rate of 128, 32 terms 8 %

#define UNROLL _Pragma("GCC unroll 16")
#define SIMD _Pragma("omp simd")

// R rows by N columns of accumulators: what an instruction set has registers for. They start at zero and are added to c
// at the end, else they would live on the stack. kColumns: a holds columns in place of rows.
template <int R, int N, bool kColumns, typename C>
FASTASR_INLINE void piece(const C* __restrict a, int64_t a_block, const C* __restrict b, int64_t depth, C* __restrict c,
                          bool add) {
  constexpr int64_t kStep = kColumns ? kChain * kPanel : kPanel;
  for (int64_t first = 0; first == 0 || first < depth; first += kChain * kPanel) {  // no terms: zeros
    const int64_t end = first + kChain * kPanel < depth ? first + kChain * kPanel : depth;
    alignas(64) C acc[R][N];
    UNROLL for (int m = 0; m < R; m++) SIMD for (int n = 0; n < N; n++) acc[m][n] = 0;
    for (int64_t i = first; i < end; i += kStep) {
      const C* __restrict ai = kColumns ? a + i * kPanel : a + i / kPanel * a_block, * __restrict bi = b + i * kPanel;
      const int64_t terms = end - i < kStep ? end - i : kStep;
      for (int64_t k = 0; k < terms; k++) {
        UNROLL for (int m = 0; m < R; m++) {
          const C v = ai[kColumns ? k * kPanel + m : m * kPanel + k];
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

// Each microkernel has its own function: several inlined into one would spill. Pieces have R rows by `bytes` of
// columns.
template <typename C, int R, int bytes, bool kColumns>
__attribute__((noinline)) void in_pieces(const C* a, int64_t a_block, const C* b, int64_t depth, C* c, bool add,
                                         TilePart part) {
  constexpr int N = bytes / sizeof(C);
  for (int m = 0; m < part.rows; m += R)
    for (int n = 0; n < part.columns; n += N)
      piece<R, N, kColumns>(a + (kColumns ? m : m * kPanel), a_block, b + n, depth, c + m * kPanel + n, add);
}

// Calls f<R, bytes>() with the piece that this part of a tile takes.
template <typename C, typename F>
FASTASR_INLINE void with_piece([[maybe_unused]] TilePart part, const F& f) {
  [[maybe_unused]] const int64_t bytes = part.columns * static_cast<int64_t>(sizeof(C));
#if defined(__AVX512F__)
  if (bytes <= 64) return f.template operator()<8, 64>();
  f.template operator()<8, 128>();
#elif defined(__AVX2__)
  if (bytes % 96 == 0) return f.template operator()<4, 96>();  // without a rest
  if (bytes % 64 == 0) return f.template operator()<4, 64>();
  f.template operator()<4, 32>();
#elif defined(__aarch64__)
  f.template operator()<8, 32>();
#else
  f.template operator()<4, 32>();
#endif
}

template <typename C, bool kColumns>
FASTASR_INLINE void tile(const C* a, int64_t a_block, const C* b, int64_t depth, C* c, bool add, TilePart part) {
  with_piece<C>(part,
                [&]<int R, int bytes>() { in_pieces<C, R, bytes, kColumns>(a, a_block, b, depth, c, add, part); });
}

template <typename C>
void rows(const C* a, int64_t a_block, const C* b, int64_t depth, C* c, bool add, TilePart part) {
  tile<C, false>(a, a_block, b, depth, c, add, part);
}
template <typename C>
void columns(const C* a, const C* b, int64_t depth, C* c, bool add, TilePart part) {
  tile<C, true>(a, 0, b, depth, c, add, part);
}

}  // namespace

FASTASR_KERNELS_COMPUTE(TileGemm, .rows = rows<T>, .columns = columns<T>)

}  // namespace fastasr::cpu
