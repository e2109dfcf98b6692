// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "cpu/math/number.h"

// AMX: a tile holds 16 rows of 16 words of four bytes, and an instruction adds the product of two tiles to a third, in
// the rate of 16 of VNNI's. The words of x are a tile as they lie in memory, and so are those of a panel of weights.
namespace fastasr::cpu {
inline namespace FASTASR_SIMD {

constexpr int64_t kAmxRows = 16, kAmxWords = 16;

// Says how many words along k the tiles of a product take: a divisor of all its words, so that no tile reads beyond a
// row. 0 says that tiles would be too short to gain.
FASTASR_INLINE int64_t amx_step(int64_t words) {
  for (int64_t step = kAmxWords; step >= kAmxWords / 2; step--)
    if (words % step == 0) return step;
  return 0;
}

// Tiles of this thread, from the first `shape` on until the end of its life.
class AmxTiles {
 public:
  // Tiles 0 to 3 hold sums of up to 32 rows and 32 columns, 4 and 5 rows of x, 6 and 7 columns of weights.
  FASTASR_MEMBER void shape(int64_t rows, int64_t step) {
    if (rows == rows_) return;
    rows_ = rows;
    Config config{};
    const int64_t upper = std::min(rows, kAmxRows), lower = rows - upper;
    for (int i = 0; i < 4; i++) config.set(i, i < 2 ? upper : lower, kAmxWords);
    config.set(4, upper, step), config.set(5, lower, step);
    config.set(6, step, kAmxWords), config.set(7, step, kAmxWords);
    asm volatile("" ::"r"(&config) : "memory");  // the compiler takes 8 of the 64 bytes for read
    _tile_loadconfig(&config);
  }
  FASTASR_MEMBER ~AmxTiles() {
    if (rows_) _tile_release();
  }

  // Sums over `words` words of x and of a panel of 32 columns.
  template <typename T>
  FASTASR_MEMBER void multiply(const int32_t* x, const int32_t* panel, int64_t words, int64_t step) {
    asm volatile("" ::: "memory");  // what tiles load has been written
    if (rows_ > kAmxRows)
      sums<T, true>(x, panel, words, step);
    else
      sums<T, false>(x, panel, words, step);
  }

  // Writes the sums: rows of 32 columns.
  FASTASR_MEMBER void put(void* sums) const {
    constexpr int64_t kRow = 2 * kAmxWords * 4;
    char* const out = static_cast<char*>(sums);
    _tile_stored(0, out, kRow);
    _tile_stored(1, out + kRow / 2, kRow);
    if (rows_ > kAmxRows) {
      _tile_stored(2, out + kAmxRows * kRow, kRow);
      _tile_stored(3, out + kAmxRows * kRow + kRow / 2, kRow);
    }
  }

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
    FASTASR_MEMBER void set(int tile, int64_t count, int64_t words) {
      rows[tile] = static_cast<uint8_t>(count);
      row_bytes[tile] = static_cast<uint16_t>(count ? 4 * words : 0);
    }
  };

  template <typename T, bool lower>
  FASTASR_MEMBER void sums(const int32_t* x, const int32_t* panel, int64_t words, int64_t step) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (lower) {
      _tile_zero(2);
      _tile_zero(3);
    }
    const int64_t stride = 4 * words;
    for (int64_t k = 0; k < words; k += step, panel += 2 * kAmxWords * step) {
      _tile_loadd(6, panel, 2 * kAmxWords * 4);
      _tile_loadd(4, x + k, stride);
      _tile_loadd(7, panel + kAmxWords, 2 * kAmxWords * 4);
      if constexpr (lower) _tile_loadd(5, x + kAmxRows * words + k, stride);
      if constexpr (sizeof(T) == 1) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        if constexpr (lower) {
          _tile_dpbusd(2, 5, 6);
          _tile_dpbusd(3, 5, 7);
        }
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (lower) {
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
  }

  int64_t rows_ = 0;
};

}  // namespace FASTASR_SIMD
}  // namespace fastasr::cpu
