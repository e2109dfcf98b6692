// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "cpu/math/number.h"

// Elementary functions as polynomials that vectorise. The coefficients have least maximum relative error and were
// fitted in double.
namespace fastasr::cpu {

// Computes a b + c, with one rounding where the machine can. If a product is used twice, Clang fuses neither use unless
// told to; GCC under sanitizers fuses one use in one loop and both in another, so their values differ.
FASTASR_INLINE float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Returns e^x = p 2^n: p, and n in the low bits of *shifted. Adding 1.5 * 2^23 rounds x log2(e) to n and leaves it
// there: a rounding instruction would not vectorise, and a NaN has no integer.
FASTASR_INLINE float exp_parts(float x, uint32_t* shifted) {
  const float t = multiply_add(x, 1.44269504f, 12582912.0f), n = t - 12582912.0f;
  *shifted = static_cast<uint32_t>(to_bits(t));
  // Computes x log2(e) - n with two parts of log2(e): exact to 2^-31 over the whole range.
  const float f = multiply_add(x, 1.44269504f, -n) + x * 1.92596303e-8f;
  float p = 1.53458110e-4f;
  p = p * f + 1.33999309e-3f;
  p = p * f + 9.61848907e-3f;
  p = p * f + 5.55032864e-2f;
  p = p * f + 2.40226462e-1f;
  p = p * f + 6.93147182e-1f;
  return p * f + 1.0f;
}

// Returns e^x for x <= 0. Below -87 the result is e^-87 (1.6e-38), which no caller can tell from 0.
FASTASR_INLINE float exp_nonpositive(float x) {
  uint32_t n;
  const float p = exp_parts(x < -87.0f ? -87.0f : x, &n);
  return p * from_bits(static_cast<int32_t>((n + 127) << 23));
}
FASTASR_INLINE double exp_nonpositive(double x) { return std::exp(x); }

// Returns e^x for x <= 0, exactly 0 below -87.3 (where float has no normal number left); NaN stays NaN.
FASTASR_INLINE float exp_or_zero(float x) {
  uint32_t n;
  const uint32_t scaled = static_cast<uint32_t>(to_bits(exp_parts(x, &n)));
  const float finite = x < -87.3f ? 0.0f : from_bits(static_cast<int32_t>(scaled + (n << 23)));
  return x == x ? finite : x;  // the shift above would make a number of a NaN's low bits
}
FASTASR_INLINE double exp_or_zero(double x) { return std::exp(x); }

// Returns log(1 + u) for 0 <= u <= 1 with relative error 5e-9 before rounding.
FASTASR_INLINE float log1p_unit(float u) {
  float p = -3.24402121e-3f;
  p = p * u + 1.98514443e-2f;
  p = p * u + -5.69594987e-2f;
  p = p * u + 1.06036514e-1f;
  p = p * u + -1.53055906e-1f;
  p = p * u + 1.96759388e-1f;
  p = p * u + -2.49541342e-1f;
  p = p * u + 3.33299637e-1f;
  p = p * u + -4.99999017e-1f;
  p = p * u + 1.0f;
  return p * u;
}
FASTASR_INLINE double log1p_unit(double u) { return std::log1p(u); }

}  // namespace fastasr::cpu
