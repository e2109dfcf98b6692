// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <type_traits>

#include "bindings/pooled.h"
#include "cpu/rows/row_statistics.h"

// What the bindings of norms over the last dimension share.
namespace fastasr {

template <typename T>
using StatisticsOf = cpu::RowStatistics<cpu::compute_t<T>>;

// Makes a tensor for the statistics of x's rows, without elements unless they are kept.
inline Tensor new_statistics(const Tensor& x, bool keep) {
  const int64_t channels = x.size(x.dim() - 1), kept = keep && channels ? 3 * (x.numel() / channels) : 0, one = 1;
  return new_strided(x, 1, &kept, &one, compute_type(dtype_of(x)));
}

// Returns where a forward pass writes the statistics; null if they are not kept.
template <typename T>
StatisticsOf<T>* written_statistics(const Tensor& t) {
  return t.numel() ? reinterpret_cast<StatisticsOf<T>*>(mutable_data<cpu::compute_t<T>>(t)) : nullptr;
}

// Returns the statistics of a forward pass; null if it kept none.
template <typename T>
const StatisticsOf<T>* kept_statistics(const Optional& t, int64_t rows, const char* op) {
  if (!t) return nullptr;
  check(dtype_of(*t) == kComputeType<T> && t->is_contiguous() && t->numel() == 3 * rows, op, "statistics");
  return reinterpret_cast<const StatisticsOf<T>*>(data<cpu::compute_t<T>>(*t));
}

// Returns the largest magnitude that a row's elements keep: 0 sets no limit, and T's largest number is the highest one.
template <typename T>
cpu::compute_t<T> limit_of(double limit) {
  using C = cpu::compute_t<T>;
  if (limit == 0) return std::numeric_limits<C>::infinity();
  if constexpr (std::is_same_v<T, cpu::float16>) return static_cast<C>(std::min(limit, 65504.0));
  return static_cast<C>(std::min(limit, static_cast<double>(std::numeric_limits<C>::max())));
}

// Runs f(begin, end, first, second, scratch) for each block of rows; f writes two numbers per channel, and their sums
// over the blocks go to `first` and `second`, unless that is null. scratch has `scratch_elements` numbers.
template <typename T, typename F>
void sum_pairs(const RowBlocks& blocks, int64_t channels, int64_t scratch_elements, const Tensor& first,
               const Tensor* second, const F& f) {
  using C = cpu::compute_t<T>;
  Scratch<C> parts(blocks.count * 2 * channels);  // every block is written
  blocks.parallel(4 * channels, [&](int64_t b, int64_t e) {
    const std::unique_ptr<C[]> scratch(new C[scratch_elements]);
    for (int64_t k = b; k < e; k++) {
      C* part = parts.data() + k * 2 * channels;
      f(blocks.begin(k), blocks.begin(k) + blocks.size(k), part, part + channels, scratch.get());
    }
  });
  reduce_blocks(parts.data(), blocks.count, 2 * channels, first);
  if (second) reduce_blocks(parts.data() + channels, blocks.count, 2 * channels, *second);
}

}  // namespace fastasr
