// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/bypass.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

template <typename T>
struct Case {
  Buffer<T> x_orig, x, grad, scale;
  Case(int64_t rows, int64_t period, uint64_t seed)
      : x_orig(rows * period, period % 3),
        x(rows * period, period % 4),
        grad(rows * period),
        scale(period, period % 2) {
    Random random(seed);
    x_orig.fill(random);
    x.fill(random, 2);
    grad.fill(random);
    for (int64_t j = 0; j < period; j++) scale[j] = make<T>(j % 9 == 3 ? 1.0 : random.uniform());
  }
};

template <typename T>
void values(int64_t rows, int64_t period) {
  using C = compute_t<T>;
  Case<T> c(rows, period, static_cast<uint64_t>(rows * 17 + period));
  Buffer<T> y(rows * period, period % 5), dx_orig(rows * period, 1), dx(rows * period, 2);
  Buffer<C> dscale(period);
  cpu::kernels<cpu::BypassKernels<T>>().forward(c.x_orig.data(), c.x.data(), c.scale.data(), y.data(), rows, period);
  cpu::kernels<cpu::BypassKernels<T>>().backward(c.grad.data(), c.x_orig.data(), c.x.data(), c.scale.data(),
                                                 dx_orig.data(), dx.data(), dscale.data(), rows, period);
  CHECK(y.intact() && dx_orig.intact() && dx.intact() && dscale.intact(), "%s wrote outside, %ldx%ld", Type<T>::name,
        long(rows), long(period));
  for (int64_t j = 0; j < period; j++) {
    const long double s = value(c.scale[j]);
    long double sum = 0, size = 0;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t i = r * period + j;
      const long double o = value(c.x_orig[i]), v = value(c.x[i]), g = value(c.grad[i]);
      sum += g * (v - o), size += std::fabs(g * (v - o));
      CHECK(close(y[i], o + (v - o) * s, 4 * (std::fabs(o) + std::fabs(v))), "%s y, %ldx%ld, (%ld, %ld): got %.9g",
            Type<T>::name, long(rows), long(period), long(r), long(j), value(y[i]));
      CHECK(close(dx[i], g * s, 2 * std::fabs(g)), "%s dx, %ldx%ld, (%ld, %ld): got %.9g", Type<T>::name, long(rows),
            long(period), long(r), long(j), value(dx[i]));
      CHECK(close(dx_orig[i], g * (1 - s), 3 * std::fabs(g)), "%s dx_orig, %ldx%ld, (%ld, %ld): got %.9g",
            Type<T>::name, long(rows), long(period), long(r), long(j), value(dx_orig[i]));
    }
    CHECK(close(dscale[j], sum, size * (4 + rows)), "%s dscale, %ldx%ld, %ld: expected %.9Lg, got %.9g", Type<T>::name,
          long(rows), long(period), long(j), sum, static_cast<double>(dscale[j]));
  }
}

template <typename T>
void rows_apart() {
  const int64_t rows = 9, period = 53;
  Case<T> c(rows, period, 5);
  Buffer<T> y(rows * period), y2(rows * period);
  cpu::kernels<cpu::BypassKernels<T>>().forward(c.x_orig.data(), c.x.data(), c.scale.data(), y.data(), rows, period);
  for (int64_t r = 0; r < rows; r++)
    cpu::kernels<cpu::BypassKernels<T>>().forward(c.x_orig.data() + r * period, c.x.data() + r * period, c.scale.data(),
                                                  y2.data() + r * period, 1, period);
  CHECK(y.equals(y2), "%s: rows differ from the whole", Type<T>::name);
  // scale 1 takes x up to rounding, and a NaN of x_orig reaches the output as in the formula
  c.x_orig[4 * period + 3] = make<T>(std::numeric_limits<double>::quiet_NaN());
  cpu::kernels<cpu::BypassKernels<T>>().forward(c.x_orig.data(), c.x.data(), c.scale.data(), y2.data(), rows, period);
  for (int64_t i = 0; i < rows * period; i++)
    if (i == 4 * period + 3)
      CHECK(std::isnan(value(y2[i])), "%s: NaN lost", Type<T>::name);
    else
      CHECK(same_bits(y[i], y2[i]), "%s: a NaN spread to %ld", Type<T>::name, long(i));
}

}  // namespace

TEST_CASE("bypass") {
  for_each_type([&]<typename T>() {
    for (const int64_t rows : {0, 1, 4})
      for (const int64_t period : kSizes) values<T>(rows, period);
    rows_apart<T>();
  });
}

}  // namespace fastasr::test
