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
  int64_t n = s.batch * s.frames * s.channels;
  Random random{static_cast<uint64_t>(s.frames * 1000 + s.channels * 10 + s.taps)};
  Buffer<T> x{2 * n, 3, random, 1.5}, grad{n, 1, random}, y{n, 5}, dx{2 * n, 2};
  Buffer<C> norm_weight{s.channels, 1, random, 0.4}, norm_bias{s.channels, 0, random, 0.4},
      weight{s.channels * s.taps, 3, random, 0.4}, bias{s.channels, 0, random, 0.4};
  Buffer<C> du{n, 1}, dnorm_weight{s.channels}, dnorm_bias{s.channels}, dweight{weight.size(), 1}, dbias{s.channels};
  Buffer<bool> mask{s.batch * s.frames};
  double eps = 1e-3;

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
                                    eps,
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
};

template <typename T>
void values(const Shape& s) {
  INFO(Type<T>::name, " ", s.batch, "x", s.frames, "x", s.channels, ", ", s.taps, " taps");
  Case<T> k{s}, other{s};
  k.run(2), other.run(1);
  const int64_t B = s.batch, L = s.frames, N = s.channels, K = s.taps, P = K / 2;
  Reals n(size_t(B * L * N)), z(n), q(n), du(n), scale(size_t(B * L)), dw(size_t(N * K)), db(size_t(N), 0), dg(db),
      dn(db);
  const auto r = [&](int64_t i, int64_t c) { return k.x(i * 2 * N + c); };
  const auto masked = [&](int64_t i) { return s.mask && k.mask[i]; };
  for (int64_t i = 0; i < B * L; i++) {
    long double mean = 0, var = 0;
    for (int64_t c = 0; c < N; c++) mean += r(i, N + c) / N;
    for (int64_t c = 0; c < N; c++) var += (r(i, N + c) - mean) * (r(i, N + c) - mean) / N;
    scale[i] = 1 / std::sqrt(var + k.eps);
    for (int64_t c = 0; c < N; c++) n[i * N + c] = (r(i, N + c) - mean) * scale[i];
  }
  const auto u = [&](int64_t i, int64_t c) { return masked(i) ? 0 : n[i * N + c] * k.norm_weight(c) + k.norm_bias(c); };
  // every sum has at most K + 2 terms of size about 5
  const long double room = 200 * (K + 8);
  for (int64_t b = 0; b < B; b++)
    for (int64_t c = 0; c < N; c++)
      for (int64_t t = 0; t < L; t++) {
        const int64_t i = b * L + t, at = i * N + c;
        if (s.bias) z[at] = k.bias(c);
        for (int64_t j = 0; j < K; j++)
          if (t + j - P >= 0 && t + j - P < L) z[at] += k.weight(c * K + j) * u(i + j - P, c);
        const Activated act = activated(s.activation, z[at]);
        EXPECT(k.y, at, r(i, c) * act.value, room);
        EXPECT(k.dx, i * 2 * N + c, k.grad(at) * act.value, room);
        q[at] = k.grad(at) * r(i, c) * act.slope;
        db[c] += q[at];
        for (int64_t j = 0; j < K; j++)
          if (t + j - P >= 0 && t + j - P < L) dw[c * K + j] += q[at] * u(i + j - P, c);
      }
  for (int64_t i = 0; i < B * L; i++) {
    long double mean = 0, along = 0;
    for (int64_t c = 0; c < N; c++) {
      long double& sum = du[i * N + c];
      for (int64_t j = 0; !masked(i) && j < K; j++)
        if (i % L - j + P >= 0 && i % L - j + P < L) sum += k.weight(c * K + j) * q[(i - j + P) * N + c];
      dg[c] += sum * n[i * N + c], dn[c] += sum;
      mean += sum * k.norm_weight(c) / N, along += sum * k.norm_weight(c) * n[i * N + c] / N;
    }
    for (int64_t c = 0; c < N; c++)
      EXPECT(k.dx, i * 2 * N + N + c, (du[i * N + c] * k.norm_weight(c) - mean - n[i * N + c] * along) * scale[i],
             room * 10 * (1 + scale[i]));
  }
  const long double of_sums = room * 10 * std::sqrt(static_cast<long double>(1 + B * L));
  EXPECT_ALL(k.dweight, dw, of_sums);
  EXPECT_ALL(k.dbias, db, of_sums);
  EXPECT_ALL(k.dnorm_weight, dg, of_sums);
  EXPECT_ALL(k.dnorm_bias, dn, of_sums);
  CHECK(k.y.equals(other.y) && k.dx.equals(other.dx) && k.dweight.equals(other.dweight), "the pieces of work show");
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
