// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/nonlin_attention.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

template <typename T>
void values(int64_t frames, int64_t batch, int64_t width, int64_t gap) {
  const auto& kernel = cpu::kernels<cpu::NonlinAttentionKernels<T>>();
  const cpu::NonlinAttentionRows rows{batch, frames, width, 3 * width + gap};
  const int64_t count = frames * batch, n = count * width;
  Random random(static_cast<uint64_t>(frames * 31 + batch * 7 + width));
  INFO(Type<T>::name, " ", frames, "x", batch, "x", width);
  Buffer<T> p(count * rows.stride, width % 3, random, 2), o(n, 1, random), grad(n, 2, random), dx(n, 0, random);
  Buffer<T> x(n, 1), y(n), u(n, 3), again(n), dp(3 * n, 2);
  if (n > 2) p[0] = make<T>(40.0), p[1] = make<T>(-40.0);  // the derivative is a tiny number there
  for (const int64_t half : {count / 2, count}) {          // two calls share the rows
    const int64_t begin = half == count ? count / 2 : 0;
    kernel.gate(p, x, rows, begin, half);
    kernel.product(p, o, y, rows, begin, half);
    kernel.operands(grad, p, again, u, rows, begin, half);
    kernel.gradient(dx, grad, p, o, dp, rows, begin, half);
  }
  // Without a fused multiply-add, e^x rounds x log2(e), which makes a relative error that grows with x.
  const long double rounded = cpu::simd() == cpu::Simd::portable ? 2 : 0;
  for (int64_t r = 0; r < count; r++) {
    const int64_t across = (r % batch * frames + r / batch) * width;
    for (int64_t j = 0; j < width; j++) {
      const int64_t i = r * width + j, k = across + j;
      const int64_t in = r * rows.stride + j, out = r * 3 * width + j;
      const long double s = p(in), v = p(in + width), z = p(in + 2 * width), g = grad(i), d = dx(k), weighted = o(k);
      const long double t = std::tanh(s), c = std::cosh(s), slope = 1 / (c * c);
      EXPECT(x, i, v * t, 6 * std::fabs(v * t));
      CHECK(value(again[i]) == value(x[i]));
      EXPECT(y, i, weighted * z, 2 * std::fabs(weighted * z));
      EXPECT(u, i, g * z, 2 * std::fabs(g * z));
      EXPECT(dp, out, d * v * slope, (12 + rounded * std::fabs(s)) * std::fabs(d * v * slope));
      EXPECT(dp, out + width, d * t, 6 * std::fabs(d * t));
      EXPECT(dp, out + 2 * width, g * weighted, 2 * std::fabs(g * weighted));
    }
  }
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
