// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd.h"

#include "tests/check.h"

namespace fastasr::test {

void simd() {
  const char* level = cpu::simd_level();
#if defined(__x86_64__)
  __builtin_cpu_init();
  const char* expected = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") ? "x86-64-v4"
                         : __builtin_cpu_supports("avx2")                                         ? "x86-64-v3"
                                                                                                  : "x86-64 baseline";
  CHECK(std::strncmp(level, expected, std::strlen(expected)) == 0, "expected %s, got %s", expected, level);
#else
  CHECK(std::strlen(level) > 0, "a level has a name");
#endif
  // No library may turn denormals off for the process.
  volatile float small = 0x1p-140f;
  CHECK(small * 0.5f == 0x1p-141f, "denormals are flushed");
}

}  // namespace fastasr::test
