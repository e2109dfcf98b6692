// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/balancer_gradient.h"

#include "tests/rows_case.h"

namespace fastasr::test {
namespace {

// The rows of x lie `stride` apart; a run is the first column.
template <typename T>
struct Case {
  using C = compute_t<T>;
  int64_t rows, channels;
  Rounding rounding = rounded<T>;
  int64_t stride = channels + channels % 3, n = rows * channels;
  Random random{seed_of(rows, channels), rounding};
  Buffer<T> x{rows * stride, channels % 4, random, 0.5, 3}, grad{n, 1, random}, y{n, 2}, run_x{rows}, run_grad{rows},
      run_y{rows};
  Buffer<C> shift{channels, 0, random, 0.2, 3}, offset{channels, 0, random, 0.1}, slope{channels, 0, random, 0.1};
  Buffer<double> s1{channels}, s2{channels}, t1{1}, t2{1};

  void run() {
    const auto& kernel = cpu::kernels<cpu::BalancerKernels<T>>();
    kernel.sums_rows(x, stride, shift, s1, s2, rows, channels);
    kernel.apply_rows(grad, x, stride, shift, offset, slope, y, rows, channels);
    for (int64_t r = 0; r < rows; r++) run_x[r] = x[r * stride], run_grad[r] = grad[r * channels];
    kernel.sums_run(run_x, shift[0], t1, t2, rows);
    kernel.apply_run(run_grad, run_x, shift[0], offset[0], slope[0], run_y, rows);
  }
  auto outputs() { return std::tie(y, run_y, s1, s2, t1, t2); }
};

template <typename T>
void balancer_values(int64_t rows, int64_t channels) {
  INFO(Type<T>::name, " ", rows, "x", channels);
  Case<T> c{rows, channels};
  Case<double> exact{rows, channels, rounded<T>};
  c.run(), exact.run();
  expect_like<T>(c.outputs(), exact.outputs(), 20);
  for (int64_t r = 0; r < rows; r++) EXPECT(c.run_y, r, c.y(r * channels), 8);
}

void balancer_coefficients() {
  const auto of = [](double s1, double s2, double shift) {
    std::pair<double, double> out;  // offset and slope
    cpu::balancer_coefficients(s1, s2, shift, 100, {-0.1, 0.1, 0.5, 2.0, 0.04}, &out.first, &out.second);
    return out;
  };
  constexpr std::pair kNothing{0.0, 0.0};
  CHECK(of(0, 100, 0) == kNothing, "within the limits nothing changes");
  const auto [o1, large] = of(0, 900, 0);
  CHECK(o1 == 0 && std::fabs(large * 3 - 0.04) < 1e-12, "too large: a change along x, of root mean square 0.04");
  const auto [o2, small] = of(0, 1, 0);
  CHECK(o2 == 0 && std::fabs(small * 0.1 + 0.04) < 1e-12, "too small");
  const auto [o3, constant] = of(0, 0, 1);
  CHECK(std::fabs(o3 - 0.04) < 1e-12 && constant == 0, "constant channels have no deviation to grow");
  CHECK(of(0, 0, 0) == kNothing, "zero");
  const auto [o4, lost] = of(kNan, kNan, 0);
  CHECK(std::isnan(o4) && std::isnan(lost), "a NaN is lost");
}

TEST_CASE("balancer_gradient") {
  balancer_coefficients();
  for_each_type([&]<typename T>() {
    for (const int64_t rows : {0, 1, 15, 16, 17, 40, 300})
      for (const int64_t channels : {1, 3, 16, 33, 513}) balancer_values<T>(rows, channels);
  });
}

}  // namespace
}  // namespace fastasr::test
