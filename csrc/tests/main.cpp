// SPDX-License-Identifier: Apache-2.0
// Compiled for the baseline, so that it can say that the machine lacks an instruction set before any test runs.
#include <cstdio>
#include <cstring>

#include "tests/check.h"

namespace {

constexpr int kSkipped = 77;

struct Test {
  const char* name;
  void (*run)();
};

constexpr Test kTests[] = {
    {"numbers", fastasr::test::numbers},
    {"elementary", fastasr::test::elementary},
    {"swoosh", fastasr::test::swoosh},
    {"bias_norm", fastasr::test::bias_norm},
    {"bypass", fastasr::test::bypass},
    {"depthwise_conv2d", fastasr::test::depthwise_conv2d},
    {"nonlin_attention", fastasr::test::nonlin_attention},
    {"conv_spatial_gate", fastasr::test::conv_spatial_gate},
    {"depthwise_conv_residual", fastasr::test::depthwise_conv_residual},
    {"linear_activation", fastasr::test::linear_activation},
    {"gated_depthwise_conv", fastasr::test::gated_depthwise_conv},
    {"balancer_gradient", fastasr::test::balancer_gradient},
    {"skinny_gemm", fastasr::test::skinny_gemm},
    {"gemm", fastasr::test::gemm},
    {"zipformer_chunk", fastasr::test::zipformer_chunk},
    {"zipformer_layer_step", fastasr::test::zipformer_layer_step},
    {"weighted_values", fastasr::test::weighted_values},
    {"mega_step", fastasr::test::mega_step},
    {"simd", fastasr::test::simd},
    {"ema_scan", fastasr::test::ema_scan},
    {"complex_ema_scan", fastasr::test::complex_ema_scan},
    {"threads", fastasr::test::threads},
    {"rel_attention", fastasr::test::rel_attention},
    {"zipformer_attention", fastasr::test::zipformer_attention},
    {"zipformer_attention_weights", fastasr::test::zipformer_attention_weights},
    {"activation", fastasr::test::activation},
    {"layer_norm_lstm", fastasr::test::layer_norm_lstm},
    {"residual_norm", fastasr::test::residual_norm},
    {"rnnt_joiner", fastasr::test::rnnt_joiner},
    {"rnnt_lattice", fastasr::test::rnnt_lattice},
    {"rnnt_pruned_lattice", fastasr::test::rnnt_pruned_lattice},
    {"toeplitz_attention", fastasr::test::toeplitz_attention},
    {"segment_attention", fastasr::test::segment_attention},
    {"dropout", fastasr::test::dropout},
    {"emformer_step", fastasr::test::emformer_step},
};

bool machine_has(const char* level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512cd");
  if (std::strcmp(level, "x86-64-v3") == 0) return v3;
  if (std::strcmp(level, "x86-64-v4") == 0) return v4;
#endif
  return std::strcmp(level, "any") == 0 || std::strcmp(level, "x86-64") == 0;
}

}  // namespace

// usage: tests INSTRUCTION_SET TEST
int main(int argc, char** argv) {
  if (argc != 3) return 2;
  if (!machine_has(argv[1])) {
    std::printf("this machine has no %s\n", argv[1]);
    return kSkipped;
  }
  for (const Test& test : kTests) {
    if (std::strcmp(test.name, argv[2]) != 0) continue;
    test.run();
    if (fastasr::test::failures) std::printf("%d checks failed\n", fastasr::test::failures);
    return fastasr::test::failures != 0;
  }
  std::printf("no test named %s\n", argv[2]);
  return 2;
}
