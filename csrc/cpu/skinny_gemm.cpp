// SPDX-License-Identifier: Apache-2.0
#include "cpu/skinny_gemm.h"

#include <algorithm>

#include "cpu/simd.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastasr::cpu {
namespace {

constexpr int64_t kChain = 128;      // terms that are added in a row
constexpr int64_t kAhead = 2048;     // floats between a load and its prefetch: 8 KB (47.5 GB/s; 4 KB: 44.5)
constexpr int64_t kLineFloats = 16;  // of a cache line

// One panel, kRows rows, kColumns columns at a time. The columns of a row of the panel are fetched together, whichever
// of them come first.
template <int kRows, int kColumns>
FASTASR_INLINE void panel_rows(const float* __restrict x, int64_t x_stride, int64_t k, const float* __restrict packed,
                               const float* __restrict bias, float* __restrict y, int64_t y_stride, bool prefetch) {
  for (int64_t at = 0; at < kPanelColumns; at += kColumns) {
    for (int64_t begin = 0; begin < k || begin == 0; begin += kChain) {
      const int64_t end = std::min(k, begin + kChain);
      const float* __restrict w = packed + begin * kPanelColumns + at;
      // from zero, added to memory at the end: a tile that starts from memory stays there
      float sum[kRows][kColumns];
      for (int i = 0; i < kRows; i++)
        for (int c = 0; c < kColumns; c++) sum[i][c] = 0;
      if (prefetch && at == 0) {
        for (int64_t j = begin; j < end; j++, w += kPanelColumns) {
#pragma GCC unroll 4
          for (int64_t line = 0; line < kPanelColumns; line += kLineFloats) __builtin_prefetch(w + kAhead + line);
#pragma GCC unroll 8
          for (int i = 0; i < kRows; i++) {
            const float a = x[i * x_stride + j];
#pragma omp simd
            for (int c = 0; c < kColumns; c++) sum[i][c] += a * w[c];
          }
        }
      } else {
        for (int64_t j = begin; j < end; j++, w += kPanelColumns) {
#pragma GCC unroll 8
          for (int i = 0; i < kRows; i++) {
            const float a = x[i * x_stride + j];
#pragma omp simd
            for (int c = 0; c < kColumns; c++) sum[i][c] += a * w[c];
          }
        }
      }
      for (int i = 0; i < kRows; i++) {
        float* out = y + i * y_stride + at;
        if (begin) {
#pragma omp simd
          for (int c = 0; c < kColumns; c++) out[c] += sum[i][c];
        } else if (bias) {
#pragma omp simd
          for (int c = 0; c < kColumns; c++) out[c] = bias[at + c] + sum[i][c];
        } else {
#pragma omp simd
          for (int c = 0; c < kColumns; c++) out[c] = sum[i][c];
        }
      }
    }
  }
}

using PanelRows = void (*)(const float*, int64_t, int64_t, const float*, const float*, float*, int64_t, bool);

// The functions for 1, 2, ... rows on one instruction set.
struct Tiles {
  int64_t count;
  PanelRows rows[6];
};

// One function per number of rows: several tiles inlined into one function spill.
#define FASTASR_TILE(NAME, ROWS, COLUMNS, TARGET)                                                       \
  TARGET __attribute__((noinline)) void NAME##_##ROWS(const float* x, int64_t x_stride, int64_t k,      \
                                                      const float* packed, const float* bias, float* y, \
                                                      int64_t y_stride, bool prefetch) {                \
    panel_rows<ROWS, COLUMNS>(x, x_stride, k, packed, bias, y, y_stride, prefetch);                     \
  }

