// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

namespace fastasr::cpu {

// y += x, n elements.
struct AddKernel {
  void (*run)(const float* x, float* y, int64_t n);
};

}  // namespace fastasr::cpu
