// SPDX-License-Identifier: Apache-2.0
// One program runs every instruction set: FASTASR_SIMD in the environment picks it, as it does for the library.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>

#include "cpu/simd/simd.h"

constexpr int kSkipped = 77;

int main(int argc, char** argv) {
  using namespace fastasr::cpu;
  for (const char* problem : {machine_problem(), setting_problem()})
    if (problem) {
      std::printf("%s\n", problem);
      return kSkipped;
    }
  return doctest::Context(argc, argv).run();
}
