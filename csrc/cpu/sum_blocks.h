// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/number.h"

// out[j] = sum over blocks of parts[block][j] for j in [begin, end), in block order, in double.
namespace fastasr::cpu {

#define FASTASR_DECLARE(T) \
  void sum_blocks(const compute_t<T>* parts, int64_t blocks, int64_t width, int64_t begin, int64_t end, T* out);
FASTASR_DECLARE(float)
FASTASR_DECLARE(double)
FASTASR_DECLARE(bfloat16)
FASTASR_DECLARE(float16)
#undef FASTASR_DECLARE

}  // namespace fastasr::cpu
