// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "bindings/scratch.h"

namespace fastasr {

// Runs f(begin, end, part, scratch) for each block of rows, which cost `work` elements each. f writes to its part a
// number per channel for each of `sums`; their sums over the blocks go there, unless it is null. Where all are null, so
// is part. scratch has `scratch_elements` numbers.
template <typename T, typename F>
void sum_parts(const RowBlocks& blocks, int64_t channels, std::initializer_list<const Tensor*> sums, int64_t work,
               int64_t scratch_elements, const F& f) {
  using C = cpu::compute_t<T>;
  const int64_t width = channels * static_cast<int64_t>(sums.size());
  const bool any = std::any_of(sums.begin(), sums.end(), [](const Tensor* t) { return t; });
  const Scratch<C> parts(any ? std::max<int64_t>(1, blocks.count * width) : 1);
  blocks.parallel(work, [&](int64_t b, int64_t e) {
    const std::unique_ptr<C[]> scratch(scratch_elements ? new C[scratch_elements] : nullptr);
    for (int64_t k = b; k < e; k++)
      f(blocks.begin(k), blocks.begin(k) + blocks.size(k), any ? parts.data() + k * width : nullptr, scratch.get());
  });
  const C* first = parts.data();
  for (const Tensor* sum : sums) {
    if (sum) reduce_blocks(first, blocks.count, width, *sum);
    first += channels;
  }
}

}  // namespace fastasr
