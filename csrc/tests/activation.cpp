// SPDX-License-Identifier: Apache-2.0
#include "cpu/math/activation.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

long double expected(int activation, long double x, long double* slope) {
  const long double s = 1 / (1 + std::exp(-x)), t = std::tanh(x);
  const long double cumulative = 0.5L * std::erfc(-x * 0.70710678118654752440L);
  switch (activation) {
    case 1:
      *slope = s * (1 + x / (1 + std::exp(x)));
      return x * s;
    case 2:
      *slope = x > 0;
      return x > 0 ? x : 0;
    case 3:
      *slope = 1 / (std::cosh(x) * std::cosh(x));
      return t;
    case 4:
      *slope = cumulative + x * std::exp(-0.5L * x * x) * 0.39894228040143267794L;
      return x * cumulative;
    default:
      *slope = 1;
      return x;
  }
}

// Compares with long double over the range where exponentials do not overflow, relative to the terms of the formula.
template <typename C>
void values(double unit) {
  for (int a = 0; a < cpu::kActivations; a++)
    for (const int64_t n : kSizes) {
      Buffer<C> x(n), y(n), slope(n), only(n);
      Random random(static_cast<uint64_t>(n) + 1);
      x.fill(random, 3);
      if (n > 3) x[1] = 0, x[2] = C(30), x[3] = C(-30);
      for (int64_t i = 0; i < n; i++) y[i] = only[i] = x[i];
      CHECK(cpu::activate_with_slope(a, y.data(), slope.data(), n) && cpu::activate(a, only.data(), n), "known");
      CHECK(y.intact() && slope.intact() && y.equals(only), "activation %d, %ld elements", a, long(n));
      for (int64_t i = 0; i < n; i++) {
        long double d;
        const long double v = expected(a, x[i], &d);
        // rounding the exponent's argument, x or x^2 / 2, makes a relative error of the exponential
        const long double room = 8 + static_cast<long double>(x[i]) * x[i], floor = 1e-30L;
        CHECK(std::fabs(y[i] - v) <= unit * room * std::fabs(v) + floor,
              "activation %d of %g: expected %.9Lg, got %.9g", a, double(x[i]), v, double(y[i]));
        CHECK(std::fabs(slope[i] - d) <= unit * room * (1 + std::fabs(d)), "slope %d at %g: expected %.9Lg, got %.9g",
              a, double(x[i]), d, double(slope[i]));
      }
    }
}

template <typename C>
void special() {
  const C nan = std::numeric_limits<C>::quiet_NaN(), inf = std::numeric_limits<C>::infinity();
  for (int a = 0; a < cpu::kActivations; a++) {
    C x[3] = {nan, inf, -inf}, slope[3];
    cpu::activate_with_slope(a, x, slope, 3);
    CHECK(std::isnan(x[0]), "activation %d of NaN", a);
    CHECK(a == 3 ? x[1] == 1 : x[1] == inf, "activation %d of infinity: %g", a, double(x[1]));
    const C below = a == 1 || a == 4 ? nan : a == 2 ? 0 : a == 3 ? -1 : -inf;  // torch's silu and gelu say NaN
    CHECK(x[2] == below || (std::isnan(below) && std::isnan(x[2])), "activation %d of -infinity: %g", a, double(x[2]));
  }
  C x[1] = {2};
  CHECK(!cpu::activate(cpu::kActivations, x, 1) && !cpu::activate(-1, x, 1) && x[0] == 2, "no such activation");
}

}  // namespace

TEST_CASE("activation") {
  values<float>(0x1p-24);
  values<double>(0x1p-50);
  special<float>();
  special<double>();
}

}  // namespace fastasr::test
