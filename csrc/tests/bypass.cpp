// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "cpu/rows/bypass.h"
#include "tests/rows_case.h"

namespace fastasr::test {
namespace {

template <typename T>
struct Bypass {
  int64_t rows, period, step, n = rows * period;
  Random random;
  Buffer<T> x_orig{n, period % 3, random}, x{n, period % 4, random, 2}, grad{n, 0, random}, scale{period, period % 2};
  Buffer<T> y{n, period % 5}, dx_orig{n, 1}, dx{n, 2};
  Buffer<compute_t<T>> dscale{pieces_of(rows, step) * period};

  Bypass(int64_t rows_, int64_t period_, int64_t step_, uint64_t seed)
      : rows(rows_), period(period_), step(step_), random(seed) {
    for (int64_t j = 0; j < period; j++) scale[j] = make<T>(j % 9 == 3 ? 1.0 : random.uniform());
  }
  void run(int64_t begin, int64_t end) {
    const auto& kernel = cpu::kernels<cpu::BypassKernels<T>>();
    const int64_t at = begin * period, piece = step ? begin / step : 0;
    kernel.forward(x_orig + at, x + at, scale, y + at, end - begin, period);
    kernel.backward(grad + at, x_orig + at, x + at, scale, dx_orig + at, dx + at, dscale + piece * period, end - begin,
                    period);
  }
  bool same_rows(Bypass& o) { return y.equals(o.y) && dx_orig.equals(o.dx_orig) && dx.equals(o.dx); }
  bool same_sums(Bypass& o) { return dscale.equals(o.dscale); }
};

template <typename T>
void bypass_values(int64_t rows, int64_t period) {
  INFO(Type<T>::name, " ", rows, "x", period);
  Bypass<T> c(rows, period, rows, static_cast<uint64_t>(rows * 17 + period));
  c.run(0, rows);
  for (int64_t j = 0; j < period; j++) {
    const long double s = c.scale(j);
    Sum sum;
    for (int64_t i = j; i < c.n; i += period) {
      const long double o = c.x_orig(i), v = c.x(i), g = c.grad(i);
      sum.add(g * (v - o));
      EXPECT(c.y, i, o + (v - o) * s, 4 * (std::fabs(o) + std::fabs(v)));
      EXPECT(c.dx, i, g * s, 2 * std::fabs(g));
      EXPECT(c.dx_orig, i, g * (1 - s), 3 * std::fabs(g));
    }
    EXPECT(c.dscale, j, sum.value, sum.size * (4 + rows));
  }
}

// A NaN of x_orig reaches its element of the output, as in the formula, and no other.
template <typename T>
void bypass_nan() {
  Bypass<T> clean(9, 53, 9, 5), c(9, 53, 9, 5);
  c.x_orig[4 * 53 + 3] = make<T>(kNan);
  clean.run(0, 9), c.run(0, 9);
  for (int64_t i = 0; i < c.n; i++)
    CHECK(i == 4 * 53 + 3 ? std::isnan(c.y(i)) : same_bits(c.y[i], clean.y[i]), "%s %ld", Type<T>::name, long(i));
}

TEST_CASE("bypass") {
  for_each_type([&]<typename T>() {
    for (const int64_t rows : {0, 1, 4})
      for (const int64_t period : kSizes) bypass_values<T>(rows, period);
    rows_apart(9, 1, [](int64_t step) { return Bypass<T>(9, 53, step, 5); });
    rows_apart(61, 4, [](int64_t step) { return Bypass<T>(61, 67, step, 1); });
    bypass_nan<T>();
  });
}

}  // namespace
}  // namespace fastasr::test
