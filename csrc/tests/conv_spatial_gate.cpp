// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/conv_spatial_gate.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

struct Shape {
  int64_t batch, frames, channels, taps;
  int activation;
  bool mask, bias;
};

template <typename T>
struct Case {
  using C = compute_t<T>;
  Shape s;
  Rounding rounding = nullptr;
  int64_t n = s.batch * s.frames * s.channels;
  Random random{static_cast<uint64_t>(s.frames * 1000 + s.channels * 10 + s.taps), rounding};
  Buffer<T> x{2 * n, 3, random, 1.5}, grad{n, 1, random}, y{n, 5}, dx{2 * n, 2};
  Buffer<C> norm_weight{s.channels, 1, random, 0.4}, norm_bias{s.channels, 0, random, 0.4},
      weight{s.channels * s.taps, 3, random, 0.4}, bias{s.channels, 0, random, 0.4};
  Buffer<C> du{n, 1}, dnorm_weight{s.channels}, dnorm_bias{s.channels}, dweight{weight.size(), 1}, dbias{s.channels};
  Buffer<bool> mask{s.batch * s.frames};

  // Runs tasks in pieces of `step`.
  void run(int64_t step) {
    for (int64_t i = 0; i < mask.size(); i++) mask[i] = i % s.frames > s.frames - 2 * (i / s.frames) - 1;
    const cpu::ConvSpatialGate<T> p{x,
                                    s.frames * 2 * s.channels,
                                    2 * s.channels,
                                    norm_weight,
                                    norm_bias,
                                    weight,
                                    s.bias ? bias.data() : nullptr,
                                    s.mask ? mask.data() : nullptr,
                                    s.batch,
                                    s.frames,
                                    s.channels,
                                    s.taps,
                                    1e-3,
                                    s.activation};
    const auto& kernel = cpu::kernels<cpu::ConvSpatialGateKernels<T>>();
    const int64_t rows = p.rows(), stripes = (s.channels + cpu::kSpatialGateStripe - 1) / cpu::kSpatialGateStripe;
    std::vector<cpu::RowStatistics<C>> of_rows(static_cast<size_t>(rows));
    auto* statistics = of_rows.data();
    std::vector<C> scratch(static_cast<size_t>(s.channels));
    in_pieces(rows, step,
              [&](int64_t begin, int64_t end) { kernel.statistics(p, statistics, begin, end, scratch.data()); });
    in_pieces(stripes * s.batch, step,
              [&](int64_t begin, int64_t end) { kernel.forward(p, statistics, y, begin, end); });
    in_pieces(stripes, step, [&](int64_t begin, int64_t end) {
      kernel.backward(p, statistics, grad, dx, du, s.channels, dweight, dbias, begin, end);
    });
    kernel.norm_backward(p, statistics, du, s.channels, dx, dnorm_weight, dnorm_bias, 0, rows);
  }
  auto outputs() { return std::tie(y, dx, dweight, dbias, dnorm_weight, dnorm_bias); }
};

template <typename T>
void values(const Shape& s) {
  INFO(Type<T>::name, " ", s.batch, "x", s.frames, "x", s.channels, ", ", s.taps, " taps");
  like_double_in_any_pieces<Case, T>(2, 100, s);
}

}  // namespace

TEST_CASE("conv_spatial_gate") {
  for_each_type([]<typename T>() {
    for (const int64_t channels : {1, 7, 32, 33, 70})
      for (const int64_t taps : {1, 5, 31}) values<T>({3, 70, channels, taps, 0, true, true});
    for (const int64_t frames : {1, 3, 63, 64, 65, 128, 130}) {
      values<T>({2, frames, 17, 31, 1, true, true});
      values<T>({2, frames, 40, 15, 3, false, false});
    }
  });
}

}  // namespace fastasr::test
