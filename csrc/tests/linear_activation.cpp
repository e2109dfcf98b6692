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

template <typename T>
void dropped(int64_t channels) {
  INFO(Type<T>::name, ", ", channels, " channels");
  const cpu::WeightsDropout half{12345, int32_t{1} << 30, 2.0};
  const auto& kernel = cpu::kernels<cpu::LinearActivationKernels<T>>();
  Random random{static_cast<uint64_t>(channels), rounded<T>};
  Buffer<T> x{channels, 1, random}, y{channels, 3};
  const cpu::DropoutRow row = cpu::dropout_row(half, 7);
  const int64_t first = channels / 3;
  kernel.drop(row, 0, half.threshold, half.scale, x, y, first);
  kernel.drop(row, first, half.threshold, half.scale, x + first, y + first, channels - first);
  for (int64_t j = 0; j < channels; j++) {
    const bool kept = cpu::dropout_bits(row, static_cast<uint32_t>(j)) >= half.threshold;
    CHECK(cpu::load(y[j]) == cpu::load(x[j]) * (kept ? 2 : 0));
  }
}

TEST_CASE("linear_activation") {
  for_each_type([]<typename T>() {
    for (int activation = 0; activation < cpu::kActivations; activation++)
      for (const int64_t channels : {1, 17, 1023, 1024, 1030, 2100}) values<T>(activation, 5, channels);
    values<T>(1, 0, 8);
    for (const int64_t channels : {1, 17, 2100}) dropped<T>(channels);
  });
}

}  // namespace
}  // namespace fastasr::test
