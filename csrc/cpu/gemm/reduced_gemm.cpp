// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/reduced_gemm.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace fastasr::cpu {
namespace {

// The scale of a row of weights; not finite if the row is not.
float scale_of(const float* w, int64_t k) {
  float most = 1e-30f;
  for (int64_t j = 0; j < k; j++) {
    const float size = std::fabs(w[j]);
    most = size <= most || most != most ? most : size;  // keeps a NaN
  }
  return most / 127;
}

}  // namespace

void pack_reduced(const float* w, int64_t n, int64_t k, int64_t stride, WeightFormat format, int32_t* words,
                  float* scale, int32_t* sum, int64_t begin, int64_t end) {
  const int64_t length = reduced_words(k, format);
  const bool int8 = format == WeightFormat::int8;
  const int64_t each = int8 ? 4 : 2, first = begin * kReducedColumns;
  std::memset(words + first * length, 0, static_cast<size_t>((end - begin) * kReducedColumns * length) * 4);
  for (int64_t j = first; j < end * kReducedColumns; j++) {
    int32_t* const column = words + j / kReducedColumns * kReducedColumns * length + j % kReducedColumns;
    const float* const row = w + j * stride;
    if (int8) scale[j] = 0, sum[j] = 0;
    if (j >= n) continue;
    if (int8) scale[j] = scale_of(row, k);
    if (int8 && !std::isfinite(scale[j])) continue;
    for (int64_t i = 0; i < k; i++) {
      char* const at = reinterpret_cast<char*>(column + i / each * kReducedColumns) + i % each * (4 / each);
      if (int8) {
        const auto q = static_cast<int8_t>(std::lrint(row[i] / scale[j]));
        sum[j] += q;
        std::memcpy(at, &q, 1);
      } else {
        bfloat16 v;
        store(&v, row[i]);
        std::memcpy(at, &v, 2);
      }
    }
  }
}

}  // namespace fastasr::cpu
