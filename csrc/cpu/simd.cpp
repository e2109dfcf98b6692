// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd.h"

namespace fastasr::cpu {

Simd simd() {
#if defined(__x86_64__)
  static const Simd level = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
      return Simd::avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Simd::avx2 : Simd::portable;
  }();
  return level;
#else
  return Simd::portable;
#endif
}

const char* simd_level() {
#if defined(__x86_64__)
  const Simd level = simd();
  return level == Simd::avx512 ? "x86-64-v4 (AVX-512)"
         : level == Simd::avx2 ? "x86-64-v3 (AVX2)"
                               : "x86-64 baseline (SSE2)";
#elif defined(__aarch64__)
  return "aarch64 (NEON)";
#else
  return "portable";
#endif
}

}  // namespace fastasr::cpu
