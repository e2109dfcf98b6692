// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/clamp.h"

#include "cpu/math/activation.h"
#include "tests/rows_case.h"

namespace fastasr::test {
namespace {

template <typename T>
struct Case {
  using C = compute_t<T>;
  int activation;
  int64_t n;
  Rounding rounding = rounded<T>;
  Random random{static_cast<uint64_t>(n + activation), rounding};
  Buffer<T> z{n, 1, random, 2}, grad{n, 2, random}, y{n, 3}, dz{n, 5};
  cpu::Bounds<T> inner{C(-1.25), C(0.75)}, outer{C(-0.125), C(0.5)}, none{C(-kInf), C(kInf)};
  const cpu::ClampKernels<T>& kernel = cpu::kernels<cpu::ClampKernels<T>>();

  void run() {
    kernel.forward(inner, activation, outer, z, y, n);
    kernel.backward(inner, activation, outer, n % 2 == 1, grad, z, dz, n);
  }
  auto outputs() { return std::tie(y, dz); }
};

template <typename T>
void clamp_values(int activation, int64_t n) {
  INFO(Type<T>::name, " activation ", activation, ", ", n, " elements");
  Case<T> c{activation, n};
  Case<double> exact{activation, n, rounded<T>};
  c.run(), exact.run();
  expect_like<T>(c.outputs(), exact.outputs(), 10);
  Buffer<T> alone(n);
  c.kernel.forward(c.none, 0, c.none, c.z, alone, n);
  CHECK(c.z.equals(alone), "without bounds it is something else");
  c.kernel.forward(c.inner, activation, c.outer, c.z, c.z, n);
  CHECK(c.z.equals(c.y), "in place it is something else");
}

// Crossed bounds give the upper one, and a NaN stays. An element at a bound has its gradient, or half of it, and a NaN
// none, or all of it.
template <typename T>
void clamp_special_values() {
  const auto& kernel = cpu::kernels<cpu::ClampKernels<T>>();
  using C = compute_t<T>;
  const cpu::Bounds<T> bounds{C(-1), C(2)}, crossed{C(2), C(-1)}, equal{C(2), C(2)}, none{C(-kInf), C(kInf)};
  Random random(1);
  Buffer<T> z(5, 0, random), grad(5, 0, random), y(5), dz(5);
  const double given[] = {-1, 2, kNan, kInf, -kInf};
  for (int64_t i = 0; i < 5; i++) z[i] = make<T>(given[i]);
  kernel.forward(bounds, 0, none, z, y, 5);
  kernel.backward(bounds, 0, none, false, grad, z, dz, 5);
  CHECK(y(0) == -1 && y(1) == 2 && std::isnan(y(2)) && y(3) == 2 && y(4) == -1, "values");
  CHECK(dz(0) == grad(0) && dz(1) == grad(1) && dz(2) == 0 && dz(3) == 0 && dz(4) == 0, "gradients");
  kernel.backward(bounds, 0, none, true, grad, z, dz, 5);
  CHECK(dz(0) == grad(0) / 2 && dz(1) == grad(1) / 2 && dz(2) == grad(2) && dz(3) == 0 && dz(4) == 0, "halves");
  kernel.backward(equal, 0, none, true, grad, z, dz, 5);
  CHECK(dz(0) == 0 && dz(1) == grad(1), "halves of equal bounds");
  kernel.forward(crossed, 0, none, z, y, 5);
  CHECK(y(0) == -1 && y(1) == -1 && y(3) == -1 && y(4) == -1, "crossed bounds");
}

TEST_CASE("clamp") {
  for_each_type([]<typename T>() {
    for (int activation = 0; activation < cpu::kActivations; activation++)
      for (const int64_t n : {0, 1, 17, 1024, 2100}) clamp_values<T>(activation, n);
    clamp_special_values<T>();
  });
}

}  // namespace
}  // namespace fastasr::test
