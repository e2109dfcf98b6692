// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/depthwise_conv2d.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

using cpu::DepthwiseSizes;

// Makes every call as the bindings do, `step` blocks or groups at a time.
template <typename T>
struct Case {
  DepthwiseSizes s;
  Rounding rounding = nullptr;
  int64_t in_size = s.batch * s.frames * s.width * s.channels;
  int64_t out_size = s.batch * s.out_frames() * s.out_width() * s.channels;
  Random random{static_cast<uint64_t>(in_size * 31 + s.taps()), rounding};
  Buffer<T> x{in_size, s.width % 3, random}, weight{s.channels * s.taps(), 1, random, 0.3}, bias{s.channels, 0, random},
      grad{out_size, s.frames % 4, random};
  Buffer<T> y{out_size, 1}, dx{in_size, 2}, dweight{s.channels * s.taps(), 3}, dbias{s.channels, 1};

  void run(int64_t step) {
    const auto& kernel = cpu::kernels<cpu::DepthwiseConv2dKernels<T>>();
    const auto blocks = [&](const DepthwiseSizes& sizes, const T* in, const T* b, bool flip, T* out) {
      in_pieces(cpu::depthwise_blocks(sizes), step,
                [&](int64_t begin, int64_t end) { kernel.forward(sizes, in, weight, b, flip, out, begin, end); });
    };
    blocks(s, x, bias, false, y);
    blocks(s.transposed(), grad, nullptr, true, dx);
    const int64_t groups = cpu::depthwise_groups(s);
    std::vector<double> parts(static_cast<size_t>(groups * (s.taps() + 1) * s.channels));
    in_pieces(groups, step,
              [&](int64_t begin, int64_t end) { kernel.weight_gradient(s, grad, x, parts.data(), begin, end); });
    kernel.reduce(s, parts.data(), dweight, dbias);
  }
  auto outputs() { return std::tie(y, dx, dweight, dbias); }
};

template <typename T>
void values(const DepthwiseSizes& s) {
  INFO(Type<T>::name, " B=", s.batch, " T=", s.frames, " F=", s.width, " C=", s.channels, " taps ", s.taps_t, "x",
       s.taps_f, " pads ", s.pad_t, ", ", s.pad_f);
  like_double_in_any_pieces<Case, T>(3, 20, s);
}

}  // namespace

TEST_CASE("depthwise_conv2d") {
  for_each_type([]<typename T>() {
    for (const int64_t channels : {1, 4, 15, 16, 33})
      for (const int64_t width : {1, 3, 6, 9, 19}) values<T>({2, 9, width, channels, 7, 7, 3, 3});
    for (const int64_t frames : {1, 2, 31, 32, 33, 67}) values<T>({2, frames, 5, 20, 3, 5, 1, 2});
    values<T>({3, 40, 12, 17, 1, 1, 0, 0});
    values<T>({2, 20, 31, 8, 4, 9, 0, 3});  // narrower than the input along time
    values<T>({2, 20, 31, 8, 7, 7, 0, 3});  // a streaming step with its cache
    values<T>({1, 4, 4, 8, 5, 12, 4, 11});  // wider than the input
    values<T>({40, 3, 3, 5, 2, 2, 1, 1});   // more blocks than groups
    values<T>({0, 3, 3, 5, 3, 3, 1, 1});
    values<T>({2, 0, 3, 5, 1, 3, 0, 1});
  });
}

}  // namespace fastasr::test
