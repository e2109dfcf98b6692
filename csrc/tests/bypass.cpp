// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/bypass.h"

#include "tests/rows_case.h"

namespace fastasr::test {
namespace {

template <typename T>
struct Bypass {
  int64_t rows, period, step, n = rows * period;
  Random random;
  Buffer<T> x_orig{n, period % 3, random}, x{n, period % 4, random, 2}, grad{n, 0, random},
      scale{period, period % 2, random, 0.5, 0.5};
  Buffer<T> y{n, period % 5}, dx_orig{n, 1}, dx{n, 2};
  Buffer<compute_t<T>> dscale{pieces_of(rows, step) * period};

  Bypass(int64_t rows_, int64_t period_, int64_t step_, Rounding rounding = nullptr)
      : rows(rows_), period(period_), step(step_), random(seed_of(rows, period), rounding) {}
  void run(int64_t begin, int64_t end) {
    const auto& kernel = cpu::kernels<cpu::BypassKernels<T>>();
    const int64_t at = begin * period, piece = step ? begin / step : 0;
    kernel.forward(x_orig + at, x + at, scale, y + at, end - begin, period);
    kernel.backward(grad + at, x_orig + at, x + at, scale, dx_orig + at, dx + at, dscale + piece * period, end - begin,
                    period);
  }
  auto by_row() { return std::tie(y, dx_orig, dx); }
  auto sums() { return std::tie(dscale); }
};

// A NaN of x_orig reaches its element of the output, as in the formula, and no other.
template <typename T>
void bypass_nan() {
  Bypass<T> clean(9, 53, 9), c(9, 53, 9);
  c.x_orig[4 * 53 + 3] = make<T>(kNan);
  clean.run(0, 9), c.run(0, 9);
  for (int64_t i = 0; i < c.n; i++)
    CHECK(i == 4 * 53 + 3 ? std::isnan(c.y(i)) : same_bits(c.y[i], clean.y[i]), "%s %ld", Type<T>::name, long(i));
}

TEST_CASE("bypass") {
  for_each_type([&]<typename T>() {
    for (const int64_t rows : {0, 1, 4})
      for (const int64_t period : kSizes) values_like_double<Bypass, T>(rows, period, 10);
    rows_apart(9, 1, [](int64_t step) { return Bypass<T>(9, 53, step); });
    rows_apart(61, 4, [](int64_t step) { return Bypass<T>(61, 67, step); });
    bypass_nan<T>();
  });
}

}  // namespace
}  // namespace fastasr::test
