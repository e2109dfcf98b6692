// SPDX-License-Identifier: Apache-2.0
#include "cpu/ema_scan_block.h"

#include "cpu/simd.h"

namespace fastasr::cpu {
namespace {

template <typename C>
struct Blocks {
  EmaBlock<C> real, complex;
};

#if defined(__x86_64__) && !defined(FASTASR_NO_CLONES)

namespace avx512 {
#define FASTASR_TARGET __attribute__((target("arch=x86-64-v4")))
#define FASTASR_VECTOR 64
#define FASTASR_GROUP 4
#include "cpu/ema_scan_block_body.h"
}  // namespace avx512

namespace avx2 {
#define FASTASR_TARGET __attribute__((target("arch=x86-64-v3")))
#define FASTASR_VECTOR 32
#define FASTASR_GROUP 2
#include "cpu/ema_scan_block_body.h"
}  // namespace avx2

#endif

namespace portable {
#define FASTASR_TARGET
#if defined(__AVX512F__)
#define FASTASR_VECTOR 64
#define FASTASR_GROUP 4
#elif defined(__AVX2__)
#define FASTASR_VECTOR 32
#define FASTASR_GROUP 2
#else
#define FASTASR_VECTOR 16
#define FASTASR_GROUP 2
#endif
#include "cpu/ema_scan_block_body.h"
}  // namespace portable

template <typename C>
const Blocks<C>& chosen() {
#if defined(__x86_64__) && !defined(FASTASR_NO_CLONES)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    return avx512::kBlocks<C>;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return avx2::kBlocks<C>;
#endif
  return portable::kBlocks<C>;
}

}  // namespace

#define FASTASR_DEFINE(C)                                  \
  const EmaBlock<C>& ema_block(C) {                        \
    static const EmaBlock<C>& block = chosen<C>().real;    \
    return block;                                          \
  }                                                        \
  const EmaBlock<C>& complex_ema_block(C) {                \
    static const EmaBlock<C>& block = chosen<C>().complex; \
    return block;                                          \
  }

FASTASR_DEFINE(float)
FASTASR_DEFINE(double)

}  // namespace fastasr::cpu
