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

// Each number of rows has its own function: several tiles inlined into one function would spill. 6 rows are as many
// chains of multiply-adds as hide the latency of one, and two vectors of each as many sums as the registers of AVX2
// hold. kTransposed: the columns of w in place of its rows.
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
#pragma GCC unroll 8
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
  for (int i = 0; i < kRows; i++)
    for (int64_t c = 0; c < a.columns; c++) a.out[(first + i) * a.out_stride + c] = total[i][c];
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

template <bool kTransposed>
void run(const float* w, int64_t w_stride, int64_t rows, int64_t sources, const float* packed, int64_t columns,
         float* out, int64_t out_stride) {
  for (int64_t from = 0; from < columns; from += kLanes, packed += sources * kLanes) {
    const Group a{w, w_stride, sources, packed, out + from, out_stride, std::min(kLanes, columns - from)};
    int64_t i = 0;
    for (; i + 6 <= rows; i += 6) group_tile<6, kTransposed>(a, i);
    for (; i + 2 <= rows; i += 2) group_tile<2, kTransposed>(a, i);
    for (; i < rows; i++) group_tile<1, kTransposed>(a, i);
  }
}

}  // namespace

FASTASR_KERNELS_FLOAT(WeightedValues, .pack = pack, .run = run<false>, .transposed = run<true>)

}  // namespace fastasr::cpu
