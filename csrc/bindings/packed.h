// SPDX-License-Identifier: Apache-2.0
#pragma once

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

}  // namespace fastasr
