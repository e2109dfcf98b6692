// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <limits>

#include "bindings/row_sums.h"
#include "cpu/rows/row_statistics.h"

// What the bindings of norms over the last dimension share.
namespace fastasr {

template <typename T>
using StatisticsOf = cpu::RowStatistics<cpu::compute_t<T>>;

// Makes a tensor for the statistics of x's rows (..., 3), without elements unless they are kept.
inline Tensor new_statistics(const Tensor& x, bool keep) {
  std::vector<int64_t> sizes = keep ? x.sizes().vec() : std::vector<int64_t>{0};
  if (keep) sizes.back() = 3;
  return new_contiguous(x, sizes, compute_type(dtype_of(x)));
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

}  // namespace fastasr
