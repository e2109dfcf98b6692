// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/dropout.h"

#include <algorithm>
#include <cmath>

namespace fastasr::cpu {
namespace {

constexpr int64_t kWords = kTwisterWords, kShift = 397;
constexpr int64_t kDraws = 512;  // the words of this many draws lie in the first cache at once

FASTASR_INLINE uint32_t twisted(uint32_t u, uint32_t v) {
  return (((u & 0x80000000u) | (v & 0x7fffffffu)) >> 1) ^ ((0u - (v & 1u)) & 0x9908b0dfu);
}

// The recurrence reaches 227 words back and 397 ahead: vectors of up to 64 words never meet a word that they write.
FASTASR_INLINE void next_block(uint32_t* s) {
#pragma omp simd safelen(64)
  for (int64_t k = 0; k < kWords - kShift; k++) s[k] = s[k + kShift] ^ twisted(s[k], s[k + 1]);
#pragma omp simd safelen(64)
  for (int64_t k = kWords - kShift; k < kWords - 1; k++) s[k] = s[k + kShift - kWords] ^ twisted(s[k], s[k + 1]);
  s[kWords - 1] = s[kShift - 1] ^ twisted(s[kWords - 1], s[0]);
}

FASTASR_INLINE uint32_t tempered(uint32_t y) {
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return y ^ (y >> 18);
}

FASTASR_INLINE void fill(Twister& generator, uint32_t* __restrict words, int64_t n) {
  while (n > 0) {
    if (generator.given == kWords) next_block(generator.state), generator.given = 0;
    const int64_t count = std::min(n, kWords - generator.given);
    const uint32_t* __restrict from = generator.state + generator.given;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) words[i] = tempered(from[i]);
    words += count, n -= count, generator.given += count;
  }
}

void draw(Twister& generator, double p, int64_t n, uint8_t* __restrict keep) {
  // Tests v 2^-53 < p exactly: both are multiples of powers of two.
  const auto threshold = static_cast<int64_t>(std::ceil(p * 0x1p53));
  alignas(64) uint32_t words[2 * kDraws];
  for (int64_t first = 0; first < n; first += kDraws) {
    const int64_t count = std::min(kDraws, n - first);
    fill(generator, words, 2 * count);
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
      const int64_t v = (static_cast<int64_t>(words[2 * i] & 0x1fffffu) << 32) | static_cast<int64_t>(words[2 * i + 1]);
      keep[first + i] = v < threshold;
    }
  }
}

void apply(const float* x, const uint8_t* keep, float scale, const float* residual, float* y, int64_t n) {
  // x is multiplied by 0, not replaced: a value that is not finite shows, as it does upstream
  if (residual) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * (keep[i] ? scale : 0.0f) + residual[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * (keep[i] ? scale : 0.0f);
  }
}

void picked(Twister& generator, double p, int64_t columns, const int64_t* places, int64_t count, float scale,
            uint8_t* keep, float* out) {
  draw(generator, p, columns, keep);
  for (int64_t i = 0; i < count; i++) out[i] = keep[places[i]] ? scale : 0.0f;
}

}  // namespace

FASTASR_KERNELS_FLOAT(DropoutKernels, .draw = draw, .apply = apply, .picked = picked)

}  // namespace fastasr::cpu
