// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <vector>

#include "cpu/rows/bias_norm.h"
#include "tests/rows_case.h"

namespace fastasr::test {
namespace {

template <typename T>
struct BiasNorm {
  using C = compute_t<T>;
  int64_t rows, channels, step, n = rows * channels;
  Random random;
  Buffer<T> x{n, channels % 4, random, 1.5, 0.2}, grad{n, channels % 3, random},
      bias{channels, channels % 2, random, 0.5}, y{n, channels % 5}, dx{n, channels % 2};
  Buffer<C> dbias{pieces_of(rows, step) * channels};
  Buffer<double> dlog_scale{pieces_of(rows, step)};
  C scale = static_cast<C>(0.8);

  BiasNorm(int64_t rows_, int64_t channels_, int64_t step_, uint64_t seed)
      : rows(rows_), channels(channels_), step(step_), random(seed) {}
  void run(int64_t begin, int64_t end) {
    const auto& kernel = cpu::kernels<cpu::BiasNormKernels<T>>();
    const int64_t at = begin * channels, piece = step ? begin / step : 0;
    kernel.forward(x + at, bias, scale, y + at, end - begin, channels);
    kernel.backward(grad + at, x + at, bias, scale, dx + at, dbias + piece * channels, dlog_scale + piece, end - begin,
                    channels);
  }
  bool same_rows(BiasNorm& o) { return y.equals(o.y) && dx.equals(o.dx); }
  bool same_sums(BiasNorm& o) { return dbias.equals(o.dbias) && dlog_scale.equals(o.dlog_scale); }
};

template <typename T>
void bias_norm_values(int64_t rows, int64_t channels) {
  INFO(Type<T>::name, " ", rows, "x", channels);
  BiasNorm<T> c(rows, channels, rows, static_cast<uint64_t>(rows * 131 + channels));
  c.run(0, rows);
  std::vector<Sum> dbias(static_cast<size_t>(channels));
  Sum dlog_scale;
  for (int64_t first = 0; first < c.n; first += channels) {
    long double sum = 0;
    Sum dot;
    for (int64_t j = 0; j < channels; j++) {
      const long double v = c.x(first + j), d = v - c.bias(j);
      sum += d * d, dot.add(c.grad(first + j) * v);
    }
    const long double s = c.scale / std::sqrt(sum / channels), k = dot.value * s / sum, units = 6;
    dlog_scale.add(dot.value * s, dot.size * s * units);
    for (int64_t j = 0; j < channels; j++) {
      const int64_t i = first + j;
      const long double v = c.x(i), d = v - c.bias(j), g = c.grad(i);
      const long double k_size = dot.size * s / sum * std::fabs(d) * units;
      dbias[j].add(k * d, k_size + std::fabs(k * d) * rows);
      EXPECT(c.y, i, v * s, units * std::fabs(v * s));
      EXPECT(c.dx, i, g * s - k * d, units * std::fabs(g * s) + k_size);
    }
  }
  EXPECT_ALL(c.dbias, dbias, 1);
  if (channels)
    EXPECT_WITHIN(c.dlog_scale, 0, dlog_scale.value, dlog_scale.size * Type<compute_t<T>>::half_ulp + 1e-15L);
}

// A NaN marks its row; a row that equals the bias has no norm (there is no epsilon: x * inf); no other row changes.
template <typename T>
void bias_norm_special_rows() {
  constexpr int64_t kChannels = 37;
  BiasNorm<T> clean(7, kChannels, 7, 11), c(7, kChannels, 7, 11);
  c.x[2 * kChannels + 5] = make<T>(kNan);
  for (int64_t j = 0; j < kChannels; j++) c.x[4 * kChannels + j] = c.bias[j];
  clean.run(0, 7), c.run(0, 7);
  for (int64_t i = 0; i < c.n; i++) {
    const int64_t row = i / kChannels;
    CHECK(row == 2   ? std::isnan(c.y(i))
          : row == 4 ? !std::isfinite(c.y(i))
                     : same_bits(c.y[i], clean.y[i]),
          "%s row %ld", Type<T>::name, long(row));
  }
}

TEST_CASE("bias_norm") {
  for_each_type([&]<typename T>() {
    for (const int64_t rows : {0, 1, 3})
      for (const int64_t channels : kSizes) bias_norm_values<T>(rows, channels);
    rows_apart(7, 2, [](int64_t step) { return BiasNorm<T>(7, 37, step, 11); });
    rows_apart(61, 4, [](int64_t step) { return BiasNorm<T>(61, 67, step, 1); });
    bias_norm_special_rows<T>();
  });
}

}  // namespace
}  // namespace fastasr::test
