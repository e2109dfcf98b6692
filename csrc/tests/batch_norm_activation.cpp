// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/batch_norm_activation.h"

#include "cpu/math/activation.h"
#include "tests/rows_case.h"

namespace fastasr::test {
namespace {

template <typename T>
struct BatchNormActivation {
  using C = compute_t<T>;
  int64_t rows, channels, step, n = rows * channels;
  int activation;
  bool padded;
  Random random;
  Buffer<T> x{n, channels % 4, random, 1.5, 0.4}, grad{n, channels % 3, random}, y{n, channels % 5},
      dx{n, channels % 2};
  Buffer<C> weight{channels, 0, random, 0.5, 1}, bias{channels, 0, random, 0.5}, statistics{4 * channels};
  Buffer<C> dweight{pieces_of(rows, step) * channels}, dbias{pieces_of(rows, step) * channels}, mean{channels},
      variance{channels};
  std::vector<uint8_t> hidden = std::vector<uint8_t>(static_cast<size_t>(rows) + 1);

  BatchNormActivation(int64_t rows_, int64_t channels_, int64_t step_, int activation_, bool padded_,
                      Rounding rounding = nullptr)
      : rows(rows_),
        channels(channels_),
        step(step_),
        activation(activation_),
        padded(padded_),
        random(seed_of(rows, channels), rounding) {
    for (int64_t i = 0; padded && i < rows; i++) hidden[static_cast<size_t>(i)] = i % 3 == 1;
    combine();
  }
  bool seen(int64_t row) const { return !padded || !hidden[static_cast<size_t>(row)]; }

  // Sums of blocks of 4 rows, in long double; the shift is the mean of a block, rounded.
  void combine() {
    const int64_t blocks = (rows + 3) / 4;
    Buffer<C> shift(std::max<int64_t>(1, blocks * channels));
    Buffer<double> s1(std::max<int64_t>(1, blocks * channels)), s2(std::max<int64_t>(1, blocks * channels));
    std::vector<int64_t> counts(static_cast<size_t>(blocks));
    for (int64_t k = 0; k < blocks; k++) {
      const int64_t begin = 4 * k, end = std::min(begin + 4, rows);
      for (int64_t i = begin; i < end; i++) counts[static_cast<size_t>(k)] += seen(i);
      for (int64_t j = 0, at = k * channels; j < channels; j++, at++) {
        long double mean = 0, a = 0, b = 0;
        for (int64_t i = begin; i < end; i++)
          if (seen(i)) mean += x(i * channels + j) / static_cast<long double>(counts[static_cast<size_t>(k)]);
        shift[at] = static_cast<C>(mean);
        for (int64_t i = begin; i < end; i++) {
          const long double d = x(i * channels + j) - static_cast<long double>(shift[at]);
          if (seen(i)) a += d, b += d * d;
        }
        s1[at] = static_cast<double>(a), s2[at] = static_cast<double>(b);
      }
    }
    C* of = statistics.data();
    cpu::kernels<cpu::BatchNormActivationKernels<T>>().combine(
        {shift, s1, s2, counts.data(), blocks, channels}, 1e-3, 0, channels,
        {of, of + channels, of + 2 * channels, of + 3 * channels}, mean, variance);
  }
  void run(int64_t begin, int64_t end) {
    const auto& kernel = cpu::kernels<cpu::BatchNormActivationKernels<T>>();
    Buffer<C> scratch(cpu::batch_norm_activation_scratch(channels));
    const C* of = statistics.data();
    const cpu::BatchNormActivation<T> p{
        x,       padded ? reinterpret_cast<const bool*>(hidden.data()) : nullptr, weight,
        bias,    {of, of + channels, of + 2 * channels, of + 3 * channels},       activation,
        channels};
    const int64_t piece = step ? begin / step : 0;
    C *dw = dweight + piece * channels, *db = dbias + piece * channels;
    kernel.forward(p, begin, end, y, scratch);
    kernel.sums(p, grad, begin, end, dx, dw, db, scratch);
    // The sums of all rows take the place of these, so that rows do not depend on the pieces.
    kernel.backward(p, grad, weight, bias, begin, end, dx, scratch);
  }
  auto by_row() { return std::tie(y, dx, mean, variance); }
  auto sums() { return std::tie(dweight, dbias); }
};

TEST_CASE("batch_norm_activation") {
  for_each_type([&]<typename T>() {
    for (const int64_t rows : {0, 1, 3, 23})
      for (const int64_t channels : kSizes)
        for (int form = 0; channels && form < 2; form++)
          values_like_double<BatchNormActivation, T>(rows, channels, 100, int(channels + form) % cpu::kActivations,
                                                     form == 1);
    for (const bool padded : {true, false}) {
      rows_apart(7, 2, [&](int64_t step) { return BatchNormActivation<T>(7, 37, step, 1, padded); });
      rows_apart(61, 4, [&](int64_t step) { return BatchNormActivation<T>(61, 67, step, 1, padded); });
    }
  });
}

}  // namespace
}  // namespace fastasr::test
