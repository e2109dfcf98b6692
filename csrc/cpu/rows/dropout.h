// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// Dropout with the draws of torch's generator for the CPU, so that a seed gives the same mask: a Bernoulli draw takes
// two words of MT19937 (Matsumoto and Nishimura, 1998), the 53 low bits of first 2^32 + second are a number in [0, 1),
// and the element is kept if it is below p. torch draws word by word, some 6 to 10 ns each; here a block of 624 at a
// time in vectors.
namespace fastasr::cpu {

constexpr int64_t kTwisterWords = 624;

struct Twister {
  uint32_t state[kTwisterWords];
  int64_t given;  // words of the block that are used up
};

struct DropoutKernels {
  // Sets keep[i] = 1 with probability p, else 0.
  void (*draw)(Twister& generator, double p, int64_t n, uint8_t* keep);
  // Computes y = x keep scale, plus residual if it is not null. y may be x or residual.
  void (*apply)(const float* x, const uint8_t* keep, float scale, const float* residual, float* y, int64_t n);
  // Draws a row of `columns` numbers and keeps only those at `places`: out[i] = scale or 0. `keep` has room for the
  // row.
  void (*picked)(Twister& generator, double p, int64_t columns, const int64_t* places, int64_t count, float scale,
                 uint8_t* keep, float* out);
};

}  // namespace fastasr::cpu
