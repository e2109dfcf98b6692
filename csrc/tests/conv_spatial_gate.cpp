// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/conv_spatial_gate.h"

#include <algorithm>

#include "tests/check.h"

namespace fastasr::test {
namespace {

struct Shape {
  int64_t batch, frames, channels, taps;
  int activation;
  bool mask, bias;
};

// Returns act and act' of the activations that the test runs: identity, silu, tanh.
long double act(int activation, long double z) {
  return activation == 1 ? z / (1 + std::exp(-z)) : activation == 3 ? std::tanh(z) : z;
}
long double slope(int activation, long double z) {
  const long double s = 1 / (1 + std::exp(-z)), h = std::tanh(z);
  return activation == 1 ? s * (1 + z * (1 - s)) : activation == 3 ? 1 - h * h : 1;
}

template <typename T>
struct Case {
  using C = compute_t<T>;
  Shape s;
  Buffer<T> x, grad, y, dx;
  Buffer<C> norm_weight, norm_bias, weight, bias, du, dnorm_weight, dnorm_bias, dweight, dbias;
  std::unique_ptr<bool[]> mask;
  cpu::ConvSpatialGate<T> p;

  explicit Case(const Shape& shape)
      : s(shape),
        x(s.batch * s.frames * 2 * s.channels, 3),
        grad(s.batch * s.frames * s.channels, 1),
        y(grad.size(), 5),
        dx(x.size(), 2),
        norm_weight(s.channels, 1),
        norm_bias(s.channels),
        weight(s.channels * s.taps, 3),
        bias(s.channels),
        du(grad.size(), 1),
        dnorm_weight(s.channels),
        dnorm_bias(s.channels),
        dweight(weight.size(), 1),
        dbias(s.channels),
        mask(new bool[static_cast<size_t>(s.batch * s.frames + 1)]) {
    Random random(static_cast<uint64_t>(s.frames * 1000 + s.channels * 10 + s.taps));
    x.fill(random, 1.5);
    grad.fill(random);
    for (Buffer<C>* b : {&norm_weight, &norm_bias, &weight, &bias}) b->fill(random, 0.4);
    for (int64_t i = 0; i < s.batch * s.frames; i++) mask[i] = i % s.frames > s.frames - 2 * (i / s.frames) - 1;
    p = {x.data(),
         s.frames * 2 * s.channels,
         2 * s.channels,
         norm_weight.data(),
         norm_bias.data(),
         weight.data(),
         s.bias ? bias.data() : nullptr,
         s.mask ? mask.get() : nullptr,
         s.batch,
         s.frames,
         s.channels,
         s.taps,
         1e-3,
         s.activation};
  }

