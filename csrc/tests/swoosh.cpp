// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/swoosh.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

using cpu::Mask;
using cpu::Swoosh;

constexpr Mask kMasks[] = {Mask::none, Mask::scalar, Mask::elementwise};
constexpr Swoosh kKinds[] = {Swoosh::L, Swoosh::R};

struct Expected {
  long double value, slope, size;  // size: magnitude of the summands, which bounds the rounding of the value
};

Expected definition(long double x, Swoosh kind) {
  const long double shift = kind == Swoosh::L ? 4 : 1, offset = kind == Swoosh::L ? 0.035L : 0.313261687L;
  const long double z = x - shift, u = std::exp(-std::fabs(z));
  const long double softplus = (z > 0 ? z : 0) + std::log1p(u);
  const long double line = 0.08L * x + offset;
  return {softplus - line, (z > 0 ? 1 : u) / (1 + u) - 0.08L, softplus + std::fabs(line) + shift};
}

template <typename T>
struct Case {
  Buffer<T> x, grad, mask;
  Mask mask_kind;
  Case(int64_t n, Mask kind, uint64_t seed)
      : x(n, n % 4), grad(n, n % 3), mask(kind == Mask::elementwise ? n : 1, n % 5), mask_kind(kind) {
    Random random(seed);
    // most around the bend, some far out on either side
    for (int64_t i = 0; i < n; i++) x[i] = make<T>(random.normal() * (i % 8 == 7 ? 50 : 4) + 2);
    grad.fill(random);
    for (int64_t i = 0; i < mask.size(); i++) mask[i] = make<T>(random.uniform() > 0.3 ? 1 / 0.7 : 0.0);
  }
  const T* mask_data() { return mask_kind == Mask::none ? nullptr : mask.data(); }
  long double mask_at(int64_t i) {
    return mask_kind == Mask::none ? 1 : value(mask[mask_kind == Mask::elementwise ? i : 0]);
  }
};

template <typename T>
void values(int64_t n, Mask mask_kind, Swoosh kind) {
  Case<T> c(n, mask_kind, static_cast<uint64_t>(n) + 1);
  Buffer<T> y(n, n % 2), dx(n, n % 7), again(n), dx_only(n);
  cpu::kernels<cpu::SwooshKernels<T>>().forward(c.x.data(), c.mask_data(), mask_kind, y.data(), n, kind);
  cpu::kernels<cpu::SwooshKernels<T>>().backward(c.grad.data(), c.x.data(), c.mask_data(), mask_kind, dx.data(),
                                                 again.data(), n, kind);
  cpu::kernels<cpu::SwooshKernels<T>>().backward(c.grad.data(), c.x.data(), c.mask_data(), mask_kind, dx_only.data(),
                                                 static_cast<T*>(nullptr), n, kind);
  for (int64_t i = 0; i < n; i++) {
    const Expected e = definition(value(c.x[i]), kind);
    const long double m = c.mask_at(i), g = value(c.grad[i]);
    CHECK(close(y[i], e.value * m, 6 * e.size * m), "%s forward, n=%ld, i=%ld, x=%.9g: expected %.9Lg, got %.9g",
          Type<T>::name, long(n), long(i), value(c.x[i]), e.value * m, value(y[i]));
    CHECK(close(again[i], e.value * m, 6 * e.size * m), "%s output of backward, n=%ld, i=%ld", Type<T>::name, long(n),
          long(i));
    CHECK(close(dx[i], g * e.slope * m, 8 * std::fabs(g) * m), "%s dx, n=%ld, i=%ld, x=%.9g: expected %.9Lg, got %.9g",
          Type<T>::name, long(n), long(i), value(c.x[i]), g * e.slope * m, value(dx[i]));
  }
  CHECK(y.intact() && dx.intact() && again.intact() && dx_only.intact(), "%s wrote outside, n=%ld", Type<T>::name,
        long(n));
  CHECK(dx.equals(dx_only), "%s: dx depends on whether the output is asked for, n=%ld", Type<T>::name, long(n));

  // in place: dx is grad's memory
  cpu::kernels<cpu::SwooshKernels<T>>().backward(c.grad.data(), c.x.data(), c.mask_data(), mask_kind, c.grad.data(),
                                                 again.data(), n, kind);
  CHECK(c.grad.equals(dx), "%s: backward in place differs, n=%ld", Type<T>::name, long(n));
}

