// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <limits>

#include "tests/check.h"

// What tests of kernels that work row by row share.
namespace fastasr::test {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();

// Rows are independent: in pieces, one after another or on several threads without a race, they have the bits of the
// whole. make(step) returns a case whose run(begin, end) computes these rows and writes their sums to a place of their
// own.
template <typename F>
void rows_apart(int64_t rows, int64_t step, const F& make) {
  INFO("pieces of ", step, " out of ", rows);
  auto whole = make(rows), pieces = make(step);
  whole.run(0, rows);
  in_pieces(rows, step, [&](int64_t begin, int64_t end) { pieces.run(begin, end); });
  CHECK(whole.same_rows(pieces), "pieces differ from the whole");
  for (const int64_t count : {2, 3, 8}) {
    auto parallel = make(step);
    on_threads(count, [&](int64_t t) {
      for (int repeat = 0; repeat < 20; repeat++)
        for (int64_t begin = t * step; begin < rows; begin += count * step)
          parallel.run(begin, std::min(begin + step, rows));
    });
    CHECK(parallel.same_rows(pieces) && parallel.same_sums(pieces), "%ld threads differ from one", long(count));
  }
}

// Returns how many pieces have sums of their own.
inline int64_t pieces_of(int64_t rows, int64_t step) { return rows ? (rows + step - 1) / step : 1; }

}  // namespace fastasr::test
