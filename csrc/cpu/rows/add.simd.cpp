// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/add.h"

namespace fastasr::cpu {
namespace {

void run(const float* __restrict x, float* __restrict y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] += x[i];
}

}  // namespace

FASTASR_KERNELS_FLOAT(AddKernel, .run = run)

}  // namespace fastasr::cpu
