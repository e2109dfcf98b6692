// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/weighted_values.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

void values(bool transposed, int64_t rows, int64_t sources, int64_t columns) {
  const auto& kernel = cpu::kernels<cpu::WeightedValues>();
  const int64_t w_rows = transposed ? sources : rows, w_stride = (transposed ? rows : sources) + 3;
  const int64_t v_stride = columns + 5, out_stride = columns + 2;
  Random random(static_cast<uint64_t>(rows * 977 + sources * 31 + columns));
  INFO(transposed ? "transposed " : "", rows, "x", sources, "x", columns);
  Buffer<float> w(w_rows * w_stride, 0, random), v(sources * v_stride, 1, random), out(rows * out_stride, 2);
  Buffer<float> packed(cpu::packed_values_size(sources, columns));
  kernel.pack(v, v_stride, sources, columns, packed);
  (transposed ? kernel.transposed : kernel.run)(w, w_stride, rows, sources, packed, columns, out, out_stride);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t c = 0; c < out_stride; c++) {
      if (c >= columns) {
        CHECK(out.unset(i * out_stride + c), "wrote behind the columns");
        continue;
      }
      Sum sum;
      for (int64_t j = 0; j < sources; j++)
        sum.add(w(transposed ? j * w_stride + i : i * w_stride + j) * v(j * v_stride + c));
      EXPECT_WITHIN(out, i * out_stride + c, sum.value, sum.size * 0x1p-20L);
    }
}

}  // namespace

TEST_CASE("weighted_values") {
  for (const int64_t rows : {0, 1, 5, 8, 13, 20})
    for (const int64_t sources : {0, 1, 31, 128, 300})
      for (const int64_t columns : {1, 12, 16, 33})
        for (const bool transposed : {false, true}) values(transposed, rows, sources, columns);
}

}  // namespace fastasr::test
