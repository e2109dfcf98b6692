// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// y = x Wᵀ + bias for few rows of x (1 to about 16), where reading W is most of the cost. W (N, K) is packed once into
// panels of 64 output columns, each a contiguous (K, 64) block, so that a product reads its weights as one stream in
// the order in which they lie in memory, prefetched. Callers pack consecutive products into one arena in the order in
// which they are called, and place the arena on huge pages: on one Zen 4 core a stream of 52 MB is read at 48 GB/s from
// 2 MB pages and at 24 GB/s from 4 KB pages.
//
// Each element of y is a sum over blocks of 128 of k, each block added in order of k: its bits depend neither on the
// number of rows, nor on how rows and panels are split over calls and threads. Short chains keep the error at or below
// that of a blocked BLAS.
//
// Weights may be kept in fewer bits than the sums: bfloat16 or half (fp16), rounded to nearest even; or integers of 8
// bits with a scale for each column, w = scale q, scale = max |w| / 127. They are widened in registers; x, products and
// sums are fp32. So bfloat16 and half give the bits that fp32 panels of the rounded weights give. Where x may be
// rounded as well, reduced_gemm.h multiplies int8 faster, because it widens nothing.
namespace fastasr::cpu {

enum class WeightFormat : int64_t { fp32 = 0, bf16 = 1, int8 = 2, fp16 = 3 };

constexpr int64_t kPanelColumns = 64;

FASTASR_INLINE constexpr int64_t panel_count(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }
// Returns the elements of n output columns and k inputs in packed form.
FASTASR_INLINE constexpr int64_t packed_size(int64_t n, int64_t k) { return panel_count(n) * kPanelColumns * k; }
FASTASR_INLINE constexpr int64_t weight_bytes(WeightFormat format) {
  return format == WeightFormat::fp32 ? 4 : format == WeightFormat::int8 ? 1 : 2;
}

// Panels in a format: data has packed_size elements, aligned to 4 bytes but for int8, which has a scale for each column
// of whole panels.
struct Panels {
  const void* data;
  WeightFormat format = WeightFormat::fp32;
  const float* scale = nullptr;
};

// Packs panels [begin, end) of w (n, k), rows `stride` elements apart, to `packed` (which starts at panel 0), and the
// scales of their columns to `scale` for int8. Columns beyond n are zero. A column that is not finite is not finite in
// bf16 and fp16; in int8 its scale is not. The caller sees to it that no weight leaves fp16's range.
void pack_panels(const float* w, int64_t n, int64_t k, int64_t stride, WeightFormat format, void* packed, float* scale,
                 int64_t begin, int64_t end);

// Multiplies panels [begin, end): y[i][64 p + c] = sum_k x[i][k] packed[p][k][c] + bias[64 p + c] for `rows` rows. bias
// may be null. Whole panels are written, so the rows of y and bias have room for 64 * panel_count(n) columns; y
// overlaps nothing that is read.
struct SkinnyGemm {
  void (*run)(const float* x, int64_t x_stride, int64_t rows, int64_t k, const Panels& panels, const float* bias,
              float* y, int64_t y_stride, int64_t begin, int64_t end);
};
FASTASR_INLINE void skinny_gemm(const float* x, int64_t x_stride, int64_t rows, int64_t k, const Panels& panels,
                                const float* bias, float* y, int64_t y_stride, int64_t begin, int64_t end) {
  kernels<SkinnyGemm>().run(x, x_stride, rows, k, panels, bias, y, y_stride, begin, end);
}

// Asks for 2 MB pages under the part of [data, data + bytes) that can have them. Call it before the first write.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace fastasr::cpu
