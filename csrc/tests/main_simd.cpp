// SPDX-License-Identifier: Apache-2.0
// Tests of kernels in *.simd.cpp: one program, every instruction set. Replaces main.cpp when all kernels have moved.
#include <cstdio>
#include <cstring>

#include "cpu/simd.h"
#include "tests/check.h"

namespace {

constexpr int kSkipped = 77;

constexpr struct {
  const char* name;
  fastasr::cpu::Simd simd;
} kSets[] = {{"portable", fastasr::cpu::Simd::portable},
             {"avx2", fastasr::cpu::Simd::avx2},
             {"avx512", fastasr::cpu::Simd::avx512}};

constexpr struct {
  const char* name;
  void (*run)();
} kTests[] = {{"simd", fastasr::test::simd},
              {"swoosh", fastasr::test::swoosh},
              {"bypass", fastasr::test::bypass},
              {"gated_depthwise_conv", fastasr::test::gated_depthwise_conv}};

}  // namespace

// usage: tests INSTRUCTION_SET TEST
int main(int argc, char** argv) {
  if (argc != 3) return 2;
  for (const auto& set : kSets) {
    if (std::strcmp(set.name, argv[1]) == 0 && !fastasr::cpu::use_simd(set.simd)) {
      std::printf("this machine, or this build, has no %s\n", argv[1]);
      return kSkipped;
    }
  }
  for (const auto& test : kTests) {
    if (std::strcmp(test.name, argv[2]) != 0) continue;
    test.run();
    if (fastasr::test::failures) std::printf("%d checks failed\n", fastasr::test::failures);
    return fastasr::test::failures != 0;
  }
  std::printf("no test named %s\n", argv[2]);
  return 2;
}
