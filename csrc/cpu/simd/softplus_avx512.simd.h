// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/math/number.h"

// Computes log(1 + e^-t), t >= 0, sixteen at a time, from 32 pieces of degree 5. Their coefficients stay in registers,
// and a permutation of two registers picks them. 0.26 ns per Swoosh on one Zen 4 core against 0.46 for an exponential
// and a logarithm in polynomial form, at the same error. The compiler does not find such a form, hence the intrinsics.
#ifdef __AVX512F__

#include <immintrin.h>

#include <cmath>
#include <utility>

namespace fastasr::cpu {
inline namespace FASTASR_SIMD {

// Piece k covers the t for which t * kPerUnit rounds to k; beyond the last one log(1 + e^-t) < 3e-8 is constant.
struct Softplus {
  static constexpr int kPieces = 32, kTerms = 6;
  static constexpr float kLast = 17.7f, kPerUnit = 31.49f / kLast;
  alignas(64) float coefficient[kTerms][kPieces];  // coefficients of r^j, r = t * kPerUnit - k in [-1/2, 1/2]

  static const Softplus& table() {
    static const Softplus instance;
    return instance;
  }

 private:
  // Interpolates at the Chebyshev nodes of each piece, in double: within 2e-8 of the best polynomial.
  Softplus() {
    for (int k = 0; k < kPieces; k++) {
      double a[kTerms][kTerms + 1];
      for (int i = 0; i < kTerms; i++) {
        const double r = 0.5 * std::cos((i + 0.5) * 3.14159265358979323846 / kTerms);
        double power = 1;
        for (int j = 0; j < kTerms; j++, power *= r) a[i][j] = power;
        a[i][kTerms] = std::log1p(std::exp(-(k + r) / static_cast<double>(kPerUnit)));
      }
      for (int i = 0; i < kTerms; i++) {  // Gauss-Jordan with pivoting
        int pivot = i;
        for (int j = i; j < kTerms; j++)
          if (std::fabs(a[j][i]) > std::fabs(a[pivot][i])) pivot = j;
        for (int c = 0; c <= kTerms; c++) std::swap(a[i][c], a[pivot][c]);
        for (int j = 0; j < kTerms; j++) {
          if (j == i) continue;
          const double f = a[j][i] / a[i][i];
          for (int c = i; c <= kTerms; c++) a[j][c] -= f * a[i][c];
        }
      }
      for (int i = 0; i < kTerms; i++) coefficient[i][k] = static_cast<float>(a[i][kTerms] / a[i][i]);
    }
  }
};

struct Registers {
  __m512 low[Softplus::kTerms], high[Softplus::kTerms];
};

FASTASR_INLINE Registers load_table() {
  const Softplus& table = Softplus::table();
  Registers r;
  for (int j = 0; j < Softplus::kTerms; j++) {
    r.low[j] = _mm512_load_ps(table.coefficient[j]);
    r.high[j] = _mm512_load_ps(table.coefficient[j] + 16);
  }
  return r;
}

// Returns log(1 + e^-|z|). A NaN gives the value at the last piece: callers add a term that keeps it.
FASTASR_INLINE __m512 softplus_tail(const Registers& c, __m512 z) {
  const __m512 magic = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: adding it rounds, and leaves k in the low bits
  const __m512 t = _mm512_min_ps(_mm512_abs_ps(z), _mm512_set1_ps(Softplus::kLast));
  const __m512 per_unit = _mm512_set1_ps(Softplus::kPerUnit), rounded = _mm512_fmadd_ps(t, per_unit, magic);
  const __m512 r = _mm512_fmsub_ps(t, per_unit, _mm512_sub_ps(rounded, magic));
  const __m512i k = _mm512_castps_si512(rounded);
  __m512 p = _mm512_permutex2var_ps(c.low[5], k, c.high[5]);
  p = _mm512_fmadd_ps(p, r, _mm512_permutex2var_ps(c.low[4], k, c.high[4]));
  p = _mm512_fmadd_ps(p, r, _mm512_permutex2var_ps(c.low[3], k, c.high[3]));
  p = _mm512_fmadd_ps(p, r, _mm512_permutex2var_ps(c.low[2], k, c.high[2]));
  p = _mm512_fmadd_ps(p, r, _mm512_permutex2var_ps(c.low[1], k, c.high[1]));
  return _mm512_fmadd_ps(p, r, _mm512_permutex2var_ps(c.low[0], k, c.high[0]));
}

// Returns log(1 + e^(x - shift)) - 0.08 x - offset. Near 0 the offset cancels the logarithm: it is subtracted first,
// which is exact there.
FASTASR_INLINE __m512 swoosh(const Registers& c, __m512 x, float shift, float offset) {
  const __m512 z = _mm512_sub_ps(x, _mm512_set1_ps(shift));
  const __m512 tail = _mm512_sub_ps(softplus_tail(c, z), _mm512_set1_ps(offset));
  // The terms that do not wait for the tail come first: the other order costs 8 %.
  return _mm512_add_ps(tail, _mm512_fmadd_ps(x, _mm512_set1_ps(-0.08f), _mm512_max_ps(z, _mm512_setzero_ps())));
}

// Returns the mask of the lanes that exist where n elements are left.
FASTASR_INLINE __mmask16 lanes(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }

// Converts sixteen elements to and from float; `m` selects the lanes that exist.
FASTASR_INLINE __m512 load16(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
FASTASR_INLINE __m512 load16(const bfloat16* p, __mmask16 m) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}
FASTASR_INLINE __m512 load16(const float16* p, __mmask16 m) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)); }
FASTASR_INLINE void store16(float* p, __mmask16 m, __m512 v) { _mm512_mask_storeu_ps(p, m, v); }
FASTASR_INLINE void store16(bfloat16* p, __mmask16 m, __m512 v) {
  const __m512i u = _mm512_castps_si512(v);  // rounds to nearest even; a NaN stays a (quiet) NaN
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  _mm256_mask_storeu_epi16(p, m, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0))));
}
FASTASR_INLINE void store16(float16* p, __mmask16 m, __m512 v) {
  _mm256_mask_storeu_epi16(p, m, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace FASTASR_SIMD
}  // namespace fastasr::cpu

#endif
