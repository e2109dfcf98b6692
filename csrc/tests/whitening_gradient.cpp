// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "cpu/rows/whitening_gradient.h"
#include "tests/rows_case.h"

namespace fastasr::test {
namespace {

void whitening_rows(int64_t rows, int64_t channels) {
  INFO(rows, "x", channels);
  const auto& kernel = cpu::kernels<cpu::WhiteningKernels>();
  const int64_t stride = channels + 3, n = rows * channels;
  Random random(static_cast<uint64_t>(rows * 31 + channels));
  Buffer<float> x(rows * stride, 1, random), mean(channels, 2, random), grad(n, 3, random), y(n, 1), z(n, 2);
  kernel.centre(x, stride, mean, y, rows, channels);
  kernel.add(grad, y, mean, 0.3f, z, rows, channels);
  for (int64_t i = 0; i < n; i++) {
    const int64_t r = i / channels, c = i % channels;
    const long double centred = x(r * stride + c) - mean(c), change = y(i) - mean(c);
    EXPECT(y, i, centred, std::fabs(centred));
    EXPECT(z, i, grad(i) + 0.3f * change, 4 * (std::fabs(grad(i)) + std::fabs(change)));
  }
}

void mirrored(int64_t n, int64_t block) {
  INFO(n, " in blocks of ", block);
  Random random(static_cast<uint64_t>(n));
  Buffer<float> values(n * n, 1, random), matrix(n * n, 2);
  Buffer<double> squares(n);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < n; j++)  // what no product wrote is NaN
      matrix[i * n + j] =
          j < i / block * block ? std::numeric_limits<float>::quiet_NaN() : values[std::min(i, j) * n + std::max(i, j)];
  const int64_t half = n / 2;
  cpu::kernels<cpu::WhiteningKernels>().mirror(matrix, n, block, squares, half, n);
  cpu::kernels<cpu::WhiteningKernels>().mirror(matrix, n, block, squares, 0, half);
  for (int64_t i = 0; i < n; i++) {
    long double sum = 0;
    for (int64_t j = 0; j < n; j++) {
      const float expected = values[std::min(i, j) * n + std::max(i, j)];
      CHECK(matrix[i * n + j] == expected, "%ld, %ld", long(i), long(j));
      sum += static_cast<long double>(expected) * expected;
    }
    EXPECT_WITHIN(squares, i, sum, 1e-12 * sum);
  }
}

TEST_CASE("whitening") {
  for (const int64_t rows : {0, 1, 7})
    for (const int64_t channels : {1, 16, 33}) whitening_rows(rows, channels);
  for (const int64_t n : {1, 16, 40, 101})
    for (const int64_t block : {16, 48, 128}) mirrored(n, block);
}

}  // namespace
}  // namespace fastasr::test