// A piece of the work gives the same bits as the whole, so results do not depend on the number of threads.
template <typename T>
void pieces(Mask mask_kind, Swoosh kind) {
  const int64_t n = 1031;
  Case<T> c(n, mask_kind, 3);
  Buffer<T> y(n), y2(n), dx(n), dx2(n);
  cpu::kernels<cpu::SwooshKernels<T>>().forward(c.x.data(), c.mask_data(), mask_kind, y.data(), n, kind);
  cpu::kernels<cpu::SwooshKernels<T>>().backward(c.grad.data(), c.x.data(), c.mask_data(), mask_kind, dx.data(),
                                                 y2.data(), n, kind);
  for (int64_t begin = 0, step = 1; begin < n; begin += step, step = step * 2 + 1) {
    const int64_t m = step < n - begin ? step : n - begin;
    const T* mask = mask_kind == Mask::elementwise ? c.mask.data() + begin : c.mask_data();
    cpu::kernels<cpu::SwooshKernels<T>>().forward(c.x.data() + begin, mask, mask_kind, y2.data() + begin, m, kind);
    cpu::kernels<cpu::SwooshKernels<T>>().backward(c.grad.data() + begin, c.x.data() + begin, mask, mask_kind,
                                                   dx2.data() + begin, static_cast<T*>(nullptr), m, kind);
  }
  CHECK(y.equals(y2) && dx.equals(dx2), "%s: pieces differ from the whole", Type<T>::name);
}

template <typename T>
void special_values(Swoosh kind) {
  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  const int64_t n = 40;  // the tail and the body of a vectorised loop both see each value
  Buffer<T> x(n), y(n), dx(n), grad(n);
  const auto run = [&](double v) {
    for (int64_t i = 0; i < n; i++) x[i] = make<T>(v), grad[i] = make<T>(1);
    cpu::kernels<cpu::SwooshKernels<T>>().forward(x.data(), static_cast<const T*>(nullptr), Mask::none, y.data(), n,
                                                  kind);
    cpu::kernels<cpu::SwooshKernels<T>>().backward(grad.data(), x.data(), static_cast<const T*>(nullptr), Mask::none,
                                                   dx.data(), static_cast<T*>(nullptr), n, kind);
  };
  run(nan);
  for (int64_t i = 0; i < n; i++) CHECK(std::isnan(value(y[i])) && std::isnan(value(dx[i])), "%s NaN", Type<T>::name);
  run(inf);
  for (int64_t i = 0; i < n; i++) CHECK(std::isnan(value(y[i])), "%s: inf - inf, got %g", Type<T>::name, value(y[i]));
  run(-inf);
  for (int64_t i = 0; i < n; i++) CHECK(value(y[i]) == inf, "%s: -inf, got %g", Type<T>::name, value(y[i]));
  for (const double v : {0.0, -0.0, 1e-30, -1e-30, 1e-42, 4.0, 1.0, 60.0, -60.0, 3e4, -3e4, 1e30, -1e30, 3e38, -3e38}) {
    run(v);
    const double x0 = value(x[0]);
    if (!std::isfinite(x0)) continue;  // beyond this type
    const Expected e = definition(x0, kind);
    for (int64_t i = 0; i < n; i++) {
      CHECK(close(y[i], e.value, 6 * e.size), "%s at %g: expected %.9Lg, got %.9g", Type<T>::name, x0, e.value,
            value(y[i]));
      CHECK(close(dx[i], e.slope, 8), "%s slope at %g: expected %.9Lg, got %.9g", Type<T>::name, x0, e.slope,
            value(dx[i]));
    }
  }
}

// Every bfloat16 and half gives the double result rounded once, or its neighbour.
template <typename T>
void every_pattern(Swoosh kind) {
  Buffer<T> x(0x10000), y(0x10000);
  for (int64_t p = 0; p < 0x10000; p++) x[p].bits = static_cast<uint16_t>(p);
  cpu::kernels<cpu::SwooshKernels<T>>().forward(x.data(), static_cast<const T*>(nullptr), Mask::none, y.data(), 0x10000,
                                                kind);
  for (int64_t p = 0; p < 0x10000; p++) {
    const double v = value(x[p]);
    if (!std::isfinite(v)) continue;
    const Expected e = definition(v, kind);
    CHECK(close(y[p], e.value, 6 * e.size), "%s at %g: expected %.9Lg, got %.9g", Type<T>::name, v, e.value,
          value(y[p]));
  }
}

}  // namespace

TEST_CASE("swoosh") {
  for (const Swoosh kind : kKinds) {
    for_each_type([&]<typename T>() {
      for (const Mask mask : kMasks) {
        for (const int64_t n : kSizes) values<T>(n, mask, kind);
        pieces<T>(mask, kind);
      }
      special_values<T>(kind);
    });
    every_pattern<bfloat16>(kind);
    every_pattern<float16>(kind);
  }
}

}  // namespace fastasr::test
