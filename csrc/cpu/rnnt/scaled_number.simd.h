// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <limits>

#include "cpu/simd/vectors.simd.h"

// Vectors of positive numbers as m 2^e, with floating m and e: sums of probabilities that neither underflow nor round
// as logarithms do. An impossible number has e below kNever.
namespace fastasr::cpu {
inline namespace FASTASR_SIMD {

// Log probabilities below kLeast count as -inf; its number is kImpossible, and sums with it stay below kNever.
template <typename C>
constexpr C kLeast = static_cast<C>(-0x1p80);
template <typename C>
constexpr C kImpossible = static_cast<C>(-0x1p100);
template <typename C>
constexpr C kNever = static_cast<C>(-0x1p99);
template <typename C>
constexpr C kFloor = static_cast<C>(-0x1p101);

template <typename C>
FASTASR_INLINE Vector<C> exp_near_zero(Vector<C> r) {
  if constexpr (sizeof(C) == 4) {
    Vector<C> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * (r * r) + (r + 1.0f);
  } else {
    Vector<C> p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    return p * (r * r) + (r + 1.0);
  }
}

// Returns e^x = m 2^e, m in [0.7, 1.42]. A NaN and +inf give m = NaN. Beyond 2^22 e is rounded as x itself is, and r is
// kept small.
template <typename C>
FASTASR_INLINE void split(Vector<C> x, Vector<C>& m, Vector<C>& e) {
  const Vector<C> one = vector_of<C>(1);
  x = x < kLeast<C> ? vector_of(kImpossible<C>) : x;
  e = (x * static_cast<C>(1.4426950408889634) + Bits<C>::magic) - Bits<C>::magic;
  Vector<C> r;  // ln 2 in two parts: the products with the first are exact
  if constexpr (sizeof(C) == 4)
    r = (x - e * 0.693359375f) + e * 2.12194440e-4f;
  else
    r = (x - e * 0.693147180369123816490) - e * 1.90821492927058770002e-10;
  r = r < -one ? -one : r;
  r = r > one ? one : r;
  m = exp_near_zero<C>(r);
}

// Returns 2^d for d <= 0, or 0 where 2^d is no normal number.
template <typename C>
FASTASR_INLINE Vector<C> power_of_two(Vector<C> d) {
  const C least = -Bits<C>::bias;
  d = d > least ? d : vector_of(least);
  d = d + (Bits<C>::magic + Bits<C>::bias);
  return reinterpret_cast<Vector<C>>(reinterpret_cast<BitVector<C>>(d) << Bits<C>::mantissa);
}

// Makes 1 <= m < 2; a NaN stays one.
template <typename C>
FASTASR_INLINE void normalise(Vector<C>& m, Vector<C>& e) {
  using I = typename Bits<C>::integer;
  const BitVector<C> b = reinterpret_cast<BitVector<C>>(m);
  const I fraction = (I{1} << Bits<C>::mantissa) - 1, unit = static_cast<I>(Bits<C>::bias) << Bits<C>::mantissa;
  const Vector<C> exponent = __builtin_convertvector((b >> Bits<C>::mantissa) - Bits<C>::bias, Vector<C>);
  const Vector<C> one_to_two = reinterpret_cast<Vector<C>>((b & fraction) | unit);
  e = m == m ? e + exponent : e;
  m = m == m ? one_to_two : m;
  e = e > kFloor<C> ? e : vector_of(kFloor<C>);
}

// Returns the logarithm of one number, -inf where it is impossible.
template <typename C>
inline C logarithm(C m, C e) {
  if (m != m) return m;
  if (e < kNever<C>) return -std::numeric_limits<C>::infinity();
  return static_cast<C>(std::log(static_cast<double>(m)) + 0.6931471805599453 * static_cast<double>(e));
}

}  // namespace FASTASR_SIMD
}  // namespace fastasr::cpu
