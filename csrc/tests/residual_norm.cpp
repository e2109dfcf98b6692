// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "cpu/rows/residual_norm.h"
#include "tests/rows_case.h"

namespace fastasr::test {
namespace {

// Makes one call with rows further apart than they are long, on both forms.
template <typename T>
void residual_norm_values(int64_t rows, int64_t channels, bool gated, bool masked) {
  INFO(Type<T>::name, " ", rows, "x", channels, gated ? " gated" : "", masked ? " masked" : "");
  const auto& kernel = cpu::kernels<cpu::ResidualNormKernels<T>>();
  using C = compute_t<T>;
  const int64_t stride = channels + 3, n = rows * channels;
  Random random(static_cast<uint64_t>(rows * 7919 + channels * 4 + gated * 2 + masked));
  Buffer<T> x(rows * stride, 0, random), u(rows * stride, 0, random), c(rows * stride, 0, random),
      h(rows * stride, 0, random), g(n, 0, random), y(n), dx(n), du(n), ds(n);
  Buffer<C> w(channels, 0, random, 0.5, 1), b(channels, 0, random, 0.5, 1), mask(n, 0, random, 0.5, 1);
  Buffer<C> dw(channels), db(channels), scratch(cpu::residual_norm_scratch(channels)), kept(3 * rows);
  cpu::ResidualNorm<T> p{};
  p.x = {x, stride}, p.update = {u, stride};
  if (gated) p.candidate = {c, stride}, p.hidden = {h, stride};
  p.mask = masked ? mask.data() : nullptr;
  p.weight = w, p.bias = b, p.eps = 1e-3, p.activation = 1, p.channels = channels;
  auto* statistics = reinterpret_cast<cpu::RowStatistics<C>*>(kept.data());
  kernel.forward(p, 0, rows, y, statistics, scratch);
  kernel.backward(p, g, channels % 2 ? statistics : nullptr, 0, rows, dx, gated ? du.data() : nullptr,
                  gated ? ds.data() : nullptr, dw, db, scratch);

  Reals ew(static_cast<size_t>(channels)), t(ew), a(ew), s(ew), slope(ew);
  for (int64_t r = 0; r < rows; r++) {
    long double mean = 0, var = 0, d_mean = 0, d_along = 0;
    for (int64_t j = 0; j < channels; j++) {
      const int64_t at = r * stride + j;
      const Activated act = activated(1, static_cast<long double>(value(c[at]) + value(h[at])));
      const long double m = masked ? mask(r * channels + j) : 1;
      s[j] = logistic(u(at)), a[j] = act.value * m, slope[j] = m * act.slope;
      t[j] = gated ? x(at) + s[j] * (a[j] - x(at)) : x(at) + u(at);
      mean += t[j] / channels;
    }
    for (long double v : t) var += (v - mean) * (v - mean) / channels;
    const long double scale = 1 / std::sqrt(var + p.eps);
    for (int64_t j = 0; j < channels; j++) {
      const long double normed = (t[j] - mean) * scale, d = g(r * channels + j) * w(j);
      d_mean += d / channels, d_along += d * normed / channels, ew[j] += g(r * channels + j) * normed;
    }
    // t is exact to a few units of its parts; scale magnifies that
    const long double room = 40 * scale * 3, size = room * scale * 10;
    for (int64_t j = 0; j < channels; j++) {
      const int64_t at = r * channels + j;
      const long double normed = (t[j] - mean) * scale, d = g(at) * w(j), xv = x(r * stride + j);
      const long double dt = (d - d_mean - normed * d_along) * scale;
      EXPECT(y, at, normed * w(j) + b(j), room);
      EXPECT(dx, at, gated ? dt * (1 - s[j]) : dt, size);
      if (!gated) continue;
      EXPECT(du, at, dt * (a[j] - xv) * s[j] * (1 - s[j]), size);
      EXPECT(ds, at, dt * s[j] * slope[j], size);
    }
  }
  for (int64_t j = 0; j < channels; j++)
    EXPECT_WITHIN(dw, j, ew[j], Type<C>::half_ulp * 4000 * (1 + static_cast<long double>(rows)));
}

// Rows are independent, and rows of one value become the bias whatever the epsilon.
template <typename T>
void residual_norm_rows_apart() {
  const auto& kernel = cpu::kernels<cpu::ResidualNormKernels<T>>();
  using C = compute_t<T>;
  const int64_t rows = 5, channels = 37;
  Random random(3);
  Buffer<T> x(rows * channels, 0, random), u(rows * channels, 0, random), y(rows * channels), y2(rows * channels);
  Buffer<C> w(channels, 0, random), b(channels, 0, random), scratch(cpu::residual_norm_scratch(channels));
  for (int64_t j = 0; j < channels; j++) x[2 * channels + j] = make<T>(0.1), u[2 * channels + j] = make<T>(0);
  cpu::ResidualNorm<T> p{};
  p.x = {x, channels}, p.update = {u, channels};
  p.weight = w, p.bias = b, p.eps = 1e-12, p.channels = channels;
  kernel.forward(p, 0, rows, y, nullptr, scratch);
  kernel.forward(p, 0, 2, y2, nullptr, scratch);
  kernel.forward(p, 2, rows, y2, nullptr, scratch);
  CHECK(y.equals(y2), "%s: blocks of rows differ from the whole", Type<T>::name);
  for (int64_t j = 0; j < channels; j++)
    CHECK(same_bits(y[2 * channels + j], make<T>(value(b[j]))), "%s: a row of one value", Type<T>::name);
}

TEST_CASE("residual_norm") {
  for_each_type([&]<typename T>() {
    for (const int64_t rows : {0, 1, 3})
      for (const int64_t channels : kSizes)
        if (channels > 0)
          for (int form = 0; form < 3; form++) residual_norm_values<T>(rows, channels, form > 0, form == 2);
    residual_norm_rows_apart<T>();
  });
}

}  // namespace
}  // namespace fastasr::test
