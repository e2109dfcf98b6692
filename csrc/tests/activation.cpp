// SPDX-License-Identifier: Apache-2.0
#include "cpu/math/activation.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

// Compares with long double over the range where exponentials do not overflow, relative to the terms of the formula.
template <typename C>
void values(double unit) {
  for (int a = 0; a < cpu::kActivations; a++)
    for (const int64_t n : kSizes) {
      INFO("activation ", a, ", ", n, " elements");
      Random random(static_cast<uint64_t>(n) + 1);
      Buffer<C> x(n, 0, random, 3), y(n), slope(n), only(n);
      if (n > 3) x[1] = 0, x[2] = C(30), x[3] = C(-30);
      for (int64_t i = 0; i < n; i++) y[i] = only[i] = x[i];
      CHECK(cpu::activate_with_slope(a, y.data(), slope.data(), n) && cpu::activate(a, only.data(), n));
      CHECK(y.equals(only));
      for (int64_t i = 0; i < n; i++) {
        const Activated want = activated(a, x(i));
        // rounding the exponent's argument, x or x^2 / 2, makes a relative error of the exponential
        const long double room = 8 + x(i) * x(i);
        EXPECT_WITHIN(y, i, want.value, unit * room * std::fabs(want.value) + 1e-30L);
        EXPECT_WITHIN(slope, i, want.slope, unit * room * (1 + std::fabs(want.slope)));
      }
    }
}

// A gate may multiply a slope by 1e30 and more: far out it must be what it tends to.
template <typename C>
void far_out() {
  for (int a = 0; a < cpu::kActivations; a++) {
    C x[2] = {C(1e30), C(-1e30)}, slope[2];
    cpu::activate_with_slope(a, x, slope, 2);
    const C above = a == 3 ? 0 : 1, below = a == 0 ? 1 : 0;
    CHECK(std::fabs(slope[0] - above) < 1e-37 && std::fabs(slope[1] - below) < 1e-37, "activation %d: %g and %g", a,
          double(slope[0]), double(slope[1]));
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
  far_out<float>();
  far_out<double>();
  special<float>();
  special<double>();
}

}  // namespace fastasr::test
