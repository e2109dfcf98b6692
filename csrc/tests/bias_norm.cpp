// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/bias_norm.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

template <typename T>
struct Case {
  int64_t rows, channels;
  Buffer<T> x, grad, bias;
  compute_t<T> scale = static_cast<compute_t<T>>(0.8);
  Case(int64_t r, int64_t c, uint64_t seed)
      : rows(r), channels(c), x(r * c, c % 4), grad(r * c, c % 3), bias(c, c % 2) {
    Random random(seed);
    x.fill(random, 1.5, 0.2);
    grad.fill(random);
    bias.fill(random, 0.5);
  }
};

template <typename T>
void values(int64_t rows, int64_t channels) {
  const auto& kernel = cpu::kernels<cpu::BiasNormKernels<T>>();
  using C = compute_t<T>;
  Case<T> c(rows, channels, static_cast<uint64_t>(rows * 131 + channels));
  Buffer<T> y(rows * channels, channels % 5), dx(rows * channels, channels % 2);
  Buffer<C> dbias(channels);
  double dlog_scale = 1e300;
  kernel.forward(c.x.data(), c.bias.data(), c.scale, y.data(), rows, channels);
  kernel.backward(c.grad.data(), c.x.data(), c.bias.data(), c.scale, dx.data(), dbias.data(), &dlog_scale, rows,
                  channels);
  CHECK(y.intact() && dx.intact() && dbias.intact(), "%s wrote outside, %ldx%ld", Type<T>::name, long(rows),
        long(channels));

  std::vector<long double> db(static_cast<size_t>(channels)), db_size(static_cast<size_t>(channels));
  long double dls = 0, dls_size = 0;
  for (int64_t r = 0; r < rows; r++) {
    long double sum = 0, dot = 0, dot_size = 0;
    for (int64_t j = 0; j < channels; j++) {
      const int64_t i = r * channels + j;
      const long double v = value(c.x[i]), d = v - value(c.bias[j]), g = value(c.grad[i]);
      sum += d * d, dot += g * v, dot_size += std::fabs(g * v);
    }
    const long double s = c.scale / std::sqrt(sum / channels), k = dot * s / sum, n = 6;
    dls += dot * s, dls_size += dot_size * s * n;
    for (int64_t j = 0; j < channels; j++) {
      const int64_t i = r * channels + j;
      const long double v = value(c.x[i]), d = v - value(c.bias[j]), g = value(c.grad[i]);
      const long double k_size = dot_size * s / sum * std::fabs(d) * n;
      db[static_cast<size_t>(j)] += k * d, db_size[static_cast<size_t>(j)] += k_size + std::fabs(k * d) * rows;
      CHECK(close(y[i], v * s, n * std::fabs(v * s)), "%s y, %ldx%ld, (%ld, %ld): expected %.9Lg, got %.9g",
            Type<T>::name, long(rows), long(channels), long(r), long(j), v * s, value(y[i]));
      CHECK(close(dx[i], g * s - k * d, n * std::fabs(g * s) + k_size),
            "%s dx, %ldx%ld, (%ld, %ld): expected %.9Lg, got %.9g", Type<T>::name, long(rows), long(channels), long(r),
            long(j), g * s - k * d, value(dx[i]));
    }
  }
  for (int64_t j = 0; j < channels; j++)
    CHECK(close(dbias[j], db[static_cast<size_t>(j)], db_size[static_cast<size_t>(j)]),
          "%s dbias, %ldx%ld, %ld: expected %.9Lg, got %.9g", Type<T>::name, long(rows), long(channels), long(j),
          db[static_cast<size_t>(j)], static_cast<double>(dbias[j]));
  if (channels)
    CHECK(std::fabs(dlog_scale - dls) <= dls_size * Type<C>::half_ulp + 1e-15L,
          "%s dlog_scale, %ldx%ld: expected %.12Lg, got %.12g", Type<T>::name, long(rows), long(channels), dls,
          dlog_scale);
}

// Rows are independent: a block of rows gives the bits of the whole, and a NaN or a zero row stays where it is.
template <typename T>
void rows_apart() {
  const auto& kernel = cpu::kernels<cpu::BiasNormKernels<T>>();
  using C = compute_t<T>;
  const int64_t rows = 7, channels = 37;
  Case<T> c(rows, channels, 11);
  Buffer<T> y(rows * channels), y2(rows * channels), dx(rows * channels), dx2(rows * channels);
  Buffer<C> dbias(channels);
  double dlog_scale;
  kernel.forward(c.x.data(), c.bias.data(), c.scale, y.data(), rows, channels);
  kernel.backward(c.grad.data(), c.x.data(), c.bias.data(), c.scale, dx.data(), dbias.data(), &dlog_scale, rows,
                  channels);
  for (int64_t r = 0; r < rows; r += 2) {
    const int64_t at = r * channels, m = r + 2 <= rows ? 2 : 1;
    kernel.forward(c.x.data() + at, c.bias.data(), c.scale, y2.data() + at, m, channels);
    kernel.backward(c.grad.data() + at, c.x.data() + at, c.bias.data(), c.scale, dx2.data() + at, dbias.data(),
                    &dlog_scale, m, channels);
  }
  CHECK(y.equals(y2) && dx.equals(dx2), "%s: blocks of rows differ from the whole", Type<T>::name);

  c.x[2 * channels + 5] = make<T>(std::numeric_limits<double>::quiet_NaN());
  for (int64_t j = 0; j < channels; j++) c.x[4 * channels + j] = c.bias[j];
  kernel.forward(c.x.data(), c.bias.data(), c.scale, y2.data(), rows, channels);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < channels; j++) {
      const int64_t i = r * channels + j;
      if (r == 2) {
        CHECK(std::isnan(value(y2[i])), "%s: a NaN marks its row", Type<T>::name);
      } else if (r == 4) {  // no epsilon: x * inf
        CHECK(!std::isfinite(value(y2[i])), "%s: a row equal to bias has no norm", Type<T>::name);
      } else {
        CHECK(same_bits(y[i], y2[i]), "%s: row %ld changed", Type<T>::name, long(r));
      }
    }
}

}  // namespace

TEST_CASE("bias_norm") {
  for_each_type([&]<typename T>() {
    for (const int64_t rows : {0, 1, 3})
      for (const int64_t channels : kSizes) values<T>(rows, channels);
    rows_apart<T>();
  });
}

}  // namespace fastasr::test
