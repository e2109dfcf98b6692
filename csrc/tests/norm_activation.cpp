// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/norm_activation.h"

#include "cpu/math/activation.h"
#include "tests/rows_case.h"

namespace fastasr::test {
namespace {

struct Form {
  bool centred, has_bias, keeps;
  int activation;
  double limit = kInf;
};

template <typename T>
struct NormActivation {
  using C = compute_t<T>;
  int64_t rows, channels, step, n = rows * channels;
  Form form;
  Random random;
  Buffer<T> x{n, channels % 4, random, 1.5, 0.4}, grad{n, channels % 3, random}, y{n, channels % 5},
      dx{n, channels % 2};
  Buffer<C> weight{channels, 0, random, 0.5, 1}, bias{channels, 0, random, 0.5};
  Buffer<C> dweight{pieces_of(rows, step) * channels}, dbias{pieces_of(rows, step) * channels}, kept{3 * rows};

  NormActivation(int64_t rows_, int64_t channels_, int64_t step_, Form form_, Rounding rounding = nullptr)
      : rows(rows_), channels(channels_), step(step_), form(form_), random(seed_of(rows, channels), rounding) {}
  void run(int64_t begin, int64_t end) {
    const auto& kernel = cpu::kernels<cpu::NormActivationKernels<T>>();
    Buffer<C> scratch(cpu::norm_activation_scratch(channels));
    const cpu::NormActivation<T> p{x,
                                   weight,
                                   form.has_bias ? bias.data() : nullptr,
                                   1e-3,
                                   static_cast<C>(form.limit),
                                   form.centred,
                                   form.activation,
                                   channels};
    auto* statistics = reinterpret_cast<cpu::RowStatistics<C>*>(kept.data());
    const int64_t piece = step ? begin / step : 0;
    kernel.forward(p, begin, end, y, statistics, scratch);
    kernel.backward(p, grad, form.keeps ? statistics : nullptr, begin, end, dx, dweight + piece * channels,
                    dbias + piece * channels, scratch);
  }
  auto by_row() { return std::tie(y, dx); }
  auto sums() { return std::tie(dweight, dbias); }
};

// A NaN marks its row; a row of one value becomes act(bias).
template <typename T>
void norm_activation_special_rows() {
  constexpr int64_t kChannels = 37;
  NormActivation<T> clean(5, kChannels, 5, {true, true, true, 0}), c(5, kChannels, 5, {true, true, true, 0});
  c.x[1 * kChannels + 5] = make<T>(kNan);
  for (int64_t j = 0; j < kChannels; j++) c.x[3 * kChannels + j] = make<T>(0.1);
  clean.run(0, 5), c.run(0, 5);
  for (int64_t i = 0; i < c.n; i++) {
    const int64_t row = i / kChannels, j = i % kChannels;
    CHECK(row == 1   ? std::isnan(c.y(i))
          : row == 3 ? same_bits(c.y[i], make<T>(value(c.bias[j])))
                     : same_bits(c.y[i], clean.y[i]),
          "%s row %ld", Type<T>::name, long(row));
  }
}

TEST_CASE("norm_activation") {
  for_each_type([&]<typename T>() {
    for (const int64_t rows : {0, 1, 3})
      for (const int64_t channels : kSizes)
        for (int form = 0; channels && form < 4; form++)
          values_like_double<NormActivation, T>(
              rows, channels, 1000,
              Form{form % 2 == 0, form < 2, channels % 2 == 0, int(channels + form) % cpu::kActivations,
                   form == 3 ? 1.25 : kInf});
    for (const bool centred : {true, false}) {
      rows_apart(7, 2, [&](int64_t step) { return NormActivation<T>(7, 37, step, {centred, true, true, 1}); });
      rows_apart(61, 4, [&](int64_t step) { return NormActivation<T>(61, 67, step, {centred, false, false, 1}); });
    }
    norm_activation_special_rows<T>();
  });
}

}  // namespace
}  // namespace fastasr::test
