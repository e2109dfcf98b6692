// SPDX-License-Identifier: Apache-2.0
// Error bounds of the elementary functions, over dense sweeps, against long double.
#include "cpu/math/elementary.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kFma = true;
#else
constexpr bool kFma = false;
#endif

struct Worst {
  long double error = 0;
  double at = 0;
  // relative error beyond `allowed`
  void add(double x, long double got, long double expected, long double allowed = 0) {
    const long double e = std::fabs(got - expected) / std::fabs(expected) - allowed;
    if (!(e <= error)) error = e, at = x;
  }
};

void exponential() {
  using cpu::exp_nonpositive;
  Worst worst;
  // Without FMA the argument's reduction rounds once more, by |x| 2^-24: far out the result is tiny, so nobody sees it.
  const auto reduction = [](float x) { return kFma ? 0.0L : std::fabs(x) * 0x1p-24L; };
  // every 307th float from -87 up to -2^-30
  const auto first = static_cast<uint32_t>(cpu::to_bits(-0x1p-30f)), last = static_cast<uint32_t>(cpu::to_bits(-87.0f));
  for (uint32_t p = first; p <= last; p += 307) {
    const float x = cpu::from_bits(static_cast<int32_t>(p));
    worst.add(x, exp_nonpositive(x), std::exp(static_cast<long double>(x)), reduction(x));
  }
  CHECK(worst.error < (kFma ? 1.2e-7L : 2e-7L), "exp_nonpositive: relative error %Lg at %a", worst.error, worst.at);
  CHECK(exp_nonpositive(0.0f) == 1.0f && exp_nonpositive(-0.0f) == 1.0f, "e^0");
  const float least = exp_nonpositive(-std::numeric_limits<float>::infinity());
  CHECK(least >= 0 && least < 1.7e-38f, "e^-inf: got %g", least);
  CHECK(exp_nonpositive(-1e30f) == least && exp_nonpositive(-88.0f) == least, "far below the cut-off");
  CHECK(std::isnan(exp_nonpositive(std::numeric_limits<float>::quiet_NaN())), "e^NaN");
  CHECK(std::isnan(cpu::exp_or_zero(cpu::from_bits(0x7fffffff))), "e^NaN with all bits set");
  CHECK(exp_nonpositive(-1.0) == std::exp(-1.0), "the double is the library's");
}

void logarithm() {
  using cpu::log1p_unit;
  Worst worst;
  for (uint32_t p = static_cast<uint32_t>(cpu::to_bits(0x1p-40f)); p <= 0x3f800000u; p += 211) {
    const float u = cpu::from_bits(static_cast<int32_t>(p));
    worst.add(u, log1p_unit(u), std::log1p(static_cast<long double>(u)));
  }
  CHECK(worst.error < (kFma ? 1.4e-7L : 2e-7L), "log1p_unit: relative error %Lg at %a", worst.error, worst.at);
  CHECK(log1p_unit(0.0f) == 0.0f, "log 1");
  CHECK(log1p_unit(0x1p-149f) == 0x1p-149f, "a subnormal is its own logarithm");
  CHECK(log1p_unit(0.5) == std::log1p(0.5), "the double is the library's");
}

}  // namespace

TEST_CASE("elementary") {
  exponential();
  logarithm();
}

}  // namespace fastasr::test
