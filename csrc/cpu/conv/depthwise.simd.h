// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

#include "cpu/number.h"

// depthwise_rows.h and depthwise_tile.h for *.simd.cpp. When the other kernels that include them have moved, their text
// moves here.
#if defined(__AVX512F__)
#define FASTASR_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTASR_VECTOR_BYTES 32
#else
#define FASTASR_VECTOR_BYTES 16
#endif

namespace fastasr::cpu {
inline namespace FASTASR_SIMD {
#include "cpu/depthwise_rows.h"
}  // namespace FASTASR_SIMD
}  // namespace fastasr::cpu