#if defined(__x86_64__) && (!defined(FASTASR_NO_CLONES) || defined(__AVX512F__))
#define FASTASR_TARGET __attribute__((target("arch=x86-64-v4")))
// 32 registers of 16 floats: up to 6 x 4 sums and the 4 weights
FASTASR_TILE(avx512, 1, 64, FASTASR_TARGET)
FASTASR_TILE(avx512, 2, 64, FASTASR_TARGET)
FASTASR_TILE(avx512, 3, 64, FASTASR_TARGET)
FASTASR_TILE(avx512, 4, 64, FASTASR_TARGET)
FASTASR_TILE(avx512, 5, 64, FASTASR_TARGET)
FASTASR_TILE(avx512, 6, 64, FASTASR_TARGET)
#undef FASTASR_TARGET
constexpr Tiles kAvx512 = {6, {avx512_1, avx512_2, avx512_3, avx512_4, avx512_5, avx512_6}};
#endif

#if defined(__x86_64__) && (!defined(FASTASR_NO_CLONES) || (defined(__AVX2__) && !defined(__AVX512F__)))
#define FASTASR_TARGET __attribute__((target("arch=x86-64-v3")))
// 16 registers of 8 floats: up to 6 x 2 sums and the 2 weights
FASTASR_TILE(avx2, 1, 64, FASTASR_TARGET)
FASTASR_TILE(avx2, 2, 32, FASTASR_TARGET)
FASTASR_TILE(avx2, 3, 16, FASTASR_TARGET)
FASTASR_TILE(avx2, 4, 16, FASTASR_TARGET)
FASTASR_TILE(avx2, 5, 16, FASTASR_TARGET)
FASTASR_TILE(avx2, 6, 16, FASTASR_TARGET)
#undef FASTASR_TARGET
constexpr Tiles kAvx2 = {6, {avx2_1, avx2_2, avx2_3, avx2_4, avx2_5, avx2_6}};
#endif

#if !defined(FASTASR_NO_CLONES) || !defined(__AVX2__)
// 16 or more registers of 4 floats
FASTASR_TILE(portable, 1, 32, )
FASTASR_TILE(portable, 2, 16, )
constexpr Tiles kPortable = {2, {portable_1, portable_2}};
#endif
#undef FASTASR_TILE

const Tiles& tiles() {
#if defined(__x86_64__) && !defined(FASTASR_NO_CLONES)
  static const Tiles& chosen = [&]() -> const Tiles& {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
      return kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return kAvx2;
    return kPortable;
  }();
  return chosen;
#elif defined(__AVX512F__)
  return kAvx512;
#elif defined(__AVX2__)
  return kAvx2;
#else
  return kPortable;
#endif
}

}  // namespace

void pack_panels(const float* w, int64_t n, int64_t k, int64_t stride, float* packed, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; p++) {
    float* out = packed + p * kPanelColumns * k;
    const int64_t columns = std::min(kPanelColumns, n - p * kPanelColumns);
    // 16 inputs at a time: a cache line of each of the rows that are interleaved
    for (int64_t from = 0; from < k; from += kLineFloats) {
      const int64_t to = std::min(k, from + kLineFloats);
      for (int64_t c = 0; c < columns; c++) {
        const float* row = w + (p * kPanelColumns + c) * stride;
        for (int64_t j = from; j < to; j++) out[j * kPanelColumns + c] = row[j];
      }
      for (int64_t j = from; j < to; j++)
        for (int64_t c = columns; c < kPanelColumns; c++) out[j * kPanelColumns + c] = 0;
    }
  }
}

void skinny_gemm(const float* x, int64_t x_stride, int64_t rows, int64_t k, const float* packed, const float* bias,
                 float* y, int64_t y_stride, int64_t begin, int64_t end) {
  const Tiles& t = tiles();
  const int64_t parts = (rows + t.count - 1) / t.count;  // tiles of equal height: 4 + 4 rows, not 6 + 2
  for (int64_t p = begin; p < end; p++) {
    const float* w = packed + p * kPanelColumns * k;
    const float* b = bias ? bias + p * kPanelColumns : nullptr;
    for (int64_t part = 0; part < parts; part++) {
      const int64_t from = rows * part / parts, to = rows * (part + 1) / parts;
      t.rows[to - from - 1](x + from * x_stride, x_stride, k, w, b, y + from * y_stride + p * kPanelColumns, y_stride,
                            part == 0);
    }
  }
}

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: failing is fine
#endif
}

}  // namespace fastasr::cpu
