// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/residual_norm.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

// Makes one call with rows further apart than they are long, on both forms; the reference is the formula in long
// double.
template <typename T>
void values(int64_t rows, int64_t channels, bool gated, bool masked) {
  const auto& kernel = cpu::kernels<cpu::ResidualNormKernels<T>>();
  using C = compute_t<T>;
  const int64_t stride = channels + 3;
  Random random(static_cast<uint64_t>(rows * 7919 + channels * 4 + gated * 2 + masked));
  Buffer<T> x(rows * stride), u(rows * stride), c(rows * stride), h(rows * stride), g(rows * channels);
  Buffer<C> w(channels), b(channels), mask(rows * channels);
  for (Buffer<T>* t : {&x, &u, &c, &h, &g}) t->fill(random);
  for (Buffer<C>* t : {&w, &b, &mask}) t->fill(random, 0.5, 1);
  cpu::ResidualNorm<T> p{};
  p.x = {x.data(), stride}, p.update = {u.data(), stride};
  if (gated) p.candidate = {c.data(), stride}, p.hidden = {h.data(), stride};
  p.mask = masked ? mask.data() : nullptr;
  p.weight = w.data(), p.bias = b.data(), p.eps = 1e-3, p.activation = 1, p.channels = channels;
  Buffer<T> y(rows * channels), dx(rows * channels), du(rows * channels), ds(rows * channels);
  Buffer<C> dw(channels), db(channels), scratch(cpu::residual_norm_scratch(channels));
  Buffer<C> kept(3 * rows);
  auto* statistics = reinterpret_cast<cpu::RowStatistics<C>*>(kept.data());
  kernel.forward(p, 0, rows, y.data(), statistics, scratch.data());
  kernel.backward(p, g.data(), channels % 2 ? statistics : nullptr, 0, rows, dx.data(), gated ? du.data() : nullptr,
                  gated ? ds.data() : nullptr, dw.data(), db.data(), scratch.data());
  CHECK(y.intact() && dx.intact() && du.intact() && ds.intact() && dw.intact() && db.intact() && scratch.intact() &&
            kept.intact(),
        "%s %ldx%ld: wrote outside", Type<T>::name, long(rows), long(channels));

  std::vector<long double> ew(static_cast<size_t>(channels)), t(ew), a(ew), s(ew), slope(ew);
  for (int64_t r = 0; r < rows; r++) {
    long double mean = 0, var = 0, d_mean = 0, d_along = 0;
    for (size_t j = 0; j < ew.size(); j++) {
      const int64_t at = r * stride + static_cast<int64_t>(j);
      const long double xv = value(x[at]), uv = value(u[at]), z = value(c[at]) + value(h[at]);
      const long double m = masked ? value(mask[r * channels + static_cast<int64_t>(j)]) : 1,
                        e = 1 / (1 + std::exp(-z));
      s[j] = 1 / (1 + std::exp(-uv)), a[j] = z * e * m, slope[j] = m * e * (1 + z * (1 - e));
      t[j] = gated ? xv + s[j] * (a[j] - xv) : xv + uv;
      mean += t[j] / channels;
    }
    for (long double v : t) var += (v - mean) * (v - mean) / channels;
    const long double scale = 1 / std::sqrt(var + p.eps);
    for (size_t j = 0; j < ew.size(); j++) {
      const int64_t i = static_cast<int64_t>(j);
      const long double n = (t[j] - mean) * scale, d = value(g[r * channels + i]) * value(w[i]);
      d_mean += d / channels, d_along += d * n / channels, ew[j] += value(g[r * channels + i]) * n;
    }
    // t is exact to a few units of its parts; scale magnifies that
    const long double room = 40 * scale * 3;
    for (size_t j = 0; j < ew.size(); j++) {
      const int64_t i = static_cast<int64_t>(j), at = r * channels + i;
      const long double n = (t[j] - mean) * scale, d = value(g[at]) * value(w[i]);
      const long double dt = (d - d_mean - n * d_along) * scale, xv = value(x[r * stride + i]);
      CHECK(close(y[at], n * value(w[i]) + value(b[i]), room), "%s y %ldx%ld", Type<T>::name, long(rows),
            long(channels));
      const long double size = room * scale * 10;
      CHECK(close(dx[at], gated ? dt * (1 - s[j]) : dt, size), "%s dx %ldx%ld: %.8Lg, %.8g", Type<T>::name, long(rows),
            long(channels), gated ? dt * (1 - s[j]) : dt, value(dx[at]));
      if (!gated) continue;
      CHECK(close(du[at], dt * (a[j] - xv) * s[j] * (1 - s[j]), size), "%s dupdate %ldx%ld", Type<T>::name, long(rows),
            long(channels));
      CHECK(close(ds[at], dt * s[j] * slope[j], size), "%s dsum %ldx%ld", Type<T>::name, long(rows), long(channels));
    }
  }
  for (size_t j = 0; j < ew.size(); j++)
    CHECK(std::fabs(static_cast<long double>(dw[static_cast<int64_t>(j)]) - ew[j]) <=
              Type<C>::half_ulp * 4000 * (1 + static_cast<long double>(rows)),
          "%s dweight %ldx%ld", Type<T>::name, long(rows), long(channels));
}

// Rows are independent, and rows of one value become the bias whatever the epsilon.
template <typename T>
void rows_apart() {
  const auto& kernel = cpu::kernels<cpu::ResidualNormKernels<T>>();
  using C = compute_t<T>;
  const int64_t rows = 5, channels = 37;
  Random random(3);
  Buffer<T> x(rows * channels), u(rows * channels), y(rows * channels), y2(rows * channels);
  Buffer<C> w(channels), b(channels), scratch(cpu::residual_norm_scratch(channels));
  x.fill(random), u.fill(random), w.fill(random), b.fill(random);
  for (int64_t j = 0; j < channels; j++) x[2 * channels + j] = make<T>(0.1), u[2 * channels + j] = make<T>(0);
  cpu::ResidualNorm<T> p{};
  p.x = {x.data(), channels}, p.update = {u.data(), channels};
  p.weight = w.data(), p.bias = b.data(), p.eps = 1e-12, p.channels = channels;
  kernel.forward(p, 0, rows, y.data(), nullptr, scratch.data());
  kernel.forward(p, 0, 2, y2.data(), nullptr, scratch.data());
  kernel.forward(p, 2, rows, y2.data(), nullptr, scratch.data());
  CHECK(y.equals(y2), "%s: blocks of rows differ from the whole", Type<T>::name);
  for (int64_t j = 0; j < channels; j++)
    CHECK(same_bits(y[2 * channels + j], make<T>(static_cast<double>(b[j]))), "%s: a row of one value", Type<T>::name);
}

}  // namespace

TEST_CASE("residual_norm") {
  for_each_type([&]<typename T>() {
    for (const int64_t rows : {0, 1, 3})
      for (const int64_t channels : kSizes)
        if (channels > 0)
          for (int form = 0; form < 3; form++) values<T>(rows, channels, form > 0, form == 2);
    rows_apart<T>();
  });
}

}  // namespace fastasr::test
