// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/nonlin_attention.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

template <typename T>
struct Case {
  cpu::NonlinAttentionRows rows;
  Rounding rounding = rounded<T>;
  int64_t count = rows.frames * rows.batch, n = count * rows.width;
  Random random{static_cast<uint64_t>(rows.frames * 31 + rows.batch * 7 + rows.width), rounding};
  Buffer<T> p{count * rows.stride, rows.width % 3, random, 2}, o{n, 1, random}, grad{n, 2, random}, dx{n, 0, random};
  Buffer<T> x{n, 1}, y{n}, u{n, 3}, again{n}, dp{3 * n, 2};

  void run() {
    const auto& kernel = cpu::kernels<cpu::NonlinAttentionKernels<T>>();
    if (n > 2) p[0] = make<T>(40.0), p[1] = make<T>(-40.0);  // the derivative is a tiny number there
    for (const int64_t half : {count / 2, count}) {          // two calls share the rows
      const int64_t begin = half == count ? count / 2 : 0;
      kernel.gate(p, x, rows, begin, half);
      kernel.product(p, o, y, rows, begin, half);
      kernel.operands(grad, p, again, u, rows, begin, half);
      kernel.gradient(dx, grad, p, o, dp, rows, begin, half);
    }
  }
  auto outputs() { return std::tie(x, y, u, dp); }
};

template <typename T>
void values(int64_t frames, int64_t batch, int64_t width, int64_t gap) {
  INFO(Type<T>::name, " ", frames, "x", batch, "x", width);
  Case<T> c{{batch, frames, width, 3 * width + gap}};
  Case<double> exact{{batch, frames, width, 3 * width + gap}, rounded<T>};
  c.run(), exact.run();
  expect_like<T>(c.outputs(), exact.outputs(), 10);
  CHECK(c.again.equals(c.x), "the backward pass makes another x");
}

}  // namespace

TEST_CASE("nonlin_attention") {
  for_each_type([&]<typename T>() {
    for (const int64_t width : {1, 3, 16, 33})
      for (const int64_t batch : {1, 2, 5}) values<T>(7, batch, width, width % 2 * 5);
    values<T>(0, 3, 4, 0);
  });
}

}  // namespace fastasr::test
