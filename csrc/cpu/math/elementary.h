// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "cpu/math/number.h"

// Elementary functions as polynomials that vectorise. The coefficients have least maximum relative error and were
// fitted in double.
namespace fastasr::cpu {

// Returns e^x for x <= 0. Below -87 the result is e^-87 (1.6e-38), which no caller can tell from 0.
FASTASR_INLINE float exp_nonpositive(float x) {
  x = x < -87.0f ? -87.0f : x;
  // Rounds x log2(e) to an integer by adding 1.5 * 2^23, which leaves the integer in the low bits: a rounding
  // instruction would not vectorise, and a NaN has no integer.
  const float t = x * 1.44269504f + 12582912.0f, n = t - 12582912.0f;
  // Computes x log2(e) - n with two parts of log2(e): exact to 2^-31 over the whole range.
  const float f = (x * 1.44269504f - n) + x * 1.92596303e-8f;
  float p = 1.53458110e-4f;
  p = p * f + 1.33999309e-3f;
  p = p * f + 9.61848907e-3f;
  p = p * f + 5.55032864e-2f;
  p = p * f + 2.40226462e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.0f;
  return p * from_bits(static_cast<int32_t>((static_cast<uint32_t>(to_bits(t)) + 127) << 23));
}
FASTASR_INLINE double exp_nonpositive(double x) { return std::exp(x); }

// Returns e^x for x <= 0, exactly 0 below -87.3 (where float has no normal number left); NaN stays NaN.
FASTASR_INLINE float exp_or_zero(float x) {
  const float t = x * 1.44269504f + 12582912.0f, n = t - 12582912.0f;
  const float f = (x * 1.44269504f - n) + x * 1.92596303e-8f;
  float p = 1.53458110e-4f;
  p = p * f + 1.33999309e-3f;
  p = p * f + 9.61848907e-3f;
  p = p * f + 5.55032864e-2f;
  p = p * f + 2.40226462e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.0f;
  const uint32_t scaled = static_cast<uint32_t>(to_bits(p)) + (static_cast<uint32_t>(to_bits(t)) << 23);
  const float finite = x < -87.3f ? 0.0f : from_bits(static_cast<int32_t>(scaled));
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
