// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <vector>

#include "bindings/dispatch.h"

// The bindings of sequences that lie one after the other as the rows of one tensor share this.
namespace fastasr {

// Returns the row where each of the sequences of these lengths begins, and the end of the last one.
inline std::vector<int64_t> packed_starts(const std::vector<int64_t>& lengths, int64_t rows, const char* op) {
  std::vector<int64_t> starts(1, 0);
  for (const int64_t length : lengths) {
    check(length >= 0, op, "lengths");
    starts.push_back(starts.back() + length);
  }
  check(rows > 0 && starts.back() == rows, op, "lengths");
  return starts;
}

// Returns the numbers of the sequences that have rows, the longest first, so that equal lengths are neighbours.
inline std::vector<size_t> longest_first(const std::vector<int64_t>& lengths) {
  std::vector<size_t> order;
  for (size_t i = 0; i < lengths.size(); i++)
    if (lengths[i]) order.push_back(i);
  std::stable_sort(order.begin(), order.end(), [&](size_t i, size_t j) { return lengths[i] > lengths[j]; });
  return order;
}

}  // namespace fastasr
