// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "bindings/pooled.h"

namespace fastasr {

// Runs f(block, part) for each block of rows; f writes a number per channel to its part, and their sums over the blocks
// go to `sums`. Where that is null, so is part.
template <typename T, typename F>
void sum_parts(const RowBlocks& blocks, int64_t channels, const Tensor* sums, const F& f) {
  const Scratch<cpu::compute_t<T>> parts(sums ? std::max<int64_t>(1, blocks.count * channels) : 1);
  blocks.parallel(channels, [&](int64_t b, int64_t e) {
    for (int64_t k = b; k < e; k++) f(k, sums ? parts.data() + k * channels : nullptr);
  });
  if (sums) reduce_blocks(parts.data(), blocks.count, channels, *sums);
}

}  // namespace fastasr
