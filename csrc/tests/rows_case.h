// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <limits>

#include "tests/check.h"

// What tests of kernels that work row by row share. A Case<T>(rows, channels, step, form..., rounding) has room for the
// sums of pieces of `step` rows, and its run(begin, end) computes these rows: those of by_row(), and their sums().
namespace fastasr::test {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();

// Returns how many pieces have sums of their own.
inline int64_t pieces_of(int64_t rows, int64_t step) { return rows ? (rows + step - 1) / step : 1; }

inline uint64_t seed_of(int64_t rows, int64_t channels) { return static_cast<uint64_t>(rows * 131 + channels); }

// Compares all rows and their sums with the same in double.
template <template <typename> typename Case, typename T, typename... Form>
void values_like_double(int64_t rows, int64_t channels, double units, const Form&... form) {
  INFO(Type<T>::name, " ", rows, "x", channels);
  Case<T> c(rows, channels, rows, form..., rounded<T>);
  Case<double> exact(rows, channels, rows, form..., rounded<T>);
  c.run(0, rows), exact.run(0, rows);
  expect_like<T>(c.by_row(), exact.by_row(), units);
  expect_like<T>(c.sums(), exact.sums(), units);
}

// Rows are independent: in pieces, one after another or on several threads without a race, they have the bits of the
// whole. make(step) returns a case.
template <typename F>
void rows_apart(int64_t rows, int64_t step, const F& make) {
  INFO("pieces of ", step, " out of ", rows);
  auto whole = make(rows), pieces = make(step);
  whole.run(0, rows);
  in_pieces(rows, step, [&](int64_t begin, int64_t end) { pieces.run(begin, end); });
  CHECK(same_outputs(whole.by_row(), pieces.by_row()), "pieces differ from the whole");
  for (const int64_t count : {2, 3, 8}) {
    auto parallel = make(step);
    on_threads(count, [&](int64_t t) {
      for (int repeat = 0; repeat < 20; repeat++)
        for (int64_t begin = t * step; begin < rows; begin += count * step)
          parallel.run(begin, std::min(begin + step, rows));
    });
    CHECK(same_outputs(parallel.by_row(), pieces.by_row()) && same_outputs(parallel.sums(), pieces.sums()),
          "%ld threads differ from one", long(count));
  }
}

}  // namespace fastasr::test
