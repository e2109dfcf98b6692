// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/simd/kernels.h"

// Vectors of the instruction set that a *.simd.cpp is compiled for, their transposition and their sums.
namespace fastasr::cpu {
inline namespace FASTASR_SIMD {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <typename C>
struct Bits;
template <>
struct Bits<float> {
  using integer = int32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float magic = 12582912.0f;  // 1.5 2^23: adding it rounds and leaves an integer in the low bits
};
template <>
struct Bits<double> {
  using integer = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double magic = 6755399441055744.0;
};

template <typename C>
struct Lanes {
  using integer = typename Bits<C>::integer;
  static constexpr int count = kVectorBytes / static_cast<int>(sizeof(C));
  typedef C vector __attribute__((vector_size(kVectorBytes)));
  typedef integer bits __attribute__((vector_size(kVectorBytes)));
  typedef C memory __attribute__((vector_size(kVectorBytes), aligned(sizeof(C)), may_alias));
};
template <typename C>
using Vector = typename Lanes<C>::vector;
template <typename C>
using BitVector = typename Lanes<C>::bits;

template <typename C>
FASTASR_INLINE Vector<C> vector_of(C v) {
  return v - Vector<C>{};
}
template <typename C>
FASTASR_INLINE Vector<C> at(const C* p) {
  return *reinterpret_cast<const typename Lanes<C>::memory*>(p);
}
template <typename C>
FASTASR_INLINE void put(C* p, Vector<C> v) {
  *reinterpret_cast<typename Lanes<C>::memory*>(p) = v;
}

// Lanes without kBit in their number come from a, the others from b, kBit lanes below; with kHigh the other half of
// both.
template <typename C, int kBit, bool kHigh, int... kJ>
FASTASR_INLINE Vector<C> mixed(Vector<C> a, Vector<C> b, std::integer_sequence<int, kJ...>) {
  constexpr int n = Lanes<C>::count;
  return __builtin_shufflevector(a, b,
                                 (kHigh ? (kJ & kBit ? n + kJ : kJ + kBit) : (kJ & kBit ? n + kJ - kBit : kJ))...);
}
template <typename C, int kBit, bool kHigh>
FASTASR_INLINE Vector<C> mixed(Vector<C> a, Vector<C> b) {
  return mixed<C, kBit, kHigh>(a, b, std::make_integer_sequence<int, Lanes<C>::count>());
}

template <typename C, int kBit>
FASTASR_INLINE void transpose_bit(Vector<C>* r) {
  constexpr int n = Lanes<C>::count;
#pragma GCC unroll 16
  for (int i = 0; i < n; i++) {
    if (i & kBit) continue;
    const Vector<C> a = r[i], b = r[i + kBit];
    r[i] = mixed<C, kBit, false>(a, b);
    r[i + kBit] = mixed<C, kBit, true>(a, b);
  }
}
// r holds as many vectors as a vector has lanes: a square matrix.
template <typename C>
FASTASR_INLINE void transpose(Vector<C>* r) {
  if constexpr (Lanes<C>::count > 8) transpose_bit<C, 8>(r);
  if constexpr (Lanes<C>::count > 4) transpose_bit<C, 4>(r);
  if constexpr (Lanes<C>::count > 2) transpose_bit<C, 2>(r);
  transpose_bit<C, 1>(r);
}

// Sets r[0] to the sums of the vectors r[0], r[1], ...: as many as a vector has lanes. It takes half the shuffles of a
// transposition.
template <typename C, int kBit = Lanes<C>::count / 2>
FASTASR_INLINE void sum_each(Vector<C>* r) {
#pragma GCC unroll 16
  for (int i = 0; i < kBit; i++) {
    const Vector<C> a = r[i], b = r[i + kBit];
    r[i] = mixed<C, kBit, false>(a, b) + mixed<C, kBit, true>(a, b);
  }
  if constexpr (kBit > 1) sum_each<C, kBit / 2>(r);
}

// Returns op over all lanes, in every lane. op commutes.
template <typename C, int kBit, typename Op, int... kJ>
FASTASR_INLINE Vector<C> across(Vector<C> v, const Op& op, std::integer_sequence<int, kJ...> lanes) {
  v = op(v, __builtin_shufflevector(v, v, (kJ ^ kBit)...));
  if constexpr (kBit > 1) return across<C, kBit / 2>(v, op, lanes);
  return v;
}
template <typename C, typename Op>
FASTASR_INLINE Vector<C> across(Vector<C> v, const Op& op) {
  return across<C, Lanes<C>::count / 2>(v, op, std::make_integer_sequence<int, Lanes<C>::count>());
}

// The smaller and the larger of each lane; those of b where one is NaN. The compiler makes two instructions of the
// formula, since it keeps the sign of zeros.
FASTASR_INLINE Vector<float> smaller(Vector<float> a, Vector<float> b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
FASTASR_INLINE Vector<float> larger(Vector<float> a, Vector<float> b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

}  // namespace FASTASR_SIMD
}  // namespace fastasr::cpu
