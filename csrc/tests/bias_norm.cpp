// SPDX-License-Identifier: Apache-2.0
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

  BiasNorm(int64_t rows_, int64_t channels_, int64_t step_, Rounding rounding = nullptr)
      : rows(rows_), channels(channels_), step(step_), random(seed_of(rows, channels), rounding) {}
  void run(int64_t begin, int64_t end) {
    const auto& kernel = cpu::kernels<cpu::BiasNormKernels<T>>();
    const int64_t at = begin * channels, piece = step ? begin / step : 0;
    kernel.forward(x + at, bias, 0.8, y + at, end - begin, channels);
    kernel.backward(grad + at, x + at, bias, 0.8, dx + at, dbias + piece * channels, dlog_scale + piece, end - begin,
                    channels);
  }
  auto by_row() { return std::tie(y, dx); }
  auto sums() { return std::tie(dbias, dlog_scale); }
};

// A NaN marks its row; a row that equals the bias has no norm (there is no epsilon: x * inf); no other row changes.
template <typename T>
void bias_norm_special_rows() {
  constexpr int64_t kChannels = 37;
  BiasNorm<T> clean(7, kChannels, 7), c(7, kChannels, 7);
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
      for (const int64_t channels : kSizes)
        if (channels) values_like_double<BiasNorm, T>(rows, channels, 10);
    rows_apart(7, 2, [](int64_t step) { return BiasNorm<T>(7, 37, step); });
    rows_apart(61, 4, [](int64_t step) { return BiasNorm<T>(61, 67, step); });
    bias_norm_special_rows<T>();
  });
}

}  // namespace
}  // namespace fastasr::test
