// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/weighted_values.h"

#include <algorithm>

#include "tests/check.h"

namespace fastasr::test {
namespace {

void values(int64_t rows, int64_t sources, int64_t columns) {
  const auto& kernel = cpu::kernels<cpu::WeightedValues>();
  const int64_t w_stride = sources + 3, v_stride = columns + 5, out_stride = columns + 2;
  Random random(static_cast<uint64_t>(rows * 977 + sources * 31 + columns));
  Buffer<float> w(rows * w_stride), v(sources * v_stride, 1), out(rows * out_stride, 2);
  Buffer<float> packed(cpu::packed_values_size(sources, columns));
  w.fill(random);
  v.fill(random);
  std::fill(out.data(), out.data() + out.size(), 1e30f);
  kernel.pack(v.data(), v_stride, sources, columns, packed.data());
  kernel.run(w.data(), w_stride, rows, sources, packed.data(), columns, out.data(), out_stride);
  CHECK(packed.intact() && out.intact(), "wrote outside, %ldx%ldx%ld", long(rows), long(sources), long(columns));
  for (int64_t i = 0; i < rows; i++)
    for (int64_t c = 0; c < out_stride; c++) {
      const float got = out[i * out_stride + c];
      if (c >= columns) {
        CHECK(got == 1e30f, "wrote behind the columns");
        continue;
      }
      long double sum = 0, size = 0;
      for (int64_t j = 0; j < sources; j++) {
        const long double term = static_cast<long double>(w[i * w_stride + j]) * v[j * v_stride + c];
        sum += term, size += std::fabs(term);
      }
      CHECK(std::fabs(got - sum) <= size * 0x1p-20L, "%ldx%ldx%ld at %ld, %ld: %g, expected %g", long(rows),
            long(sources), long(columns), long(i), long(c), double(got), double(sum));
    }
}

}  // namespace

TEST_CASE("weighted_values") {
  for (const int64_t rows : {0, 1, 5, 8, 13, 20})
    for (const int64_t sources : {0, 1, 31, 128, 300})
      for (const int64_t columns : {1, 12, 16, 33}) values(rows, sources, columns);
}

}  // namespace fastasr::test
