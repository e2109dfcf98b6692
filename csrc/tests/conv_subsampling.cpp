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
  int64_t in_size = s.batch * s.frames * s.bins, taps = 9 * s.channels;
  int64_t out_size = s.batch * s.out_frames() * s.out_width() * s.channels;
  Random random{static_cast<uint64_t>(in_size * 31 + s.channels)};
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
};

template <typename T>
void values(const SubsamplingSizes& s, bool masked) {
  INFO(Type<T>::name, " B=", s.batch, " T=", s.frames, " F=", s.bins, " C=", s.channels, " left ", s.left);
  Case<T> k{s, masked}, other{s, masked};
  k.run(3), other.run(1);
  const int64_t H = s.first_frames(), W = s.first_width(), C = s.channels;
  std::vector<Sum> h(size_t(s.batch * H * W * C)), dh(h.size()), y(size_t(k.out_size)), dx(size_t(k.in_size)),
      dw(size_t(k.taps)), db(dw.size() / 9), dv(size_t(k.taps)), dvb(db.size());
  const auto first = [&](int64_t b, int64_t t, int64_t f, int64_t c) { return size_t(((b * H + t) * W + f) * C + c); };
  const auto each = [&](const auto& f) {
    for (int64_t b = 0; b < s.batch; b++)
      for (int64_t t = 0; t < H; t++)
        for (int64_t q = 0; q < W; q++)
          for (int64_t c = 0; c < C; c++) f(b, t, q, c, first(b, t, q, c));
  };
  const auto pixel = [&](int64_t b, int64_t t, int64_t f, int64_t i, int64_t j) {
    return (b * s.frames + 2 * t + i) * s.bins + 2 * f + j;
  };
  each([&](int64_t b, int64_t t, int64_t f, int64_t c, size_t at) {
    h[at].add(k.bias(c));
    for (int64_t i = 0; i < 9; i++) h[at].add(k.weight(9 * c + i) * k.x(pixel(b, t, f, i / 3, i % 3)));
    if (h[at].value <= 0 || (masked && !k.mask[size_t(b * H + t)])) h[at] = Sum{};
  });
  for (int64_t b = 0; b < s.batch; b++)
    for (int64_t t = 0; t < s.out_frames(); t++)
      for (int64_t f = 0; f < s.out_width(); f++)
        for (int64_t c = 0; c < C; c++) {
          const int64_t o = ((b * s.out_frames() + t) * s.out_width() + f) * C + c;
          y[size_t(o)].add(k.depthwise_bias(c)), dvb[size_t(c)].add(k.grad(o));
          for (int64_t i = 0; i < 9; i++) {
            const int64_t q = 2 * f + i % 3 - s.left;
            if (q < 0 || q >= W) continue;
            const size_t at = first(b, 2 * t + i / 3, q, c);
            const long double v = k.depthwise_weight(9 * c + i), g = k.grad(o);
            y[size_t(o)].add(v * h[at].value, std::fabs(v) * h[at].size);
            dv[size_t(9 * c + i)].add(g * h[at].value, std::fabs(g) * h[at].size);
            dh[at].add(v * g);
          }
        }
  each([&](int64_t b, int64_t t, int64_t f, int64_t c, size_t at) {
    if (!(h[at].value > 0)) return;
    db[size_t(c)].add(dh[at].value, dh[at].size);
    for (int64_t i = 0; i < 9; i++) {
      const int64_t from = pixel(b, t, f, i / 3, i % 3);
      const long double x = k.x(from), w = k.weight(9 * c + i);
      dw[size_t(9 * c + i)].add(x * dh[at].value, std::fabs(x) * dh[at].size);
      dx[size_t(from)].add(w * dh[at].value, std::fabs(w) * dh[at].size);
    }
  });
  EXPECT_ALL(k.y, y, 8);
  EXPECT_ALL(k.dx, dx, 6);
  EXPECT_ALL(k.dweight, dw, 6);
  EXPECT_ALL(k.dbias, db, 6);
  EXPECT_ALL(k.ddepthwise_weight, dv, 8);
  EXPECT_ALL(k.ddepthwise_bias, dvb, 4);
  CHECK(k.y.equals(other.y) && k.dx.equals(other.dx) && k.dweight.equals(other.dweight) &&
            k.dbias.equals(other.dbias) && k.ddepthwise_weight.equals(other.ddepthwise_weight) &&
            k.ddepthwise_bias.equals(other.ddepthwise_bias),
        "the pieces of work show");
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
