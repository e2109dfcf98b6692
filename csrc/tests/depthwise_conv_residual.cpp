// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/depthwise_conv_residual.h"

#include <algorithm>

#include "tests/check.h"

namespace fastasr::test {
namespace {

struct Shape {
  int64_t batch, frames, channels, taps;
  bool bias;
};

template <typename T>
struct Case {
  using C = compute_t<T>;
  Shape s;
  int64_t row;  // elements from one frame of x to the next
  Buffer<T> x, grad, y, dx;
  Buffer<C> weight, bias, dweight, dbias;
  cpu::DepthwiseConvResidual<T> p;

  explicit Case(const Shape& shape)
      : s(shape),
        row(s.channels + 3),
        x(s.batch * s.frames * row, 3),
        grad(s.batch * s.frames * s.channels, 1),
        y(grad.size(), 5),
        dx(grad.size(), 2),
        weight(s.channels * s.taps, 3),
        bias(s.channels),
        dweight(weight.size(), 1),
        dbias(s.channels) {
    Random random(static_cast<uint64_t>(s.frames * 1000 + s.channels * 10 + s.taps));
    x.fill(random, 1.5);
    grad.fill(random);
    for (Buffer<C>* b : {&weight, &bias}) b->fill(random, 0.4);
    p = {x.data(), s.frames * row, row,        weight.data(), s.bias ? bias.data() : nullptr,
         s.batch,  s.frames,       s.channels, s.taps};
  }

  // Runs tasks in pieces of `step`, as threads take them.
  void run(int64_t step) {
    const auto& kernel = cpu::kernels<cpu::DepthwiseConvResidualKernels<T>>();
    const int64_t stripes = (s.channels + cpu::kResidualStripe - 1) / cpu::kResidualStripe;
    for (int64_t i = 0; i < stripes * s.batch; i += step)
      kernel.forward(p, y.data(), i, std::min(i + step, stripes * s.batch));
    for (int64_t i = 0; i < stripes; i += step)
      kernel.backward(p, grad.data(), dx.data(), dweight.data(), dbias.data(), i, std::min(i + step, stripes));
  }
};

template <typename T>
void values(const Shape& s) {
  Case<T> k(s);
  k.run(3);
  const int64_t B = s.batch, L = s.frames, N = s.channels, K = s.taps, P = K / 2;
  const long double room = 50 * (K + 4);  // every sum has at most K + 2 terms of size about 5
  std::vector<long double> dw(size_t(N * K)), db(static_cast<size_t>(N));
  for (int64_t b = 0; b < B; b++)
    for (int64_t t = 0; t < L; t++)
      for (int64_t c = 0; c < N; c++) {
        const auto x = [&](int64_t frame) { return (long double)value(k.x[(b * L + frame) * k.row + c]); };
        const auto g = [&](int64_t frame) { return (long double)value(k.grad[(b * L + frame) * N + c]); };
        long double y = x(t) + (s.bias ? value(k.bias[c]) : 0), d = g(t);
        db[size_t(c)] += g(t);
        for (int64_t j = 0; j < K; j++) {
          const int64_t seen = t + j - P, seeing = t - j + P;
          const long double w = value(k.weight[c * K + j]);
          if (seen >= 0 && seen < L) y += w * x(seen), dw[size_t(c * K + j)] += g(t) * x(seen);
          if (seeing >= 0 && seeing < L) d += w * g(seeing);
        }
        const int64_t i = (b * L + t) * N + c;
        CHECK(close(k.y[i], y, room), "%s y[%ld, %ld, %ld] of %ldx%ldx%ld, %ld taps: expected %.9Lg, got %.9g",
              Type<T>::name, long(b), long(t), long(c), long(B), long(L), long(N), long(K), y, value(k.y[i]));
        CHECK(close(k.dx[i], d, room), "%s dx[%ld, %ld, %ld] of %ldx%ldx%ld, %ld taps: expected %.9Lg, got %.9g",
              Type<T>::name, long(b), long(t), long(c), long(B), long(L), long(N), long(K), d, value(k.dx[i]));
      }
  const auto sums = [&](const char* name, auto& got, const std::vector<long double>& expected) {
    for (int64_t i = 0; i < got.size(); i++)
      CHECK(close(got[i], expected[size_t(i)], 20 * std::sqrt(static_cast<long double>(1 + B * L))),
            "%s %s[%ld]: expected %.9Lg, got %.9g", Type<T>::name, name, long(i), expected[size_t(i)], value(got[i]));
    CHECK(got.intact(), "%s wrote outside %s", Type<T>::name, name);
  };
  sums("dweight", k.dweight, dw);
  sums("dbias", k.dbias, db);
  for (Buffer<T>* out : {&k.y, &k.dx})
    CHECK(out->intact(), "%s wrote outside, %ldx%ldx%ld", Type<T>::name, long(B), long(L), long(N));

  Case<T> other(s);
  other.run(1);
  CHECK(k.y.equals(other.y) && k.dx.equals(other.dx) && k.dweight.equals(other.dweight),
        "%s: the pieces that work is cut into show in the result", Type<T>::name);
}

}  // namespace

TEST_CASE("depthwise_conv_residual") {
  for_each_type([]<typename T>() {
    for (const int64_t channels : {1, 7, 32, 33, 70})
      for (const int64_t taps : {1, 3, 31}) values<T>({3, 70, channels, taps, true});
    for (const int64_t frames : {1, 3, 63, 64, 65, 128, 130}) {
      values<T>({2, frames, 17, 31, true});
      values<T>({2, frames, 40, 3, false});
    }
  });
}

}  // namespace fastasr::test
