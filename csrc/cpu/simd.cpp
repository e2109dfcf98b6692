// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastasr::cpu {
namespace {

// All that -march=x86-64-v3 and -v4 let the compiler use, if the operating system saves the registers.
Simd of_machine() {
#if defined(__x86_64__)
  constexpr unsigned kLeaf1 = 1u << 0 | 1u << 9 | 1u << 12 | 1u << 13 | 1u << 19 | 1u << 20 | 1u << 22 | 1u << 23 |
                              1u << 27 | 1u << 28 | 1u << 29;  // SSE3 to SSE4.2, FMA, MOVBE, POPCNT, OSXSAVE, AVX, F16C
  constexpr unsigned kLeaf7 = 1u << 3 | 1u << 5 | 1u << 8;     // BMI1, AVX2, BMI2
  constexpr unsigned kWide = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;  // AVX-512 F, DQ, CD, BW, VL
  constexpr unsigned kExtended = 1u << 0 | 1u << 5;                                 // LAHF, LZCNT
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kLeaf1) != kLeaf1) return Simd::portable;
  if (!__get_cpuid(0x80000001u, &a, &b, &c, &d) || (c & kExtended) != kExtended) return Simd::portable;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b & kLeaf7) != kLeaf7) return Simd::portable;
  unsigned saved, unused;
  asm volatile("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));
  if ((saved & 0x06u) != 0x06u) return Simd::portable;
  return (b & kWide) == kWide && (saved & 0xe6u) == 0xe6u ? Simd::avx512 : Simd::avx2;
#else
  return Simd::portable;
#endif
}

using enum Simd;
constexpr Simd kBuilt[] = {FASTASR_SETS};  // in ascending order
constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

// The widest built one up to `most`.
Simd up_to(Simd most) {
  Simd found = kBuilt[0];
  for (const Simd set : kBuilt)
    if (set <= most) found = set;
  return found;
}

// What FASTASR_SIMD allows.
Simd allowed(Simd most) {
  if (const char* wanted = std::getenv("FASTASR_SIMD"))
    for (const Simd set : kBuilt)
      if (std::strcmp(kNames[static_cast<int>(set)], wanted) == 0 && set < most) return set;
  return most;
}

__attribute__((constructor)) void choose() { simd_in_use = up_to(allowed(of_machine())); }

}  // namespace

constinit Simd simd_in_use = kBuilt[0];

const char* simd_level() {
#if defined(__x86_64__)
  constexpr const char* levels[] = {"x86-64 baseline (SSE2)", "x86-64-v3 (AVX2)", "x86-64-v4 (AVX-512)"};
  return levels[static_cast<int>(simd())];
#elif defined(__aarch64__)
  return "aarch64 (NEON)";
#else
  return "portable";
#endif
}

bool use_simd(Simd level) {
  if (level > of_machine() || up_to(level) != level) return false;
  simd_in_use = level;
  return true;
}

}  // namespace fastasr::cpu