  // Runs tasks in pieces of `step`, as threads take them.
  void run(int64_t step) {
    const auto& kernel = cpu::kernels<cpu::ConvSpatialGateKernels<T>>();
    const int64_t rows = p.rows(), stripes = (s.channels + cpu::kSpatialGateStripe - 1) / cpu::kSpatialGateStripe;
    std::vector<cpu::RowStatistics<C>> statistics(static_cast<size_t>(rows));
    std::vector<C> scratch(static_cast<size_t>(s.channels));
    for (int64_t i = 0; i < rows; i += step)
      kernel.statistics(p, statistics.data(), i, std::min(i + step, rows), scratch.data());
    for (int64_t i = 0; i < stripes * s.batch; i += step)
      kernel.forward(p, statistics.data(), y.data(), i, std::min(i + step, stripes * s.batch));
    for (int64_t i = 0; i < stripes; i += step)
      kernel.backward(p, statistics.data(), grad.data(), dx.data(), du.data(), s.channels, dweight.data(), dbias.data(),
                      i, std::min(i + step, stripes));
    kernel.norm_backward(p, statistics.data(), du.data(), s.channels, dx.data(), dnorm_weight.data(), dnorm_bias.data(),
                         0, rows);
  }
};

template <typename T>
void values(const Shape& s) {
  Case<T> k(s);
  k.run(2);
  const int64_t B = s.batch, L = s.frames, N = s.channels, K = s.taps, P = K / 2;
  using V = std::vector<long double>;
  const size_t bias_size = static_cast<size_t>(N);
  V n(size_t(B * L * N)), z(n), q(n), du(n), scale(size_t(B * L)), dw(size_t(N * K)), db(bias_size), dg(db), dn(db);
  const auto r = [&](int64_t i, int64_t c) { return static_cast<long double>(value(k.x[i * 2 * N + c])); };
  const auto masked = [&](int64_t i) { return s.mask && k.mask[i]; };
  for (int64_t i = 0; i < B * L; i++) {
    long double mean = 0, var = 0;
    for (int64_t c = 0; c < N; c++) mean += r(i, N + c) / N;
    for (int64_t c = 0; c < N; c++) var += (r(i, N + c) - mean) * (r(i, N + c) - mean) / N;
    scale[size_t(i)] = 1 / std::sqrt(var + k.p.eps);
    for (int64_t c = 0; c < N; c++) n[size_t(i * N + c)] = (r(i, N + c) - mean) * scale[size_t(i)];
  }
  const auto u = [&](int64_t i, int64_t c) {
    return masked(i) ? 0 : n[size_t(i * N + c)] * value(k.norm_weight[c]) + value(k.norm_bias[c]);
  };
  // every sum has at most K + 2 terms of size about 5
  const long double room = 200 * (K + 8);
  for (int64_t b = 0; b < B; b++)
    for (int64_t c = 0; c < N; c++)
      for (int64_t t = 0; t < L; t++) {
        const int64_t i = b * L + t;
        long double& sum = z[size_t(i * N + c)];
        if (s.bias) sum = value(k.bias[c]);
        for (int64_t j = 0; j < K; j++)
          if (t + j - P >= 0 && t + j - P < L) sum += value(k.weight[c * K + j]) * u(i + j - P, c);
        const long double g = value(k.grad[i * N + c]), y = r(i, c) * act(s.activation, sum);
        CHECK(close(k.y[i * N + c], y, room), "%s y[%ld, %ld, %ld] of %ldx%ldx%ld, %ld taps: expected %.9Lg, got %.9g",
              Type<T>::name, long(b), long(t), long(c), long(B), long(L), long(N), long(K), y, value(k.y[i * N + c]));
        CHECK(close(k.dx[i * 2 * N + c], g * act(s.activation, sum), room), "%s dr[%ld, %ld]", Type<T>::name, long(i),
              long(c));
        q[size_t(i * N + c)] = g * r(i, c) * slope(s.activation, sum);
        db[size_t(c)] += q[size_t(i * N + c)];
        for (int64_t j = 0; j < K; j++)
          if (t + j - P >= 0 && t + j - P < L) dw[size_t(c * K + j)] += q[size_t(i * N + c)] * u(i + j - P, c);
      }
  for (int64_t i = 0; i < B * L; i++) {
    long double mean = 0, along = 0;
    for (int64_t c = 0; c < N; c++) {
      long double& sum = du[size_t(i * N + c)];
      for (int64_t j = 0; !masked(i) && j < K; j++)
        if (i % L - j + P >= 0 && i % L - j + P < L) sum += value(k.weight[c * K + j]) * q[size_t((i - j + P) * N + c)];
      dg[size_t(c)] += sum * n[size_t(i * N + c)], dn[size_t(c)] += sum;
      mean += sum * value(k.norm_weight[c]) / N, along += sum * value(k.norm_weight[c]) * n[size_t(i * N + c)] / N;
    }
    for (int64_t c = 0; c < N; c++) {
      const long double d = du[size_t(i * N + c)] * value(k.norm_weight[c]);
      const long double expected = (d - mean - n[size_t(i * N + c)] * along) * scale[size_t(i)];
      CHECK(close(k.dx[i * 2 * N + N + c], expected, room * 10 * (1 + scale[size_t(i)])),
            "%s dg[%ld, %ld] of %ldx%ldx%ld, %ld taps: expected %.9Lg, got %.9g", Type<T>::name, long(i), long(c),
            long(B), long(L), long(N), long(K), expected, value(k.dx[i * 2 * N + N + c]));
    }
  }
  const auto sums = [&](const char* name, Buffer<typename Case<T>::C>& got, const V& expected) {
    for (int64_t i = 0; i < got.size(); i++)
      CHECK(close(got[i], expected[size_t(i)], room * 10 * std::sqrt(static_cast<long double>(1 + B * L))),
            "%s %s[%ld]: expected %.9Lg, got %.9g", Type<T>::name, name, long(i), expected[size_t(i)], value(got[i]));
    CHECK(got.intact(), "%s wrote outside %s", Type<T>::name, name);
  };
  sums("dweight", k.dweight, dw);
  sums("dbias", k.dbias, db);
  sums("dnorm_weight", k.dnorm_weight, dg);
  sums("dnorm_bias", k.dnorm_bias, dn);
  for (Buffer<T>* out : {&k.y, &k.dx})
    CHECK(out->intact(), "%s wrote outside, %ldx%ldx%ld", Type<T>::name, long(B), long(L), long(N));

  Case<T> other(s);
  other.run(1);
  CHECK(k.y.equals(other.y) && k.dx.equals(other.dx) && k.dweight.equals(other.dweight),
        "%s: the pieces that work is cut into show in the result", Type<T>::name);
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
