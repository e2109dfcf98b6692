// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/balancer_gradient.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

template <typename T>
void rows_and_runs(int64_t rows, int64_t channels) {
  const auto& kernel = cpu::kernels<cpu::BalancerKernels<T>>();
  using C = compute_t<T>;
  const int64_t stride = channels + channels % 3, n = rows * channels;
  Random random(static_cast<uint64_t>(rows * 31 + channels));
  Buffer<T> x(rows * stride, channels % 4), grad(n, 1), y(n, 2), run(rows), run_grad(rows), run_y(rows);
  Buffer<C> shift(channels), offset(channels), slope(channels);
  Buffer<double> s1(channels), s2(channels);
  x.fill(random, 0.5, 3), grad.fill(random), shift.fill(random, 0.2, 3), offset.fill(random, 0.1);
  slope.fill(random, 0.1);
  kernel.sums_rows(x.data(), stride, shift.data(), s1.data(), s2.data(), rows, channels);
  kernel.apply_rows(grad.data(), x.data(), stride, shift.data(), offset.data(), slope.data(), y.data(), rows, channels);
  CHECK(s1.intact() && s2.intact() && y.intact(), "%s wrote outside, %ldx%ld", Type<T>::name, long(rows),
        long(channels));
  for (int64_t c = 0; c < channels; c++) {
    long double e1 = 0, e2 = 0, size = 0;
    for (int64_t r = 0; r < rows; r++) {
      const long double d = static_cast<long double>(value(x[r * stride + c])) - value(shift[c]);
      const long double g = value(grad[r * channels + c]), l = value(offset[c]) + value(slope[c]) * d;
      e1 += d, e2 += d * d, size += std::fabs(d) + std::fabs(value(shift[c]));
      const long double parts = std::fabs(value(offset[c])) + std::fabs(value(slope[c])) * (std::fabs(d) + 8);
      CHECK(close(y[r * channels + c], g + std::fabs(g) * l, 6 * std::fabs(g) * (1 + parts)), "%s y, (%ld, %ld)",
            Type<T>::name, long(r), long(c));
      run[r] = x[r * stride + c], run_grad[r] = grad[r * channels + c];
    }
    const double unit = Type<C>::half_ulp;
    CHECK(std::fabs(s1[c] - e1) <= 16 * unit * size, "%s s1, %ldx%ld, %ld: expected %.9Lg, got %.9g", Type<T>::name,
          long(rows), long(channels), long(c), e1, s1[c]);
    CHECK(std::fabs(s2[c] - e2) <= 16 * unit * (e2 + size), "%s s2, %ldx%ld, %ld: expected %.9Lg, got %.9g",
          Type<T>::name, long(rows), long(channels), long(c), e2, s2[c]);
    double t1 = -1, t2 = -1;
    kernel.sums_run(run.data(), shift[c], &t1, &t2, rows);
    kernel.apply_run(run_grad.data(), run.data(), shift[c], offset[c], slope[c], run_y.data(), rows);
    CHECK(std::fabs(t1 - e1) <= 64 * unit * size && std::fabs(t2 - e2) <= 64 * unit * (e2 + size), "%s run of %ld",
          Type<T>::name, long(rows));
    for (int64_t r = 0; r < rows; r++)
      CHECK(close(run_y[r], value(y[r * channels + c]), 8), "%s run's y, %ld of %ld", Type<T>::name, long(r),
            long(rows));
  }
}

void coefficients() {
  const cpu::BalancerLimits limits{-0.1, 0.1, 0.5, 2.0, 0.04};
  double offset, slope;
  // within the limits nothing changes
  cpu::balancer_coefficients(0.0, 100.0, 0.0, 100, limits, &offset, &slope);
  CHECK(offset == 0 && slope == 0, "within: %g %g", offset, slope);
  // too large: the change is along x, of root mean square 0.04
  cpu::balancer_coefficients(0.0, 900.0, 0.0, 100, limits, &offset, &slope);
  CHECK(offset == 0 && std::fabs(slope * 3 - 0.04) < 1e-12, "too large: %g %g", offset, slope);
  // too small
  cpu::balancer_coefficients(0.0, 1.0, 0.0, 100, limits, &offset, &slope);
  CHECK(offset == 0 && std::fabs(slope * 0.1 + 0.04) < 1e-12, "too small: %g %g", offset, slope);
  // constant channels have no deviation to grow
  cpu::balancer_coefficients(0.0, 0.0, 1.0, 100, limits, &offset, &slope);
  CHECK(std::fabs(offset - 0.04) < 1e-12 && slope == 0, "constant: %g %g", offset, slope);
  cpu::balancer_coefficients(0.0, 0.0, 0.0, 100, limits, &offset, &slope);
  CHECK(offset == 0 && slope == 0, "zero: %g %g", offset, slope);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  cpu::balancer_coefficients(nan, nan, 0.0, 100, limits, &offset, &slope);
  CHECK(std::isnan(offset) && std::isnan(slope), "a NaN is lost: %g %g", offset, slope);
}

}  // namespace

TEST_CASE("balancer_gradient") {
  coefficients();
  for_each_type([&]<typename T>() {
    for (const int64_t rows : {0, 1, 15, 16, 17, 40, 300})
      for (const int64_t channels : {1, 3, 16, 33, 513}) rows_and_runs<T>(rows, channels);
  });
}

}  // namespace fastasr::test
