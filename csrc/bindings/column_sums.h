// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bindings/dispatch.h"
#include "cpu/rows/balancer_gradient.h"

namespace fastasr {

// Returns the sums over blocks of two sums per channel, in double: fill(k, s1, s2) writes the sums of block k, which
// costs `work` elements.
template <typename F>
std::vector<double> sums_of_blocks(int64_t blocks, int64_t work, int64_t channels, const F& fill) {
  std::vector<double> parts(blocks * 2 * channels), total(2 * channels, 0.0);
  parallel_tasks(blocks, std::max<int64_t>(1, work), [&](int64_t b, int64_t e) {
    for (int64_t k = b; k < e; k++) {
      double* part = parts.data() + k * 2 * channels;
      fill(k, part, part + channels);
    }
  });
  for (int64_t k = 0; k < blocks; k++)
    for (int64_t j = 0; j < 2 * channels; j++) total[j] += parts[k * 2 * channels + j];
  return total;
}

// Returns the sums of x - shift over rows that lie `stride` apart, then those of its square, per channel. At most 16
// rows are added in a chain of the compute type; the blocks depend on the shape alone.
template <typename T>
std::vector<double> column_sums(const T* x, int64_t rows, int64_t stride, int64_t channels,
                                const std::vector<cpu::compute_t<T>>& shift) {
  constexpr int64_t kRowsPerBlock = 256;
  const auto& kernel = cpu::kernels<cpu::BalancerKernels<T>>();
  const int64_t blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  return sums_of_blocks(blocks, channels * kRowsPerBlock, channels, [&](int64_t k, double* s1, double* s2) {
    const int64_t first = k * kRowsPerBlock, count = std::min(kRowsPerBlock, rows - first);
    kernel.sums_rows(x + first * stride, stride, shift.data(), s1, s2, count, channels);
  });
}

}  // namespace fastasr
