// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/depthwise_tiles.h"

#include "cpu/conv/depthwise.simd.h"

namespace fastasr::cpu {
namespace {

template <int kRows, bool kAdd, typename C>
FASTASR_INLINE void tile(const C* slide, const C* fixed, int64_t fixed_stride, int64_t n, C* out) {
  using V = typename Aligned<C>::type;
  for (int64_t v = 0; v < kStripe; v += Aligned<C>::lanes) {
    V sum[kRows] = {};
    correlate<kRows>(slide + v, fixed + v, fixed_stride, n, sum);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) {
      V* to = reinterpret_cast<V*>(out + i * kStripe + v);
      *to = kAdd ? *to + sum[i] : sum[i];
    }
  }
}

template <bool kAdd, typename C>
void tile_rows(int64_t rows, const C* slide, const C* fixed, int64_t fixed_stride, int64_t n, C* out) {
  if (rows > 4) return tile<8, kAdd>(slide, fixed, fixed_stride, n, out);
  tile<4, kAdd>(slide, fixed, fixed_stride, n, out);
}

}  // namespace

FASTASR_KERNELS_COMPUTE(DepthwiseTiles, .set = tile_rows<false, T>, .add = tile_rows<true, T>)

}  // namespace fastasr::cpu
