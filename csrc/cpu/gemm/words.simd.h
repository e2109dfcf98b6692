// SPDX-License-Identifier: Apache-2.0
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

#include <cstring>

#include "cpu/simd/vectors.simd.h"

// Words of four bytes, which products of short numbers read: four integers of 8 bits, or two bfloat16.
namespace fastasr::cpu {
inline namespace FASTASR_SIMD {

using Ints = BitVector<float>;
using Floats = Vector<float>;

FASTASR_INLINE Ints broadcast(int32_t v) { return v - Ints{}; }
FASTASR_INLINE Ints load_words(const void* p) {
  Ints v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool kBf16Instruction = true;
#else
constexpr bool kBf16Instruction = false;
#endif

// Adds the products of the two bfloat16 of each word.
FASTASR_INLINE Floats add_bf16(Floats sum, Ints x, Ints w) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Floats>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w)));
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return vbfdotq_f32(sum, reinterpret_cast<bfloat16x8_t>(x), reinterpret_cast<bfloat16x8_t>(w));
#else
  const Ints high = broadcast(static_cast<int32_t>(0xffff0000u));
  sum += reinterpret_cast<Floats>(x << 16) * reinterpret_cast<Floats>(w << 16);
  return sum + reinterpret_cast<Floats>(x & high) * reinterpret_cast<Floats>(w & high);
#endif
}

}  // namespace FASTASR_SIMD
}  // namespace fastasr::cpu
