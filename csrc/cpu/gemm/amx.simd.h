// SPDX-License-Identifier: Apache-2.0
#pragma once

#if defined(__AMX_TILE__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>

#include "cpu/math/number.h"
#include "cpu/simd/simd.h"

// AMX: a tile holds 16 rows of 16 words of four bytes, and an instruction adds the product of two tiles to a third, 16
// times as much as an instruction for vectors does. The words of x are a tile as they lie in memory, row by row, and so
// are those of a panel of 32 columns of weights: for each word the words of all columns.
namespace fastasr::cpu {
inline namespace FASTASR_SIMD {

#if defined(__AMX_TILE__)
constexpr bool kAmx = true;
#else
constexpr bool kAmx = false;
#endif
constexpr int64_t kAmxRows = 16, kAmxWords = 16;                             // sizes of a tile
constexpr int64_t kAmxMostRows = 2 * kAmxRows, kAmxColumns = 2 * kAmxWords;  // sizes of a product

// Says how many words along k the tiles of a product take: a divisor of all its words, so that no tile reads beyond a
// row. 0 says that tiles would be too short to gain.
FASTASR_INLINE int64_t amx_step(int64_t words) {
  for (int64_t step = kAmxWords; step >= kAmxWords / 2; step--)
    if (words % step == 0) return step;
  return 0;
}

// The tiles of this thread, from the first `shape` on until the end of this object's life, for words of four int8_t
// (those of x are unsigned) or two bfloat16.
template <typename T>
class AmxTiles {
#if defined(__AMX_TILE__)
 public:
  // Makes tiles 0 to 3 the sums of up to 32 rows and 32 columns, 4 and 5 those of rows of x, 6 and 7 of weights.
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

  // Sums over `words` words of x and of a panel, `step` at a time.
  FASTASR_MEMBER void multiply(const void* x, const void* panel, int64_t words, int64_t step) {
    asm volatile("" ::: "memory");  // what tiles load has been written
    const auto *left = static_cast<const int32_t*>(x), *right = static_cast<const int32_t*>(panel);
    if (rows_ > kAmxRows)
      sums<true>(left, right, words, step);
    else
      sums<false>(left, right, words, step);
  }

  // Writes the sums: rows of 32 columns.
  FASTASR_MEMBER void put(void* sums) const {
    constexpr int64_t kRow = kAmxColumns * 4;
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

  template <bool lower>
  FASTASR_MEMBER void sums(const int32_t* x, const int32_t* panel, int64_t words, int64_t step) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (lower) {
      _tile_zero(2);
      _tile_zero(3);
    }
    const int64_t x_row = 4 * words, panel_row = 4 * kAmxColumns;
    for (int64_t k = 0; k < words; k += step, panel += kAmxColumns * step) {
      _tile_loadd(6, panel, panel_row);
      _tile_loadd(4, x + k, x_row);
      _tile_loadd(7, panel + kAmxWords, panel_row);
      if constexpr (lower) _tile_loadd(5, x + kAmxRows * words + k, x_row);
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
#endif
};

}  // namespace FASTASR_SIMD
}  // namespace fastasr::cpu
