// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/linear_activation.h"

#include <algorithm>

#include "cpu/math/activation.h"
#include "tests/check.h"

namespace fastasr::test {
namespace {

// Compares with the activations themselves, which have a test of their own, and sums with long double.
template <typename T>
void values(int activation, int64_t rows, int64_t channels) {
  const auto& kernel = cpu::kernels<cpu::LinearActivationKernels<T>>();
  using C = compute_t<T>;
  const int64_t n = rows * channels;
  Buffer<T> z(n, 1), grad(n, 2), y(n, 3), dz(n, 5);
  Buffer<C> dbias(channels, 1), value_of(n), slope(n);
  Random random(static_cast<uint64_t>(n + activation));
  z.fill(random, 2);
  grad.fill(random);
  for (int64_t i = 0; i < n; i++) value_of[i] = cpu::load(z[i]);
  cpu::activate_with_slope(activation, value_of.data(), slope.data(), n);
  kernel.forward(activation, z.data(), y.data(), n);
  kernel.backward(activation, grad.data(), z.data(), dz.data(), dbias.data(), rows, channels);
  std::vector<long double> sums(static_cast<size_t>(channels));
  for (int64_t i = 0; i < n; i++) {
    const long double d = static_cast<long double>(value(grad[i])) * slope[i];
    sums[static_cast<size_t>(i % channels)] += d;
    CHECK(close(y[i], value_of[i], 4 * (1 + std::fabs(value_of[i]))) && close(dz[i], d, 8 * (1 + std::fabs(d))),
          "%s, activation %d, element %ld: expected %g and %g, got %g and %g", Type<T>::name, activation, long(i),
          double(value_of[i]), double(d), value(y[i]), value(dz[i]));
  }
  for (int64_t c = 0; c < channels; c++)
    CHECK(close(dbias[c], sums[static_cast<size_t>(c)], 20.0L * static_cast<long double>(1 + rows)), "%s dbias[%ld]",
          Type<T>::name, long(c));
  CHECK(y.intact() && dz.intact() && dbias.intact(), "%s wrote outside, %ldx%ld", Type<T>::name, long(rows),
        long(channels));
  Buffer<T> alone(n, 5);
  kernel.backward(activation, grad.data(), z.data(), alone.data(), nullptr, rows, channels);
  kernel.forward(activation, z.data(), z.data(), n);
  CHECK(z.equals(y) && alone.equals(dz), "%s: in place or without the sum it is something else", Type<T>::name);
}

}  // namespace

TEST_CASE("linear_activation") {
  for_each_type([]<typename T>() {
    for (int activation = 0; activation < cpu::kActivations; activation++)
      for (const int64_t channels : {1, 17, 1023, 1024, 1030, 2100}) values<T>(activation, 5, channels);
    values<T>(1, 0, 8);
  });
}

}  // namespace fastasr::test
