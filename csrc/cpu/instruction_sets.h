// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/simd.h"

// For kernels that are written with vector types: their bodies are included once per instruction set, each in a
// namespace of its own, and picked by FASTASR_DISPATCH. FASTASR_SETS: 3 on x86-64, the compiler's own set alone
// elsewhere and under FASTASR_NO_CLONES.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(FASTASR_NO_CLONES)
#define FASTASR_SETS 3
#define FASTASR_DISPATCH(call)         \
  do {                                 \
    switch (fastasr::cpu::simd()) {    \
      case fastasr::cpu::Simd::avx512: \
        return v4::call;               \
      case fastasr::cpu::Simd::avx2:   \
        return v3::call;               \
      default:                         \
        return v1::call;               \
    }                                  \
  } while (false)
#else
#define FASTASR_SETS 1
#define FASTASR_DISPATCH(call) return v1::call
#if defined(__AVX512F__)
#define FASTASR_NATIVE_BYTES 64
#elif defined(__AVX2__)
#define FASTASR_NATIVE_BYTES 32
#else
#define FASTASR_NATIVE_BYTES 16
#endif
#endif
