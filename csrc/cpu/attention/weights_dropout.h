// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/simd.h"

// Dropout of attention weights without a mask in memory: whether a weight is kept is a hash of the seed, the row of the
// weights and the key, so that the backward pass finds it again. fastasr/ops/_weights_dropout.py defines the hash and
// kernels/_weights_dropout.py is its copy for GPUs.
namespace fastasr::cpu {

inline constexpr uint32_t kDropoutStep = 0x9e3779b9, kDropoutFirst = 0x7feb352d, kDropoutSecond = 0x846ca68b;

struct WeightsDropout {
  uint64_t seed;
  int32_t threshold;  // p 2^31; 0: every weight is kept
  double scale;       // 1 / (1 - p)
};

// The two words that all keys of a row of weights share.
struct DropoutRow {
  uint32_t first, second;
};

FASTASR_INLINE uint32_t scrambled(uint32_t x) {
  x = (x ^ x >> 16) * kDropoutFirst;
  x = (x ^ x >> 15) * kDropoutSecond;
  return x ^ x >> 16;
}

FASTASR_INLINE DropoutRow dropout_row(const WeightsDropout& d, int64_t row) {
  const uint32_t n = static_cast<uint32_t>(row), low = static_cast<uint32_t>(d.seed);
  const uint32_t high = static_cast<uint32_t>(d.seed >> 32);
  return {scrambled(scrambled(n ^ low) ^ high), scrambled(scrambled(n ^ ~high) + low + kDropoutStep)};
}

// Returns 31 bits at random for the weight of a key.
FASTASR_INLINE int32_t dropout_bits(DropoutRow row, uint32_t key) {
  uint32_t x = row.first + key * kDropoutStep;
  x = (x ^ x >> 16) * kDropoutFirst;
  x = (x ^ x >> 15 ^ row.second) * kDropoutSecond;
  return static_cast<int32_t>(x >> 1);
}

}  // namespace fastasr::cpu
