// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/skinny_gemm.h"

#include <algorithm>
#include <type_traits>

#include "cpu/math/number.h"
#include "cpu/simd/vectors.simd.h"
#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastasr::cpu {
namespace {

constexpr int64_t kChain = 128;   // terms that are added in a row
constexpr int64_t kAhead = 8192;  // bytes between a load and its prefetch (47.5 GB/s; 4 KB: 44.5)
constexpr int64_t kLine = 64;     // bytes of a cache line

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
struct Fp16 {
  using Word = float16;
  static constexpr int64_t kParts = 1;
  static constexpr bool kWidened = true, kScaled = false;
};

// Returns the halves from p on, as many as a vector has floats.
FASTASR_INLINE Vector<float> widen(const float16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<Vector<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vld1_f16(reinterpret_cast<const float16_t*>(p)));
#else
  Vector<float> wide;
  for (int i = 0; i < Lanes<float>::count; i++) wide[i] = load(p[i]);
  return wide;
#endif
}

// Describes inputs [begin, end) of a panel, at most kChain, for part `part` of the rows.
struct Panel {
  const float* x;
  int64_t x_stride, begin, end;
  const void* packed;
  const float *scale, *bias;
  float* y;
  int64_t y_stride, part, parts;
};

// Weights whose products take longer than reading them are prefetched into the second level. On a Zen 4 core 8 rows of
// 49 MB of weights then run at 101 GFLOP/s, and at 51, reading and multiplying in turn, if they are prefetched into the
// first: there a prefetch presumably holds one of the few places for misses until memory answers, and the loads of the
// current weights wait for a place. With 4 rows, 29 GB/s into the first level stand against 22.
constexpr int kFirstLevel = 3, kSecondLevel = 2;  // levels of __builtin_prefetch
constexpr int64_t kFewOperations = 4;             // products of 16 floats for each line of weights

// Computes sum[i] += x[i][j] w[j] for the inputs [p.begin, p.end) and the columns of kColumns / kParts words from `at`
// on. It prefetches later weights from `ahead` on, `share` bytes for each input, in kLines lines, to that level.
template <typename Format, int kRows, int kColumns, int64_t kLines, int kLevel>
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
    for (int64_t line = 0; line < kLines; line++) __builtin_prefetch(ahead + line * kLine, 0, kLevel);
    if constexpr (Format::kWidened) {
      float wide[kColumns];
      if constexpr (std::is_same_v<Format, Fp16>) {  // the compiler would not find the instruction
#pragma GCC unroll 16
        for (int64_t c = 0; c < kLanes; c += Lanes<float>::count) put(wide + c, widen(w + c));
      } else {
#pragma GCC unroll 2
        for (int64_t part = 0; part < kParts; part++)
#pragma omp simd
          for (int64_t c = 0; c < kLanes; c++) wide[part * kLanes + c] = Format::widen(w[c], part);
      }
      add_rows(wide, j);
    } else {
      add_rows(w, j);
    }
  }
}

// Computes kRows rows of a panel, kColumns columns at a time. The weights are read from memory once, however many
// passes over them there are: a single pass prefetches what it reads itself shortly after; each of several passes
// prefetches its share of the weights that follow these, so that memory and multiplication are busy at the same time.
// Each number of rows has its own function: several tiles inlined into one function would spill.
template <typename Format, int kRows, int kColumns>
__attribute__((noinline)) void panel_rows(const Panel& p) {
  constexpr int64_t kParts = Format::kParts, kWords = kPanelColumns / kParts, kLanes = kColumns / kParts;
  constexpr int64_t kBytes = kWords * static_cast<int64_t>(sizeof(typename Format::Word)), kPasses = kWords / kLanes;
  constexpr int64_t kOperations = 4 * kLine * kRows / kBytes;
  const char* const weights = static_cast<const char*>(p.packed) + p.begin * kBytes;
  const int64_t length = p.end - p.begin, passes = p.parts * kPasses, share = (kBytes + passes - 1) / passes;
  for (int64_t at = 0; at < kWords; at += kLanes) {
    // from zero, added to memory at the end: a tile that starts from memory stays there
    float sum[kRows][kColumns];
    for (int i = 0; i < kRows; i++)
      for (int c = 0; c < kColumns; c++) sum[i][c] = 0;
    const int64_t pass = p.part * kPasses + at / kLanes;
    if (kPasses == 1 && passes == 1)
      chain<Format, kRows, kColumns, kBytes / kLine, (kOperations > kFewOperations ? kSecondLevel : kFirstLevel)>(
          p, at, weights + kAhead, kBytes, sum);
    else
      chain<Format, kRows, kColumns, (kPasses < 4 && kBytes > kLine ? 2 : 1), kSecondLevel>(
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

// The functions for 1, 2, ... rows.
struct Tiles {
  int64_t count;
  void (*rows[6])(const Panel&);
};

template <typename F>
constexpr Tiles tiles() {
#if defined(__AVX512F__)
  // 32 registers of 16 floats: up to 6 x 4 sums and the 4 weights
  return {6,
          {panel_rows<F, 1, 64>, panel_rows<F, 2, 64>, panel_rows<F, 3, 64>, panel_rows<F, 4, 64>, panel_rows<F, 5, 64>,
           panel_rows<F, 6, 64>}};
#elif defined(__AVX2__)
  // int8: 16 columns would be widened in half vectors, through the stack
  if constexpr (std::is_same_v<F, Int8>) return {2, {panel_rows<F, 1, 64>, panel_rows<F, 2, 32>}};
  // 16 registers of 8 floats: up to 6 x 2 sums and the 2 weights
  return {6,
          {panel_rows<F, 1, 64>, panel_rows<F, 2, 32>, panel_rows<F, 3, 16>, panel_rows<F, 4, 16>, panel_rows<F, 5, 16>,
           panel_rows<F, 6, 16>}};
#elif defined(__aarch64__)
  // 32 registers of 4 floats: up to 5 x 4 sums, the 4 weights and 5 inputs
  return {
      5,
      {panel_rows<F, 1, 32>, panel_rows<F, 2, 32>, panel_rows<F, 3, 16>, panel_rows<F, 4, 16>, panel_rows<F, 5, 16>}};
#else
  return {2, {panel_rows<F, 1, 32>, panel_rows<F, 2, 16>}};  // 16 registers of 4 floats
#endif
}
constexpr Tiles kFormats[] = {tiles<Fp32>(), tiles<Bf16>(), tiles<Int8>(), tiles<Fp16>()};  // by WeightFormat

void run(const float* x, int64_t x_stride, int64_t rows, int64_t k, const Panels& panels, const float* bias, float* y,
         int64_t y_stride, int64_t begin, int64_t end) {
  const Tiles& t = kFormats[static_cast<int64_t>(panels.format)];
  const int64_t bytes = kPanelColumns * k * weight_bytes(panels.format);
  const int64_t parts = (rows + t.count - 1) / t.count;  // tiles of equal height: 4 + 4 rows, not 6 + 2
  for (int64_t p = begin; p < end; p++) {
    const int64_t column = p * kPanelColumns;
    // finishes all rows before the next inputs: these weights are then in a cache
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

}  // namespace

FASTASR_KERNELS_FLOAT(SkinnyGemm, .run = run)

}  // namespace fastasr::cpu
