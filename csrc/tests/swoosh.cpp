// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "cpu/rows/swoosh.h"
#include "tests/rows_case.h"

namespace fastasr::test {
namespace {

using cpu::Mask;
using cpu::Swoosh;

struct Expected {
  long double value, slope, size;  // size: magnitude of the summands, which bounds the rounding of the value
};

Expected swoosh(long double x, Swoosh kind) {
  const long double shift = kind == Swoosh::L ? 4 : 1, offset = kind == Swoosh::L ? 0.035L : 0.313261687L;
  const long double z = x - shift, u = std::exp(-std::fabs(z));
  const long double softplus = (z > 0 ? z : 0) + std::log1p(u), line = 0.08L * x + offset;
  return {softplus - line, (z > 0 ? 1 : u) / (1 + u) - 0.08L, softplus + std::fabs(line) + shift};
}

template <typename T>
struct SwooshCase {
  int64_t n;
  Mask mask_kind;
  Swoosh kind;
  Random random;
  Buffer<T> x{n, n % 4}, grad{n, n % 3}, mask{mask_kind == Mask::elementwise ? n : 1, n % 5};
  Buffer<T> y{n, n % 2}, dx{n, n % 7}, again{n};

  SwooshCase(int64_t n_, Mask mask_kind_, Swoosh kind_, uint64_t seed)
      : n(n_), mask_kind(mask_kind_), kind(kind_), random(seed) {
    // most around the bend, some far out on either side
    for (int64_t i = 0; i < n; i++) x[i] = make<T>(random.normal() * (i % 8 == 7 ? 50 : 4) + 2);
    grad.fill(random);
    for (int64_t i = 0; i < mask.size(); i++) mask[i] = make<T>(random.uniform() > 0.3 ? 1 / 0.7 : 0.0);
  }
  const T* mask_from(int64_t i) {
    return mask_kind == Mask::none ? nullptr : mask + (mask_kind == Mask::elementwise ? i : 0);
  }
  void backward(int64_t begin, int64_t end, T* dx_to, T* y_to) {
    cpu::kernels<cpu::SwooshKernels<T>>().backward(grad + begin, x + begin, mask_from(begin), mask_kind, dx_to, y_to,
                                                   end - begin, kind);
  }
  void run(int64_t begin, int64_t end) {
    cpu::kernels<cpu::SwooshKernels<T>>().forward(x + begin, mask_from(begin), mask_kind, y + begin, end - begin, kind);
    backward(begin, end, dx + begin, again + begin);
  }
  auto by_row() { return std::tie(y, dx, again); }
  auto sums() { return std::tie(); }
};

template <typename T>
void swoosh_values(int64_t n, Mask mask_kind, Swoosh kind) {
  INFO(Type<T>::name, " swoosh ", int(kind), ", mask ", int(mask_kind), ", n = ", n);
  SwooshCase<T> c(n, mask_kind, kind, static_cast<uint64_t>(n) + 1);
  Buffer<T> dx_only(n);
  c.run(0, n);
  c.backward(0, n, dx_only, nullptr);
  for (int64_t i = 0; i < n; i++) {
    const Expected e = swoosh(c.x(i), kind);
    const long double m = mask_kind == Mask::none ? 1 : value(*c.mask_from(i)), g = c.grad(i);
    EXPECT(c.y, i, e.value * m, 6 * e.size * m);
    EXPECT(c.again, i, e.value * m, 6 * e.size * m);
    EXPECT(c.dx, i, g * e.slope * m, 8 * std::fabs(g) * m);
  }
  CHECK(c.dx.equals(dx_only), "dx depends on whether the output is asked for");
  c.backward(0, n, c.grad, c.again);
  CHECK(c.grad.equals(c.dx), "backward in place differs");
}

// A piece of the work gives the same bits as the whole, whatever its size.
template <typename T>
void swoosh_pieces(Mask mask_kind, Swoosh kind) {
  SwooshCase<T> c(1031, mask_kind, kind, 3), pieces(1031, mask_kind, kind, 3);
  c.run(0, c.n);
  for (int64_t begin = 0, step = 1; begin < c.n; begin += step, step = step * 2 + 1)
    pieces.run(begin, std::min(begin + step, c.n));
  CHECK(same_outputs(c.by_row(), pieces.by_row()), "%s: pieces differ from the whole", Type<T>::name);
}

template <typename T>
void swoosh_special_values(Swoosh kind) {
  SwooshCase<T> c(40, Mask::none, kind, 1);  // the tail and the body of a vectorised loop both see each value
  c.grad.set(1);
  const auto run = [&](double v) { c.x.set(v), c.run(0, c.n); };
  run(kNan);
  for (int64_t i = 0; i < c.n; i++) CHECK(std::isnan(c.y(i)) && std::isnan(c.dx(i)), "%s NaN", Type<T>::name);
  run(kInf);
  for (int64_t i = 0; i < c.n; i++) CHECK(std::isnan(c.y(i)), "%s: inf - inf", Type<T>::name);
  run(-kInf);
  for (int64_t i = 0; i < c.n; i++) EXPECT(c.y, i, kInf, 0);
  for (const double v : {0.0, -0.0, 1e-30, -1e-30, 1e-42, 4.0, 1.0, 60.0, -60.0, 3e4, -3e4, 1e30, -1e30, 3e38, -3e38}) {
    INFO("at ", v);
    run(v);
    if (!std::isfinite(c.x(0))) continue;  // beyond this type
    const Expected e = swoosh(c.x(0), kind);
    for (int64_t i = 0; i < c.n; i++) {
      EXPECT(c.y, i, e.value, 6 * e.size);
      EXPECT(c.dx, i, e.slope, 8);
    }
  }
}

// Every bfloat16 and half gives the double result rounded once, or its neighbour.
template <typename T>
void swoosh_every_pattern(Swoosh kind) {
  Buffer<T> x(0x10000), y(0x10000);
  for (int64_t p = 0; p < 0x10000; p++) x[p].bits = static_cast<uint16_t>(p);
  cpu::kernels<cpu::SwooshKernels<T>>().forward(x, nullptr, Mask::none, y, 0x10000, kind);
  for (int64_t p = 0; p < 0x10000; p++) {
    if (!std::isfinite(x(p))) continue;
    const Expected e = swoosh(x(p), kind);
    EXPECT(y, p, e.value, 6 * e.size);
  }
}

TEST_CASE("swoosh") {
  for (const Swoosh kind : {Swoosh::L, Swoosh::R}) {
    for_each_type([&]<typename T>() {
      for (const Mask mask : {Mask::none, Mask::scalar, Mask::elementwise}) {
        for (const int64_t n : kSizes) swoosh_values<T>(n, mask, kind);
        swoosh_pieces<T>(mask, kind);
      }
      swoosh_special_values<T>(kind);
      rows_apart(61 * 67, 4 * 67, [&](int64_t) { return SwooshCase<T>(61 * 67, Mask::elementwise, kind, 1); });
    });
    swoosh_every_pattern<bfloat16>(kind);
    swoosh_every_pattern<float16>(kind);
  }
}

}  // namespace
}  // namespace fastasr::test
