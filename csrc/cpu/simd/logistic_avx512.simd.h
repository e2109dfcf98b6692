// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/simd/softplus_avx512.simd.h"

// Computes 1 / (1 + e^-x), sixteen at a time, with an exponential without bit operations and a reciprocal by one Newton
// step in place of a division. The result is within 1.5 ulp, down to 2^-126, and 0 for smaller x, because callers
// multiply it by x.
#ifdef __AVX512F__

namespace fastasr::cpu {
inline namespace FASTASR_SIMD {

FASTASR_INLINE __m512 logistic(__m512 x) {
  const __m512 log2e = _mm512_set1_ps(-1.44269504f), limit = _mm512_set1_ps(87.3365f);
  const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_sub_ps(_mm512_setzero_ps(), limit), _CMP_NLT_UQ);
  // the operand order keeps a NaN
  x = _mm512_min_ps(limit, _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), limit), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_fmadd_ps(x, _mm512_set1_ps(-1.92596303e-8f), _mm512_fmsub_ps(x, log2e, n));
  __m512 p = _mm512_set1_ps(1.53458110e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.33999309e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.61848907e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55032864e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40226462e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147182e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  const __m512 d = _mm512_add_ps(_mm512_scalef_ps(p, n), _mm512_set1_ps(1.0f));
  const __m512 r = _mm512_rcp14_ps(d);
  return _mm512_maskz_fmadd_ps(above, r, _mm512_fnmadd_ps(d, r, _mm512_set1_ps(1.0f)), r);
}

}  // namespace FASTASR_SIMD
}  // namespace fastasr::cpu

#endif
