// SPDX-License-Identifier: Apache-2.0
#include "cpu/skinny_gemm.h"

#include <algorithm>
#include <cmath>

#include "cpu/number.h"
#include "cpu/simd.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastasr::cpu {
namespace {

constexpr int64_t kChain = 128;   // terms that are added in a row
constexpr int64_t kAhead = 8192;  // bytes between a load and its prefetch (47.5 GB/s; 4 KB: 44.5)
constexpr int64_t kLine = 64;     // bytes of a cache line
constexpr int64_t kLineFloats = 16;

// A row of a panel as words, each with the weights of kParts columns, kPanelColumns / kParts apart: a vector of words
// becomes kParts vectors of floats without a shuffle.
struct Fp32 {
  using Word = float;
  static constexpr int64_t kParts = 1;
  static constexpr bool kWidened = false, kScaled = false;
  FASTASR_INLINE float widen(Word w, int64_t) { return w; }
};
struct Bf16 {
  using Word = uint32_t;  // the first column in the lower half
  static constexpr int64_t kParts = 2;
  static constexpr bool kWidened = true, kScaled = false;
  FASTASR_INLINE float widen(Word w, int64_t part) {
    return from_bits(static_cast<int32_t>(part ? w & 0xffff0000u : w << 16));
  }
};
struct Int8 {
  using Word = int8_t;
  static constexpr int64_t kParts = 1;
  static constexpr bool kWidened = true, kScaled = true;
  FASTASR_INLINE float widen(Word w, int64_t) { return static_cast<float>(static_cast<int32_t>(w)); }
};

// Inputs [begin, end) of a panel, at most kChain, for part `part` of the rows.
struct Panel {
  const float* x;
  int64_t x_stride, begin, end;
  const void* packed;
  const float *scale, *bias;
  float* y;
  int64_t y_stride, part, parts;
};

// sum[i] += x[i][j] w[j] for the inputs [p.begin, p.end) and the columns of kColumns / kParts words from `at` on.
// Weights to come are fetched from `ahead` on, `share` bytes for each input, in kLines lines.
template <typename Format, int kRows, int kColumns, int64_t kLines>
FASTASR_INLINE void chain(const Panel& p, int64_t at, const char* ahead, int64_t share, float (&sum)[kRows][kColumns]) {
  constexpr int64_t kParts = Format::kParts, kWords = kPanelColumns / kParts, kLanes = kColumns / kParts;
  using Word = typename Format::Word;
  const float* __restrict x = p.x;
  const int64_t x_stride = p.x_stride;
  const Word* __restrict w = static_cast<const Word*>(p.packed) + p.begin * kWords + at;
  const auto add_rows = [&](const float* __restrict weights, int64_t j) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++) {
      const float a = x[i * x_stride + j];
#pragma omp simd
      for (int c = 0; c < kColumns; c++) sum[i][c] += a * weights[c];
    }
  };
  for (int64_t j = p.begin; j < p.end; j++, w += kWords, ahead += share) {
#pragma GCC unroll 4
    for (int64_t line = 0; line < kLines; line++) __builtin_prefetch(ahead + line * kLine);
    if constexpr (Format::kWidened) {
      float wide[kColumns];
#pragma GCC unroll 2
      for (int64_t part = 0; part < kParts; part++)
#pragma omp simd
        for (int64_t c = 0; c < kLanes; c++) wide[part * kLanes + c] = Format::widen(w[c], part);
      add_rows(wide, j);
    } else {
      add_rows(w, j);
    }
  }
}

