// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "cpu/math/activation.h"
#include "cpu/rows/linear_activation.h"
#include "tests/rows_case.h"

namespace fastasr::test {
namespace {

// Compares with the activations themselves, which have a test of their own, and sums with long double.
template <typename T>
void linear_activation_values(int activation, int64_t rows, int64_t channels) {
  INFO(Type<T>::name, " activation ", activation, ", ", rows, "x", channels);
  const auto& kernel = cpu::kernels<cpu::LinearActivationKernels<T>>();
  using C = compute_t<T>;
  const int64_t n = rows * channels;
  Random random(static_cast<uint64_t>(n + activation));
  Buffer<T> z(n, 1, random, 2), grad(n, 2, random), y(n, 3), dz(n, 5), alone(n, 5);
  Buffer<C> dbias(channels, 1), value_of(n), slope(n);
  for (int64_t i = 0; i < n; i++) value_of[i] = cpu::load(z[i]);
  cpu::activate_with_slope(activation, value_of.data(), slope.data(), n);
  kernel.forward(activation, z, y, n);
  kernel.backward(activation, grad, z, dz, dbias, rows, channels);
  Reals sums(static_cast<size_t>(channels));
  for (int64_t i = 0; i < n; i++) {
    const long double d = grad(i) * slope[i];
    sums[i % channels] += d;
    EXPECT(y, i, value_of[i], 4 * (1 + std::fabs(value_of[i])));
    EXPECT(dz, i, d, 8 * (1 + std::fabs(d)));
  }
  EXPECT_ALL(dbias, sums, 20.0L * static_cast<long double>(1 + rows));
  kernel.backward(activation, grad, z, alone, nullptr, rows, channels);
  kernel.forward(activation, z, z, n);
  CHECK(z.equals(y) && alone.equals(dz), "in place or without the sum it is something else");
}

template <typename T>
void gated_values(int activation, int64_t rows, int64_t channels) {
  INFO(Type<T>::name, " gated, activation ", activation, ", ", rows, "x", channels);
  const auto& kernel = cpu::kernels<cpu::LinearActivationKernels<T>>();
  using C = compute_t<T>;
  const int64_t n = rows * channels;
  Random random(static_cast<uint64_t>(n + activation));
  Buffer<T> z(2 * n, 1, random, 2), grad(n, 2, random), y(n, 3), dz(2 * n, 5), alone(2 * n, 5);
  Buffer<C> dbias(2 * channels, 1), gate(n), slope(n);
  const auto place = [&](int64_t i) { return i / channels * 2 * channels + i % channels; };
  for (int64_t i = 0; i < n; i++) gate[i] = cpu::load(z[place(i) + channels]);
  cpu::activate_with_slope(activation, gate.data(), slope.data(), n);
  kernel.gated_forward(activation, z, y, rows, channels);
  kernel.gated_backward(activation, grad, z, dz, dbias, rows, channels);
  Reals sums(static_cast<size_t>(2 * channels));
  for (int64_t i = 0; i < n; i++) {
    const int64_t at = place(i), c = i % channels;
    const long double a = z(at), da = grad(i) * gate[i], dg = grad(i) * a * slope[i];
    sums[c] += da, sums[c + channels] += dg;
    EXPECT(y, i, a * gate[i], 4 * (1 + std::fabs(a * gate[i])));
    EXPECT(dz, at, da, 8 * (1 + std::fabs(da)));
    EXPECT(dz, at + channels, dg, 8 * (1 + std::fabs(dg)));
  }
  EXPECT_ALL(dbias, sums, 40.0L * static_cast<long double>(1 + rows));
  kernel.gated_backward(activation, grad, z, alone, nullptr, rows, channels);
  CHECK(alone.equals(dz), "without the sum it is something else");
}

TEST_CASE("linear_activation") {
  for_each_type([]<typename T>() {
    for (int activation = 0; activation < cpu::kActivations; activation++)
      for (const int64_t channels : {1, 17, 1023, 1024, 1030, 2100})
        linear_activation_values<T>(activation, 5, channels), gated_values<T>(activation, 5, channels);
    linear_activation_values<T>(1, 0, 8);
  });
}

}  // namespace
}  // namespace fastasr::test
