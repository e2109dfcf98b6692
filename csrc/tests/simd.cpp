// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/simd.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "tests/check.h"

namespace fastasr::test {

TEST_CASE("simd") {
  const cpu::Simd before = cpu::simd();
  using enum cpu::Simd;
  for (const cpu::Simd set :
       {portable, avx2, avx512, avx512_vnni, avx512_bf16, avx512_amx, neon, neon_dot, neon_bf16}) {
    const bool possible = cpu::use_simd(set);
    CHECK(cpu::simd() == set || !possible, "%d was not taken", int(set));
#if defined(__x86_64__)
    __builtin_cpu_init();
    CHECK(!possible || set < cpu::Simd::avx2 || __builtin_cpu_supports("avx2"), "no AVX2 here");
    CHECK(!possible || set < cpu::Simd::avx512 || __builtin_cpu_supports("avx512vl"), "no AVX-512 here");
    CHECK(!possible || set < avx512_vnni || __builtin_cpu_supports("avx512vnni"), "no VNNI here");
    unsigned a, b, c, d = 0;  // GCC 12's function does not know AMX
    CHECK(!possible || set != avx512_amx || (__get_cpuid_count(7, 0, &a, &b, &c, &d) && d & 1u << 24), "no AMX here");
    CHECK(!possible || set < avx512_bf16 || __builtin_cpu_supports("avx512bf16"), "no BF16 here");
#endif
    CHECK(std::strlen(cpu::simd_level()) > 0 && std::strlen(cpu::simd_name()) > 0, "a set has no name");
  }
  CHECK(cpu::use_simd(before), "no way back");
  // No library may turn denormals off for the process.
  volatile float small = 0x1p-140f;
  CHECK(small * 0.5f == 0x1p-141f, "denormals are flushed");
}

}  // namespace fastasr::test