// kRows rows of a panel, kColumns columns at a time. The weights are read from memory once, however many passes over
// them there are: one pass fetches what it reads itself shortly after, of several each fetches its share of the weights
// that follow these, so that memory and multiplication are busy at the same time.
template <typename Format, int kRows, int kColumns>
FASTASR_INLINE void panel_rows(const Panel& p) {
  constexpr int64_t kParts = Format::kParts, kWords = kPanelColumns / kParts, kLanes = kColumns / kParts;
  constexpr int64_t kBytes = kWords * static_cast<int64_t>(sizeof(typename Format::Word)), kPasses = kWords / kLanes;
  const char* const weights = static_cast<const char*>(p.packed) + p.begin * kBytes;
  const int64_t length = p.end - p.begin, passes = p.parts * kPasses, share = (kBytes + passes - 1) / passes;
  for (int64_t at = 0; at < kWords; at += kLanes) {
    // from zero, added to memory at the end: a tile that starts from memory stays there
    float sum[kRows][kColumns];
    for (int i = 0; i < kRows; i++)
      for (int c = 0; c < kColumns; c++) sum[i][c] = 0;
    const int64_t pass = p.part * kPasses + at / kLanes;
    if (kPasses == 1 && passes == 1)
      chain<Format, kRows, kColumns, kBytes / kLine>(p, at, weights + kAhead, kBytes, sum);
    else
      chain<Format, kRows, kColumns, (kPasses < 4 && kBytes > kLine ? 2 : 1)>(
          p, at, weights + length * (kBytes + pass * share), share, sum);
#pragma GCC unroll 2
    for (int64_t part = 0; part < kParts; part++) {
      const int64_t first = part * kWords + at;
      for (int i = 0; i < kRows; i++) {
        float* __restrict out = p.y + i * p.y_stride + first;
        float* __restrict total = sum[i] + part * kLanes;
        if constexpr (Format::kScaled) {
#pragma omp simd
          for (int64_t c = 0; c < kLanes; c++) total[c] *= p.scale[first + c];
        }
        if (p.begin) {
#pragma omp simd
          for (int64_t c = 0; c < kLanes; c++) out[c] += total[c];
        } else if (p.bias) {
#pragma omp simd
          for (int64_t c = 0; c < kLanes; c++) out[c] = p.bias[first + c] + total[c];
        } else {
#pragma omp simd
          for (int64_t c = 0; c < kLanes; c++) out[c] = total[c];
        }
      }
    }
  }
}

using PanelRows = void (*)(const Panel&);

// The functions for 1, 2, ... rows on one instruction set.
struct Tiles {
  int64_t count;
  PanelRows rows[6];
};
using Formats = Tiles[3];  // by WeightFormat

// One function per number of rows: several tiles inlined into one function spill.
#define FASTASR_TILE(NAME, ROWS, COLUMNS, TARGET)                           \
  template <typename Format>                                                \
  TARGET __attribute__((noinline)) void NAME##_##ROWS(const Panel& panel) { \
    panel_rows<Format, ROWS, COLUMNS>(panel);                               \
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
#define FASTASR_ROWS(F)                                                                 \
  {                                                                                     \
    6, { avx512_1<F>, avx512_2<F>, avx512_3<F>, avx512_4<F>, avx512_5<F>, avx512_6<F> } \
  }
constexpr Formats kAvx512 = {FASTASR_ROWS(Fp32), FASTASR_ROWS(Bf16), FASTASR_ROWS(Int8)};
#undef FASTASR_ROWS
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
#define FASTASR_ROWS(F)                                                     \
  {                                                                         \
    6, { avx2_1<F>, avx2_2<F>, avx2_3<F>, avx2_4<F>, avx2_5<F>, avx2_6<F> } \
  }
// int8: 16 columns would be widened in half vectors, through the stack
constexpr Formats kAvx2 = {FASTASR_ROWS(Fp32), FASTASR_ROWS(Bf16), {2, {avx2_1<Int8>, avx2_2<Int8>}}};
#undef FASTASR_ROWS
#endif

#if !defined(FASTASR_NO_CLONES) || !defined(__AVX2__)
// 16 or more registers of 4 floats
FASTASR_TILE(portable, 1, 32, )
FASTASR_TILE(portable, 2, 16, )
#define FASTASR_ROWS(F)                 \
  {                                     \
    2, { portable_1<F>, portable_2<F> } \
  }
constexpr Formats kPortable = {FASTASR_ROWS(Fp32), FASTASR_ROWS(Bf16), FASTASR_ROWS(Int8)};
#undef FASTASR_ROWS
#endif
#undef FASTASR_TILE

