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
  int64_t row = s.channels + 3, n = s.batch * s.frames * s.channels;  // row: elements from one frame of x to the next
  Random random{static_cast<uint64_t>(s.frames * 1000 + s.channels * 10 + s.taps)};
  Buffer<T> x{s.batch * s.frames * row, 3, random, 1.5}, grad{n, 1, random}, y{n, 5}, dx{n, 2};
  Buffer<C> weight{s.channels * s.taps, 3, random, 0.4}, bias{s.channels, 0, random, 0.4}, dweight{weight.size(), 1},
      dbias{s.channels};
  Buffer<bool> mask{s.batch * s.frames};

  int64_t P = s.taps / 2 + s.delay;

  bool padded(int64_t b, int64_t t) const { return s.mask && (t > s.frames - 2 * b - 1 || t % 7 == 3); }

  // Runs tasks in pieces of `step`.
  void run(int64_t step) {
    const auto& kernel = cpu::kernels<cpu::DepthwiseConvResidualKernels<T>>();
    const int64_t stripes = (s.channels + cpu::kResidualStripe - 1) / cpu::kResidualStripe;
    for (int64_t i = 0; i < mask.size(); i++) mask[i] = s.mask && padded(i / s.frames, i % s.frames);
    const bool* masked = s.mask ? mask.data() : nullptr;
    const cpu::DepthwiseConvResidual<T> p{x,      s.frames * row, row,      weight,     s.bias ? bias.data() : nullptr,
                                          masked, s.batch,        s.frames, s.channels, s.taps,
                                          P};
    in_pieces(stripes * s.batch, step, [&](int64_t begin, int64_t end) { kernel.forward(p, y, begin, end); });
    in_pieces(stripes, step,
              [&](int64_t begin, int64_t end) { kernel.backward(p, grad, dx, dweight, dbias, begin, end); });
  }
};

template <typename T>
void values(const Shape& s) {
  INFO(Type<T>::name, " ", s.batch, "x", s.frames, "x", s.channels, ", ", s.taps, " taps");
  Case<T> k{s}, other{s};
  k.run(3), other.run(1);
  const int64_t B = s.batch, L = s.frames, N = s.channels, K = s.taps, P = k.P;
  const long double room = 50 * (K + 4);  // every sum has at most K + 2 terms of size about 5
  Reals dw(size_t(N * K)), db(static_cast<size_t>(N));
  for (int64_t b = 0; b < B; b++)
    for (int64_t t = 0; t < L; t++)
      for (int64_t c = 0; c < N; c++) {
        const auto x = [&](int64_t frame) { return k.padded(b, frame) ? 0 : k.x((b * L + frame) * k.row + c); };
        const auto g = [&](int64_t frame) { return k.grad((b * L + frame) * N + c); };
        long double y = x(t) + (s.bias ? k.bias(c) : 0), d = g(t);
        db[c] += g(t);
        for (int64_t j = 0; j < K; j++) {
          const int64_t seen = t + j - P, seeing = t - j + P;
          const long double w = k.weight(c * K + j);
          if (seen >= 0 && seen < L) y += w * x(seen), dw[c * K + j] += g(t) * x(seen);
          if (seeing >= 0 && seeing < L) d += w * g(seeing);
        }
        EXPECT(k.y, (b * L + t) * N + c, y, room);
        EXPECT(k.dx, (b * L + t) * N + c, k.padded(b, t) ? 0 : d, room);
      }
  const long double of_sums = 20 * std::sqrt(static_cast<long double>(1 + B * L));
  EXPECT_ALL(k.dweight, dw, of_sums);
  EXPECT_ALL(k.dbias, db, of_sums);
  CHECK(k.y.equals(other.y) && k.dx.equals(other.dx) && k.dweight.equals(other.dweight), "the pieces of work show");
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
