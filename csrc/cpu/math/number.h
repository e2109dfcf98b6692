// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd/simd.h"

// Storage types of the kernels, and the type that each is computed in: float for 16-bit types and float, double for
// double.
namespace fastasr::cpu {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <typename T>
using compute_t = typename Compute<T>::type;

FASTASR_INLINE float from_bits(int32_t i) {
  float f;
  std::memcpy(&f, &i, 4);
  return f;
}
FASTASR_INLINE int32_t to_bits(float f) {
  int32_t i;
  std::memcpy(&i, &f, 4);
  return i;
}

FASTASR_INLINE float load(float v) { return v; }
FASTASR_INLINE double load(double v) { return v; }
FASTASR_INLINE float load(bfloat16 v) { return from_bits(static_cast<int32_t>(static_cast<uint32_t>(v.bits) << 16)); }

// Half is converted by integer arithmetic: the compiler vectorises neither _Float16 nor a branch.
FASTASR_INLINE float load(float16 v) {
  const uint32_t magnitude = (v.bits & 0x7fffu) << 13;
  // multiplying rebiases the exponent, also of subnormals
  const uint32_t finite = static_cast<uint32_t>(to_bits(from_bits(static_cast<int32_t>(magnitude)) * 0x1p112f));
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  return from_bits(static_cast<int32_t>(sign | (magnitude >= 0x0f800000u ? special : finite)));
}

FASTASR_INLINE void store(float* p, float v) { *p = v; }
FASTASR_INLINE void store(double* p, double v) { *p = v; }
FASTASR_INLINE void store(float16* p, float v) {
  // rounds to nearest even; 65520 and above is infinite; a NaN stays a (quiet) NaN
  const uint32_t u = static_cast<uint32_t>(to_bits(v)), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  // subnormal halves: adding 0.5 leaves the rounded mantissa in the low bits
  const uint32_t subnormal = static_cast<uint32_t>(to_bits(from_bits(static_cast<int32_t>(a)) + 0.5f)) - 0x3f000000u;
  const uint32_t normal = (a + 0xc8000fffu + ((a >> 13) & 1u)) >> 13;
  uint32_t h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h;
  h = a > 0x7f800000u ? 0x7e00u : h;
  p->bits = static_cast<uint16_t>(sign | h);
}
FASTASR_INLINE void store(bfloat16* p, float v) {
  // rounds to nearest even; a NaN stays a (quiet) NaN
  const uint32_t u = static_cast<uint32_t>(to_bits(v));
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p->bits = v != v ? static_cast<uint16_t>(0x7fc0) : static_cast<uint16_t>(rounded);
}

// Converts n numbers.
template <typename From, typename To>
FASTASR_INLINE void convert(const From* __restrict from, To* __restrict to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) store(&to[i], load(from[i]));
}

// Returns n numbers in the compute type: themselves, or their values in `room`.
template <typename T, typename C = compute_t<T>>
FASTASR_INLINE const C* widened(const T* from, C* room, int64_t n) {
  if constexpr (std::is_same_v<T, C>) return from;
  if constexpr (!std::is_same_v<T, C>) convert(from, room, n);
  return room;
}

// Copies n <= kWhole numbers and converts them. The compiler knows the length of a whole row, whose copy is then not a
// call of memmove.
template <int64_t kWhole, typename From, typename To>
FASTASR_INLINE void copy_row(const From* __restrict from, To* __restrict to, int64_t n) {
  if (n < kWhole)
    convert(from, to, n);
  else if constexpr (std::is_same_v<From, To>)
    std::memcpy(to, from, sizeof(To) * kWhole);
  else
    convert(from, to, kWhole);
}

}  // namespace fastasr::cpu