const Formats& formats() {
#if defined(__x86_64__) && !defined(FASTASR_NO_CLONES)
  static const Formats& chosen = [&]() -> const Formats& {
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

// Calls put(input, column, weight) for each of a panel: 16 at a time, a cache line of each of the rows that are
// interleaved. Columns beyond the last are 0.
template <typename F>
FASTASR_INLINE void each_weight(const float* w, int64_t columns, int64_t k, int64_t stride, const F& put) {
  for (int64_t from = 0; from < k; from += kLineFloats) {
    const int64_t to = std::min(k, from + kLineFloats);
    for (int64_t c = 0; c < kPanelColumns; c++)
      for (int64_t j = from; j < to; j++) put(j, c, c < columns ? w[c * stride + j] : 0.0f);
  }
}

void pack_int8(const float* w, int64_t columns, int64_t k, int64_t stride, int8_t* out, float* scale) {
  bool finite[kPanelColumns];
  for (int64_t c = 0; c < kPanelColumns; c++) {
    float most = 1e-30f;
    if (c < columns)
      for (int64_t j = 0; j < k; j++) {
        const float size = std::fabs(w[c * stride + j]);
        most = size <= most || most != most ? most : size;  // a NaN stays
      }
    scale[c] = most / 127;
    finite[c] = std::isfinite(most);
  }
  each_weight(w, columns, k, stride, [&](int64_t j, int64_t c, float v) {
    out[j * kPanelColumns + c] = finite[c] ? static_cast<int8_t>(std::lrint(v / scale[c])) : int8_t{0};
  });
}

}  // namespace

void pack_panels(const float* w, int64_t n, int64_t k, int64_t stride, WeightFormat format, void* packed, float* scale,
                 int64_t begin, int64_t end) {
  constexpr int64_t kHalf = kPanelColumns / 2;
  for (int64_t p = begin; p < end; p++) {
    const int64_t at = p * kPanelColumns * k, columns = std::min(kPanelColumns, n - p * kPanelColumns);
    const float* const rows = w + p * kPanelColumns * stride;
    if (format == WeightFormat::fp32) {
      float* const out = static_cast<float*>(packed) + at;
      each_weight(rows, columns, k, stride, [&](int64_t j, int64_t c, float v) { out[j * kPanelColumns + c] = v; });
    } else if (format == WeightFormat::bf16) {
      bfloat16* const out = static_cast<bfloat16*>(packed) + at;
      each_weight(rows, columns, k, stride, [&](int64_t j, int64_t c, float v) {
        store(out + j * kPanelColumns + c % kHalf * 2 + c / kHalf, v);
      });
    } else {
      pack_int8(rows, columns, k, stride, static_cast<int8_t*>(packed) + at, scale + p * kPanelColumns);
    }
  }
}

void skinny_gemm(const float* x, int64_t x_stride, int64_t rows, int64_t k, const Panels& panels, const float* bias,
                 float* y, int64_t y_stride, int64_t begin, int64_t end) {
  const Tiles& t = formats()[static_cast<int64_t>(panels.format)];
  const int64_t bytes = kPanelColumns * k * weight_bytes(panels.format);
  const int64_t parts = (rows + t.count - 1) / t.count;  // tiles of equal height: 4 + 4 rows, not 6 + 2
  for (int64_t p = begin; p < end; p++) {
    const int64_t column = p * kPanelColumns;
    // all rows before the next inputs: these weights are then in a cache
    for (int64_t from = 0; from < k || from == 0; from += kChain) {
      for (int64_t part = 0; part < parts; part++) {
        const int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
        t.rows[last - first - 1]({x + first * x_stride, x_stride, from, std::min(k, from + kChain),
                                  static_cast<const char*>(panels.data) + p * bytes,
                                  panels.scale ? panels.scale + column : nullptr, bias ? bias + column : nullptr,
                                  y + first * y_stride + column, y_stride, part, parts});
      }
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
