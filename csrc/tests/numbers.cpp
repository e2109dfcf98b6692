// SPDX-License-Identifier: Apache-2.0
// Conversions of 16-bit numbers: every pattern, and rounding at every boundary between neighbours.
#include "tests/check.h"

namespace fastasr::test {
namespace {

struct Format {
  int mantissa, bias, top;  // mantissa bits, exponent bias, exponent of infinities and NaNs
};
constexpr Format kBfloat16{7, 127, 255}, kFloat16{10, 15, 31};

// Returns the value of a pattern by the definition of the format; NaN for NaNs.
double decode(uint16_t bits, Format f) {
  const int exponent = (bits >> f.mantissa) & f.top;
  const int fraction = bits & ((1 << f.mantissa) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == f.top)
    return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - f.bias - f.mantissa);
  return sign * std::ldexp((1 << f.mantissa) + fraction, exponent - f.bias - f.mantissa);
}

template <typename T>
uint16_t stored(float v) {
  T out;
  cpu::store(&out, v);
  return out.bits;
}

template <typename T>
void every_pattern(Format f) {
  for (uint32_t p = 0; p < 0x10000; p++) {
    const auto bits = static_cast<uint16_t>(p);
    const float loaded = cpu::load(T{bits});
    const double expected = decode(bits, f);
    if (std::isnan(expected)) {
      CHECK(std::isnan(loaded), "%s 0x%04x: expected NaN, got %g", Type<T>::name, bits, loaded);
      CHECK(std::isnan(decode(stored<T>(loaded), f)), "%s 0x%04x: NaN lost in the round trip", Type<T>::name, bits);
      continue;
    }
    CHECK(loaded == expected && std::signbit(loaded) == std::signbit(expected), "%s 0x%04x: expected %g, got %g",
          Type<T>::name, bits, expected, loaded);
    CHECK(stored<T>(loaded) == bits, "%s 0x%04x: round trip gives 0x%04x", Type<T>::name, bits, stored<T>(loaded));
  }
}

// Between neighbours a number rounds down below the midpoint, up above it, and to the even pattern at it; the same
// holds with a sign.
template <typename T>
void rounding(Format f) {
  const auto infinite = static_cast<uint16_t>(f.top << f.mantissa);
  for (uint16_t low = 0; low < infinite; low++) {
    const auto high = static_cast<uint16_t>(low + 1);
    const double a = decode(low, f);
    // the value that the pattern of infinity would have if exponents went on
    const double b = high == infinite ? std::ldexp(1.0, f.top - f.bias) : decode(high, f);
    const auto middle = static_cast<float>((a + b) / 2);
    if (static_cast<double>(middle) != (a + b) / 2) continue;  // below float's own subnormals
    const float inf = std::numeric_limits<float>::infinity();
    const uint16_t even = low & 1 ? high : low;
    const struct {
      float v;
      uint16_t expected;
    } cases[] = {{std::nextafter(middle, 0.0f), low}, {middle, even}, {std::nextafter(middle, inf), high}};
    for (const auto& c : cases)
      for (const uint16_t sign : {0, 0x8000}) {
        const uint16_t got = stored<T>(sign ? -c.v : c.v);
        CHECK(got == (c.expected | sign), "%s %a: expected 0x%04x, got 0x%04x", Type<T>::name, sign ? -c.v : c.v,
              c.expected | sign, got);
      }
  }
}

// A spread of all floats, NaN payloads and float's subnormals among them, rounds to the nearest neighbour.
template <typename T>
void spread(Format f) {
  for (uint64_t p = 0; p < 0x100000000ull; p += 65521) {
    const float v = cpu::from_bits(static_cast<int32_t>(static_cast<uint32_t>(p)));
    const uint16_t got = stored<T>(v);
    const double decoded = decode(got, f);
    if (std::isnan(v)) {
      CHECK(std::isnan(decoded), "%s: NaN 0x%08x became %g", Type<T>::name, static_cast<uint32_t>(p), decoded);
    } else if (std::isfinite(decoded)) {
      const double error = std::fabs(decoded - static_cast<double>(v));
      for (const int step : {-1, 1}) {
        const double neighbour = decode(static_cast<uint16_t>(got + step), f);
        if (std::isfinite(neighbour) && (got & 0x7fff) != 0)
          CHECK(error <= std::fabs(neighbour - static_cast<double>(v)), "%s %a: %g is not nearest", Type<T>::name, v,
                decoded);
      }
    } else {
      CHECK(std::fabs(v) > Type<T>::largest, "%s %a became infinite", Type<T>::name, v);
    }
  }
}

}  // namespace

TEST_CASE("numbers") {
  every_pattern<bfloat16>(kBfloat16);
  every_pattern<float16>(kFloat16);
  rounding<bfloat16>(kBfloat16);
  rounding<float16>(kFloat16);
  spread<bfloat16>(kBfloat16);
  spread<float16>(kFloat16);
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  CHECK(stored<float16>(65504.0f) == 0x7bff, "largest half");
  CHECK(stored<float16>(std::nextafter(65520.0f, 0.0f)) == 0x7bff,
        "just below the rounding boundary of the largest half");
  CHECK(stored<float16>(65520.0f) == 0x7c00 && stored<float16>(-inf) == 0xfc00, "half overflow");
  CHECK(stored<float16>(0x1p-24f) == 1 && stored<float16>(0x1p-25f) == 0, "smallest subnormal half; tie to even");
  CHECK(stored<float16>(-0.0f) == 0x8000 && stored<bfloat16>(-0.0f) == 0x8000, "signed zero");
  CHECK(stored<bfloat16>(Type<float>::largest) == 0x7f80 && stored<bfloat16>(inf) == 0x7f80, "bfloat16 overflow");
  CHECK((stored<bfloat16>(nan) & 0x7fff) == 0x7fc0 && (stored<float16>(nan) & 0x7fff) == 0x7e00, "quiet NaN");
}

}  // namespace fastasr::test
