// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/residual_norm.h"

#include "tests/rows_case.h"

namespace fastasr::test {
namespace {

// Rows lie further apart than they are long.
template <typename T>
struct ResidualNorm {
  using C = compute_t<T>;
  int64_t rows, channels, step, stride = channels + 3, n = rows * channels;
  bool gated, masked;
  Random random;
  Buffer<T> x{rows * stride, 0, random}, u{rows * stride, 0, random}, c{rows * stride, 0, random},
      h{rows * stride, 0, random}, g{n, 0, random}, y{n}, dx{n}, du{gated ? n : 0}, ds{gated ? n : 0};
  Buffer<C> w{channels, 0, random, 0.5, 1}, b{channels, 0, random, 0.5, 1}, mask{n, 0, random, 0.5, 1};
  Buffer<C> dw{pieces_of(rows, step) * channels}, db{pieces_of(rows, step) * channels}, kept{3 * rows};

  ResidualNorm(int64_t rows_, int64_t channels_, int64_t step_, bool gated_, bool masked_, Rounding rounding = nullptr)
      : rows(rows_),
        channels(channels_),
        step(step_),
        gated(gated_),
        masked(masked_),
        random(seed_of(rows, channels), rounding) {}
  void run(int64_t begin, int64_t end) {
    const auto& kernel = cpu::kernels<cpu::ResidualNormKernels<T>>();
    Buffer<C> scratch(cpu::residual_norm_scratch(channels));
    cpu::ResidualNorm<T> p{};
    p.x = {x, stride}, p.update = {u, stride};
    if (gated) p.candidate = {c, stride}, p.hidden = {h, stride};
    p.mask = masked ? mask.data() : nullptr;
    p.weight = w, p.bias = b, p.eps = 1e-3, p.activation = 1, p.channels = channels;
    auto* statistics = reinterpret_cast<cpu::RowStatistics<C>*>(kept.data());
    const int64_t at = (step ? begin / step : 0) * channels;
    kernel.forward(p, begin, end, y, statistics, scratch);
    kernel.backward(p, g, channels % 2 ? statistics : nullptr, begin, end, dx, gated ? du.data() : nullptr,
                    gated ? ds.data() : nullptr, dw + at, db + at, scratch);
  }
  auto by_row() { return std::tie(y, dx, du, ds); }
  auto sums() { return std::tie(dw, db); }
};

// Rows of one value become the bias, whatever the epsilon.
template <typename T>
void a_row_of_one_value() {
  using C = compute_t<T>;
  const int64_t channels = 37;
  Random random(3);
  Buffer<T> x(channels), u(channels), y(channels);
  Buffer<C> w(channels, 0, random), b(channels, 0, random), scratch(cpu::residual_norm_scratch(channels));
  x.set(0.1), u.set(0);
  cpu::ResidualNorm<T> p{};
  p.x = {x, channels}, p.update = {u, channels};
  p.weight = w, p.bias = b, p.eps = 1e-12, p.channels = channels;
  cpu::kernels<cpu::ResidualNormKernels<T>>().forward(p, 0, 1, y, nullptr, scratch);
  for (int64_t j = 0; j < channels; j++)
    CHECK(same_bits(y[j], make<T>(value(b[j]))), "%s: a row of one value", Type<T>::name);
}

TEST_CASE("residual_norm") {
  for_each_type([&]<typename T>() {
    for (const int64_t rows : {0, 1, 3})
      for (const int64_t channels : kSizes)
        for (int form = 0; channels && form < 3; form++)
          values_like_double<ResidualNorm, T>(rows, channels, 600, form > 0, form == 2);
    for (const bool gated : {false, true})
      rows_apart(61, 4, [&](int64_t step) { return ResidualNorm<T>(61, 67, step, gated, gated); });
    a_row_of_one_value<T>();
  });
}

}  // namespace
}  // namespace fastasr::test
