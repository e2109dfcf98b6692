// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/number.h"

// The sum of lanes, by halves: its rounding error grows with the logarithm of their number.
template <typename C, int N>
FASTASR_INLINE C sum_of_lanes(C (&lanes)[N]) {
  for (int half = N / 2; half > 0; half /= 2)
    for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
  return lanes[0];
}

// What attention does along one row of scores between its matrix products.
namespace fastasr::cpu {

#define FASTASR_DECLARE(C)                                                   \
  /* s[j] = value where hidden[j] is not zero */                             \
  void fill_where(const uint8_t* hidden, C* s, int64_t n, C value);          \
  /* the largest element, n a multiple of 16; NaN is passed over */          \
  C row_maximum(const C* s, int64_t n);                                      \
  /* s[j] = e^(s[j] - top), returns the sum; n a multiple of 32 */           \
  C row_exponentials(C* s, int64_t n, C top);                                \
  /* total[j] = total[j] scale + part[j], n a multiple of 16 */              \
  void row_rescaled(C* total, const C* part, int64_t n, C scale);            \
  /* With W = w / sum: g[j] = W[j] (g[j] - sum_j W g), n a multiple of 32 */ \
  void row_attention_gradient(const C* w, C sum, C* g, int64_t n);           \
  /* ds[j] += penalty sign(s[j]) where |s[j]| > limit */                     \
  void row_penalty(const C* s, C* ds, int64_t n, C penalty, C limit);
FASTASR_DECLARE(float)
FASTASR_DECLARE(double)
#undef FASTASR_DECLARE

#define FASTASR_DECLARE(T)                                                      \
  /* out[j] = s[j] / sum */                                                     \
  void row_divided(const compute_t<T>* s, compute_t<T> sum, T* out, int64_t n); \
  /* ds[j] = w[j] (g[j] - sum w g) */                                           \
  void row_softmax_gradient(const T* w, const T* g, compute_t<T>* ds, int64_t n);
FASTASR_DECLARE(float)
FASTASR_DECLARE(double)
FASTASR_DECLARE(bfloat16)
FASTASR_DECLARE(float16)
#undef FASTASR_DECLARE

}  // namespace fastasr::cpu
