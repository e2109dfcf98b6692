// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/simd.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace fastasr::cpu {
namespace {

#if defined(__x86_64__)
// Says whether this process may use AMX's tiles. Linux saves their 8 KiB for a thread only after the process has asked.
bool tiles_granted() {
#ifdef __linux__
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, since Linux 5.16
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

// Checks for all that the flags in CMakeLists.txt let the compiler use, and whether the operating system saves the
// registers.
Simd of_machine() {
#if defined(__x86_64__)
  constexpr unsigned kLeaf1 = 1u << 0 | 1u << 9 | 1u << 12 | 1u << 13 | 1u << 19 | 1u << 20 | 1u << 22 | 1u << 23 |
                              1u << 27 | 1u << 28 | 1u << 29;  // SSE3 to SSE4.2, FMA, MOVBE, POPCNT, OSXSAVE, AVX, F16C
  constexpr unsigned kLeaf7 = 1u << 3 | 1u << 5 | 1u << 8;     // BMI1, AVX2, BMI2
  constexpr unsigned kWide = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;  // AVX-512 F, DQ, CD, BW, VL
  constexpr unsigned kTiles = 1u << 22 | 1u << 24 | 1u << 25;                       // AMX BF16, TILE, INT8
  constexpr unsigned kExtended = 1u << 0 | 1u << 5;                                 // LAHF, LZCNT
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kLeaf1) != kLeaf1) return Simd::portable;
  if (!__get_cpuid(0x80000001u, &a, &b, &c, &d) || (c & kExtended) != kExtended) return Simd::portable;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b & kLeaf7) != kLeaf7) return Simd::portable;
  unsigned saved, unused;
  asm volatile("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));
  if ((saved & 0x06u) != 0x06u) return Simd::portable;
  if ((b & kWide) != kWide || (saved & 0xe6u) != 0xe6u) return Simd::avx2;
  if (!(c & 1u << 11)) return Simd::avx512;
  const bool tiles = (d & kTiles) == kTiles && (saved & 0x60000u) == 0x60000u;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return Simd::avx512_vnni;
  return tiles && tiles_granted() ? Simd::avx512_amx : Simd::avx512_bf16;
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kDot = HWCAP_CRC32 | HWCAP_ATOMICS | HWCAP_ASIMDRDM | HWCAP_ASIMDDP;  // armv8.2-a+dotprod
  constexpr unsigned long kWide = HWCAP2_I8MM | HWCAP2_BF16;
  if ((getauxval(AT_HWCAP) & kDot) != kDot) return Simd::neon;
  return (getauxval(AT_HWCAP2) & kWide) == kWide ? Simd::neon_bf16 : Simd::neon_dot;
#elif defined(__aarch64__)
  return Simd::neon;
#else
  return Simd::portable;
#endif
}

using enum Simd;
constexpr Simd kBuilt[] = {FASTASR_SETS};  // in ascending order

struct Named {
  const char *name, *level;
};
constexpr Named kSets[] = {
#if defined(__x86_64__)
    {"portable", "x86-64 baseline (SSE2)"},
#else
    {"portable", "portable"},
#endif
    {"avx2", "x86-64-v3 (AVX2)"},
    {"avx512", "x86-64-v4 (AVX-512)"},
    {"avx512_vnni", "x86-64-v4 (AVX-512, VNNI)"},
    {"avx512_bf16", "x86-64-v4 (AVX-512, VNNI, BF16)"},
    {"avx512_amx", "x86-64-v4 (AVX-512, VNNI, BF16, AMX)"},
    {"neon", "aarch64 (NEON)"},
    {"neon_dot", "aarch64 (NEON, dot products)"},
    {"neon_bf16", "aarch64 (NEON, dot products, I8MM, BF16)"},
};

const char* name(Simd set) { return kSets[static_cast<int>(set)].name; }

bool built(Simd set) { return std::find(std::begin(kBuilt), std::end(kBuilt), set) != std::end(kBuilt); }

// Returns FASTASR_SIMD, or null if it is not set.
const char* setting() {
  const char* wanted = std::getenv("FASTASR_SIMD");
  return wanted && *wanted ? wanted : nullptr;
}

__attribute__((constructor)) void choose() {
  const Simd machine = of_machine();
  for (const Simd set : kBuilt) {
    if (set > machine) break;
    simd_in_use = set;
    if (setting() && std::strcmp(name(set), setting()) == 0) break;
  }
}

}  // namespace

constinit Simd simd_in_use = kBuilt[0];

const char* simd_name() { return name(simd()); }

const char* simd_level() { return kSets[static_cast<int>(simd())].level; }

const char* machine_problem() {
  static const std::string text = of_machine() >= kBuilt[0]
                                      ? ""
                                      : std::string("this build of fastasr needs the instruction set ") +
                                            name(kBuilt[0]) + ", this machine has " + name(of_machine()) +
                                            " alone: build it with CMAKE_ARGS=-DFASTASR_SETS=" + name(of_machine());
  return text.empty() ? nullptr : text.c_str();
}

const char* setting_problem() {
  static const std::string text = [] {
    if (!setting()) return std::string();
    std::string sets;
    for (const Simd set : kBuilt) {
      if (set > of_machine()) break;
      if (std::strcmp(name(set), setting()) == 0) return std::string();
      sets += std::string(sets.empty() ? "" : " or ") + name(set);
    }
    return "FASTASR_SIMD: expected " + sets + " (what this build has and this machine runs), got '" + setting() + "'";
  }();
  return text.empty() ? nullptr : text.c_str();
}

bool use_simd(Simd set) {
  if (set > of_machine() || !built(set)) return false;
  simd_in_use = set;
  return true;
}

}  // namespace fastasr::cpu
