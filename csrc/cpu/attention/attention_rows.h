// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/attention/weights_dropout.h"
#include "cpu/simd/kernels.h"

namespace fastasr::cpu {

// Returns the sum of lanes, added by halves: its rounding error grows with the logarithm of their number.
template <typename C, int N>
FASTASR_INLINE C sum_of_lanes(C (&lanes)[N]) {
  for (int half = N / 2; half > 0; half /= 2)
    for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
  return lanes[0];
}

// The operations of attention along one row of n scores between its matrix products. Scores have the compute type.
template <typename T>
struct AttentionRows {
  using C = compute_t<T>;
  // s[j] = value where hidden[j] is not zero
  void (*fill_where)(const uint8_t* hidden, C* s, int64_t n, C value);
  // Returns the largest element and passes over a NaN. n is a multiple of 32.
  C (*maximum)(const C* s, int64_t n);
  // Sets s[j] = e^(s[j] - top) and returns the sum. n is a multiple of 32.
  C (*exponentials)(C* s, int64_t n, C top);
  // total[m][j] = total[m][j] scale[m] + part[m][j]. n is a multiple of 16.
  void (*rescaled)(C* total, const C* part, int64_t rows, int64_t n, const C* scale);
  // total[j] += part[j]. n is a multiple of 16.
  void (*add)(C* total, const C* part, int64_t n);
  // s[j] += number
  void (*add_number)(C* s, int64_t n, C number);
  // total[j] += scale part[j]
  void (*add_scaled)(C* total, const C* part, int64_t n, C scale);
  void (*add_to_double)(double* total, const C* part, int64_t n, C scale);
  // s[j] = cap tanh(s[j] / cap)
  void (*soft_cap)(C* s, int64_t n, C cap);
  // ds[j] *= 1 - (s[j] / cap)^2, for capped scores, of which those below -cap are hidden keys'
  void (*soft_cap_gradient)(const C* s, C* ds, int64_t n, C cap);
  // Returns sum_j s[j].
  C (*sum)(const C* s, int64_t n);
  // Returns sum_j a[j] b[j]. n is a multiple of 32.
  C (*dot)(const C* a, const C* b, int64_t n);
  // With W = w / sum: g[j] = W[j] (g[j] - sum_j W g). n is a multiple of 32.
  void (*attention_gradient)(const C* w, C sum, C* g, int64_t n);
  // Multiplies the weights of the keys [key, key + n) by `scale` where dropout keeps them, else by 0.
  void (*drop)(C* w, int64_t n, DropoutRow row, int64_t key, int32_t threshold, C scale);
  // ds[j] += penalty sign(s[j]) where |s[j]| > limit
  void (*penalty)(const C* s, C* ds, int64_t n, C penalty, C limit);
  // Sets w[j] = 1 where w[j] / sum, rounded to T, is more than 0, else 0, and returns the sum. n is a multiple of 32.
  C (*equalised)(C* w, C sum, int64_t n);
  // out[j] = s[j] / sum
  void (*divided)(const C* s, C sum, T* out, int64_t n);
  // ds[j] = w[j] (g[j] - sum w g)
  void (*softmax_gradient)(const T* w, const T* g, C* ds, int64_t n);
};

}  // namespace fastasr::cpu
