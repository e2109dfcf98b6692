// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/gemm/skinny_gemm.h"
#include "cpu/rows/swoosh.h"
#include "cpu/simd/kernels.h"

// y = x Wᵀ + bias with both factors in fewer bits, for the products of a linear layer in inference:
//
//   int8   w = q scale_j, q in [-127, 127], scale_j = max |w_j| / 127 for each output j;
//          x = (p - zero_i) step_i for each row i, p in [0, levels], where step_i = (max - min) / levels over the row
//          and 0, and zero_i is the p of 0. Products and sums are exact integers; y is rounded from them in float32.
//   bf16   w and x rounded to nearest even; products and sums in float32.
//
// In place of x the product may take swoosh(x), in float32, which saves a pass over x.
//
// A row of x with a NaN or an infinity gives NaN in int8, and so does a row of W in its column.
//
// Words of four bytes along k are what an instruction multiplies and adds: four integers or two bfloat16. W (n, k) is
// packed once into panels of kReducedColumns outputs: for each word the words of all columns.
namespace fastasr::cpu {

constexpr int64_t kReducedColumns = 32;
constexpr int64_t kReducedMostInputs = 65536;  // int8: the sums of longer rows could leave 32 bits

FASTASR_INLINE constexpr int64_t reduced_words(int64_t k, WeightFormat format) {
  const int64_t each = format == WeightFormat::int8 ? 4 : 2;
  return (k + each - 1) / each;
}
FASTASR_INLINE constexpr int64_t reduced_panels(int64_t n) { return (n + kReducedColumns - 1) / kReducedColumns; }

// A packed W: its panels, and for int8 the scale and the sum of q of every column.
struct ReducedWeights {
  const int32_t* words;
  const float* scale;
  const int32_t* sum;
};
// Packs panels [begin, end) of w (n, k), rows `stride` elements apart. Columns beyond n are 0.
void pack_reduced(const float* w, int64_t n, int64_t k, int64_t stride, WeightFormat format, int32_t* words,
                  float* scale, int32_t* sum, int64_t begin, int64_t end);

enum class ReducedInput { x, swoosh_l, swoosh_r };

struct ReducedGemm {
  const float* x;
  int64_t x_row;
  int32_t* rows;  // x in words: (m, reduced_words)
  float* step;    // int8: of each row
  int32_t* zero;
  ReducedWeights weights;
  const float* bias;  // n elements, or null
  float* y;           // rows y_row elements apart
  int64_t y_row;
  int64_t m, n, k;
  WeightFormat format;
  ReducedInput input = ReducedInput::x;
};

struct ReducedGemmKernels {
  int32_t levels;
  // Says whether products are faster than in float32: in int8 always; in bf16 with AMX, or if an instruction multiplies
  // and adds its words and is the faster one when measured at the first call.
  bool (*gains)();
  void (*rows)(const ReducedGemm& g, int64_t begin, int64_t end);  // converts rows of x
  int64_t (*tasks)(const ReducedGemm& g);
  void (*products)(const ReducedGemm& g, int64_t begin, int64_t end);  // runs tasks, after `rows`
  // Says whether the weights are so few that each task has some rows and all columns. Then rows_and_products runs tasks
  // with the rows that they need.
  bool (*tasks_are_rows)(const ReducedGemm& g);
  void (*rows_and_products)(const ReducedGemm& g, int64_t begin, int64_t end);
};

// T is int8_t or bfloat16.
template <typename T>
struct ReducedGemmTable {
  static constexpr bool kDotProducts = true;
  ReducedGemmKernels kernels;
};
FASTASR_INLINE const ReducedGemmKernels& reduced_gemm_kernels(WeightFormat format) {
  if (format == WeightFormat::int8) return kernels<ReducedGemmTable<int8_t>>().kernels;
  return kernels<ReducedGemmTable<bfloat16>>().kernels;
}

}  // namespace fastasr::cpu
