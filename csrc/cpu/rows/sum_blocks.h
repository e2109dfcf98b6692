// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

namespace fastasr::cpu {

// Computes out[j] = sum over blocks of parts[block][j] for j in [begin, end), in block order, in double.
template <typename T>
struct SumBlocks {
  void (*run)(const compute_t<T>* parts, int64_t blocks, int64_t width, int64_t begin, int64_t end, T* out);
};

}  // namespace fastasr::cpu
