// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/skinny_gemm.h"

#include <algorithm>
#include <cmath>

#include "cpu/math/number.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastasr::cpu {
namespace {

constexpr int64_t kLineFloats = 16;  // floats of a cache line

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
        most = size <= most || most != most ? most : size;  // keeps a NaN
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
    } else if (format == WeightFormat::fp16) {
      float16* const out = static_cast<float16*>(packed) + at;
      each_weight(rows, columns, k, stride,
                  [&](int64_t j, int64_t c, float v) { store(out + j * kPanelColumns + c, v); });
    } else {
      pack_int8(rows, columns, k, stride, static_cast<int8_t*>(packed) + at, scale + p * kPanelColumns);
    }
  }
}

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  // this is advice: it may fail
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastasr::cpu
