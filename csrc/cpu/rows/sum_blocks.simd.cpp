// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/sum_blocks.h"

namespace fastasr::cpu {
namespace {

constexpr int64_t kColumns = 64;

template <typename T>
void run(const compute_t<T>* __restrict parts, int64_t blocks, int64_t width, int64_t begin, int64_t end,
         T* __restrict out) {
  double sum[kColumns];
  for (int64_t j = begin; j < end; j += kColumns) {
    const int64_t m = end - j < kColumns ? end - j : kColumns;
    for (int64_t i = 0; i < kColumns; i++) sum[i] = 0;
    for (int64_t k = 0; k < blocks; k++) {
      const compute_t<T>* __restrict part = parts + k * width + j;
      if (m == kColumns) {
#pragma omp simd
        for (int64_t i = 0; i < kColumns; i++) sum[i] += static_cast<double>(part[i]);
      } else {
        for (int64_t i = 0; i < m; i++) sum[i] += static_cast<double>(part[i]);
      }
    }
    for (int64_t i = 0; i < m; i++) store(&out[j + i], static_cast<compute_t<T>>(sum[i]));
  }
}

}  // namespace

FASTASR_KERNELS(SumBlocks, .run = run<T>)

}  // namespace fastasr::cpu
