// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/depthwise_conv_residual.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

struct Shape {
  int64_t batch, frames, channels, taps;
  bool bias;
  int64_t delay = 0;
  bool mask = false;
};

template <typename T>
struct Case {
  using C = compute_t<T>;
  Shape s;
  Rounding rounding = nullptr;
  int64_t row = s.channels + 3, n = s.batch * s.frames * s.channels;  // row: elements from one frame of x to the next
  Random random{static_cast<uint64_t>(s.frames * 1000 + s.channels * 10 + s.taps), rounding};
  Buffer<T> x{s.batch * s.frames * row, 3, random, 1.5}, grad{n, 1, random}, y{n, 5}, dx{n, 2};
  Buffer<C> weight{s.channels * s.taps, 3, random, 0.4}, bias{s.channels, 0, random, 0.4}, dweight{weight.size(), 1},
      dbias{s.channels};
  Buffer<bool> mask{s.batch * s.frames};

  // Runs tasks in pieces of `step`.
  void run(int64_t step) {
    const auto& kernel = cpu::kernels<cpu::DepthwiseConvResidualKernels<T>>();
    const int64_t stripes = (s.channels + cpu::kResidualStripe - 1) / cpu::kResidualStripe;
    for (int64_t i = 0; i < mask.size(); i++) {
      const int64_t b = i / s.frames, t = i % s.frames;
      mask[i] = t > s.frames - 2 * b - 1 || t % 7 == 3;
    }
    const bool* masked = s.mask ? mask.data() : nullptr;
    const cpu::DepthwiseConvResidual<T> p{
        x,      s.frames * row,      row, weight, s.bias ? bias.data() : nullptr, masked, s.batch, s.frames, s.channels,
        s.taps, s.taps / 2 + s.delay};
    in_pieces(stripes * s.batch, step, [&](int64_t begin, int64_t end) { kernel.forward(p, y, begin, end); });
    in_pieces(stripes, step,
              [&](int64_t begin, int64_t end) { kernel.backward(p, grad, dx, dweight, dbias, begin, end); });
  }
  auto outputs() { return std::tie(y, dx, dweight, dbias); }
};

template <typename T>
void values(const Shape& s) {
  INFO(Type<T>::name, " ", s.batch, "x", s.frames, "x", s.channels, ", ", s.taps, " taps");
  like_double_in_any_pieces<Case, T>(3, 20, s);
}

}  // namespace

TEST_CASE("depthwise_conv_residual") {
  for_each_type([]<typename T>() {
    for (const int64_t channels : {1, 7, 32, 33, 70})
      for (const int64_t taps : {1, 3, 31}) values<T>({3, 70, channels, taps, true});
    for (const int64_t frames : {1, 3, 63, 64, 65, 128, 130}) {
      values<T>({2, frames, 17, 31, true});
      values<T>({2, frames, 40, 3, false});
      values<T>({2, frames, 33, 11, true, 5, true});
      values<T>({2, frames, 17, 4, false, -2, true});
    }
  });
}

}  // namespace fastasr::test
