// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/conv_subsampling.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

using cpu::SubsamplingSizes;

// Makes every call as the bindings do, `step` blocks, groups or sequences at a time.
template <typename T>
struct Case {
  SubsamplingSizes s;
  bool masked;
  Rounding rounding = nullptr;
  int64_t in_size = s.batch * s.frames * s.bins, taps = 9 * s.channels;
  int64_t out_size = s.batch * s.out_frames() * s.out_width() * s.channels;
  Random random{static_cast<uint64_t>(in_size * 31 + s.channels), rounding};
  Buffer<T> x{in_size, s.bins % 3, random}, weight{taps, 1, random, 0.3}, bias{s.channels, 0, random, 0.3},
      depthwise_weight{taps, 2, random, 0.3}, depthwise_bias{s.channels, 1, random}, grad{out_size, 3, random};
  Buffer<T> y{out_size, 1}, dx{in_size, 2}, dweight{taps, 3}, dbias{s.channels, 1}, ddepthwise_weight{taps, 0},
      ddepthwise_bias{s.channels, 2};
  std::unique_ptr<bool[]> mask{new bool[static_cast<size_t>(s.batch * s.first_frames())]};

  void run(int64_t step) {
    for (int64_t i = 0; i < s.batch * s.first_frames(); i++) mask[size_t(i)] = i % 7 != 3;
    const auto& kernel = cpu::kernels<cpu::ConvSubsamplingKernels<T>>();
    const cpu::SubsamplingInputs<T> in{
        x, weight, bias, depthwise_weight, depthwise_bias, masked ? mask.get() : nullptr};
    in_pieces(cpu::subsampling_blocks(s), step, [&](int64_t b, int64_t e) { kernel.forward(s, in, y, b, e); });
    const int64_t groups = cpu::subsampling_groups(s);
    std::vector<double> parts(size_t(groups * cpu::kSubsamplingSums * s.channels));
    std::vector<double> dx_parts(size_t(cpu::subsampling_blocks(s) * cpu::kSubsamplingRows * s.bins));
    in_pieces(groups, step,
              [&](int64_t b, int64_t e) { kernel.backward(s, in, grad, parts.data(), dx_parts.data(), b, e); });
    kernel.reduce(s, parts.data(), dweight, dbias, ddepthwise_weight, ddepthwise_bias);
    in_pieces(s.batch, step, [&](int64_t b, int64_t e) { kernel.add_blocks(s, dx_parts.data(), dx, b, e); });
  }
  auto outputs() { return std::tie(y, dx, dweight, dbias, ddepthwise_weight, ddepthwise_bias); }
};

template <typename T>
void values(const SubsamplingSizes& s, bool masked) {
  INFO(Type<T>::name, " B=", s.batch, " T=", s.frames, " F=", s.bins, " C=", s.channels, " left ", s.left);
  like_double_in_any_pieces<Case, T>(3, 20, s, masked);
}

}  // namespace

TEST_CASE("conv_subsampling") {
  for_each_type([]<typename T>() {
    for (const int64_t channels : {1, 5, 16, 33})
      for (const int64_t bins : {3, 4, 7, 20, 43}) values<T>({2, 23, bins, channels, 1 + bins % 2}, channels > 5);
    for (const int64_t frames : {7, 8, 10, 67, 68, 71, 140}) values<T>({2, frames, 9, 12, 1 + frames % 2}, true);
    values<T>({3, 40, 82, 20, 1}, false);
    values<T>({40, 7, 5, 3, 2}, true);  // more blocks than groups
    values<T>({0, 7, 5, 3, 1}, true);
  });
}

}  // namespace fastasr::test
