// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/weighted_values.h"

#include <algorithm>

namespace fastasr::cpu {
namespace {

constexpr int64_t kLanes = kValueLanes, kChain = 128;

struct Group {
  const float* w;
  int64_t w_stride, sources;
  const float* v;  // (sources, 16)
  float* out;
  int64_t out_stride, columns;
};

// Rows of a tile: as many chains of multiply-adds as hide the latency of one, with two sums of each in registers.
#if defined(__AVX512F__)
constexpr int kMostRows = 12;
#else
constexpr int kMostRows = 6;
#endif

// Each number of rows has its own function: several tiles inlined into one function would spill. kTransposed: the
// columns of w in place of its rows.
template <int kRows, bool kTransposed>
__attribute__((noinline)) void group_tile(const Group& a, int64_t first) {
  const float* __restrict w = a.w + (kTransposed ? first : first * a.w_stride);
  float total[kRows][kLanes];
  for (int i = 0; i < kRows; i++)
    for (int c = 0; c < kLanes; c++) total[i][c] = 0;
  for (int64_t begin = 0; begin < a.sources; begin += kChain) {
    const int64_t end = std::min(a.sources, begin + kChain);
    float sum[kRows][kLanes];
    for (int i = 0; i < kRows; i++)
      for (int c = 0; c < kLanes; c++) sum[i][c] = 0;
    for (int64_t j = begin; j < end; j++) {
      const float* __restrict v = a.v + j * kLanes;
#pragma GCC unroll 16
      for (int i = 0; i < kRows; i++) {
        const float s = w[kTransposed ? j * a.w_stride + i : i * a.w_stride + j];
#pragma omp simd
        for (int c = 0; c < kLanes; c++) sum[i][c] += s * v[c];
      }
    }
    for (int i = 0; i < kRows; i++)
#pragma omp simd
      for (int c = 0; c < kLanes; c++) total[i][c] += sum[i][c];
  }
  for (int i = 0; i < kRows; i++) {
    float* const out = a.out + (first + i) * a.out_stride;
    if (a.columns == kLanes)
      std::copy_n(total[i], kLanes, out);
    else
      std::copy_n(total[i], a.columns, out);
  }
}

void pack(const float* v, int64_t stride, int64_t sources, int64_t columns, float* packed) {
  for (int64_t from = 0; from < columns; from += kLanes, packed += sources * kLanes) {
    const int64_t n = std::min(kLanes, columns - from);
    for (int64_t j = 0; j < sources; j++) {
      float* const row = packed + j * kLanes;
      std::copy(v + j * stride + from, v + j * stride + from + n, row);
      std::fill(row + n, row + kLanes, 0.0f);
    }
  }
}

// All columns of a few rows come first: where columns are many, they are written one after the other.
template <bool kTransposed>
void run(const float* w, int64_t w_stride, int64_t rows, int64_t sources, const float* packed, int64_t columns,
         float* out, int64_t out_stride) {
  const auto tiles = [&]<int kRows>(int64_t first) {
    const float* v = packed;
    for (int64_t from = 0; from < columns; from += kLanes, v += sources * kLanes)
      group_tile<kRows, kTransposed>(
          {w, w_stride, sources, v, out + from, out_stride, std::min(kLanes, columns - from)}, first);
  };
  int64_t i = 0;
  for (; i + kMostRows <= rows; i += kMostRows) tiles.template operator()<kMostRows>(i);
  for (; i + 2 <= rows; i += 2) tiles.template operator()<2>(i);
  for (; i < rows; i++) tiles.template operator()<1>(i);
}

}  // namespace

FASTASR_KERNELS_FLOAT(WeightedValues, .pack = pack, .run = run<false>, .transposed = run<true>)

}  // namespace fastasr::cpu
