// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// Each kernel is compiled once per instruction set and picked when the library is loaded. Write plain loops with
// `omp simd`: vector extensions are a trap under target_clones, and "avx2,fma" or "arch=haswell" select wrongly.
// FASTASR_NO_CLONES: thread sanitizer cannot run inside the resolvers.
#if defined(__x86_64__) && !defined(FASTASR_NO_CLONES)
#define FASTASR_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FASTASR_CLONES
#endif
#define FASTASR_INLINE static inline __attribute__((always_inline))

namespace fastasr::cpu {

// The instruction set that FASTASR_CLONES resolves to on this machine.
enum class Simd { portable, avx2, avx512 };
Simd simd();
const char* simd_level();

}  // namespace fastasr::cpu
