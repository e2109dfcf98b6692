// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/linear_activation.h"

#include "cpu/math/activation.h"
#include "tests/check.h"

namespace fastasr::test {
namespace {

template <typename T>
struct Case {
  int activation;
  int64_t rows, channels;
  Rounding rounding = rounded<T>;
  int64_t n = rows * channels;
  Random random{static_cast<uint64_t>(n + activation), rounding};
  Buffer<T> z{2 * n, 1, random, 2}, grad{n, 2, random}, y{n, 3}, dz{n, 5}, gated{n, 3}, dgated{2 * n, 5};
  Buffer<compute_t<T>> dbias{channels, 1}, dgated_bias{2 * channels, 1};
  const cpu::LinearActivationKernels<T>& kernel = cpu::kernels<cpu::LinearActivationKernels<T>>();

  void run() {
    kernel.forward(activation, z, y, n);
    kernel.backward(activation, grad, z, dz, dbias, rows, channels);
    kernel.gated_forward(activation, z, gated, rows, channels);
    kernel.gated_backward(activation, grad, z, dgated, dgated_bias, rows, channels);
  }
  auto outputs() { return std::tie(y, dz, gated, dgated, dbias, dgated_bias); }
};

template <typename T>
void values(int activation, int64_t rows, int64_t channels) {
  INFO(Type<T>::name, " activation ", activation, ", ", rows, "x", channels);
  Case<T> c{activation, rows, channels};
  Case<double> exact{activation, rows, channels, rounded<T>};
  c.run(), exact.run();
  expect_like<T>(c.outputs(), exact.outputs(), 30);
  Buffer<T> alone(c.n), both(2 * c.n);
  c.kernel.backward(activation, c.grad, c.z, alone, nullptr, rows, channels);
  c.kernel.gated_backward(activation, c.grad, c.z, both, nullptr, rows, channels);
  c.kernel.forward(activation, c.z, c.z, c.n);
  CHECK(alone.equals(c.dz) && both.equals(c.dgated), "without the sum it is something else");
  for (int64_t i = 0; i < c.n; i++) CHECK(same_bits(c.z[i], c.y[i]), "in place it is something else");
}

TEST_CASE("linear_activation") {
  for_each_type([]<typename T>() {
    for (int activation = 0; activation < cpu::kActivations; activation++)
      for (const int64_t channels : {1, 17, 1023, 1024, 1030, 2100}) values<T>(activation, 5, channels);
    values<T>(1, 0, 8);
  });
}

}  // namespace
}  // namespace fastasr::test
