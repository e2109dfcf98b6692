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
  Buffer<T> p(count * rows.stride, width % 3), o(n, 1), grad(n, 2), dx(n);
  Buffer<T> x(n, 1), y(n), u(n, 3), again(n), dp(3 * n, 2);
  p.fill(random, 2), o.fill(random), grad.fill(random), dx.fill(random);
  if (n > 2) p[0] = make<T>(40.0), p[1] = make<T>(-40.0);  // the derivative is a tiny number there
  for (const int64_t half : {count / 2, count}) {          // two calls share the rows
    const int64_t begin = half == count ? count / 2 : 0;
    kernel.gate(p.data(), x.data(), rows, begin, half);
    kernel.product(p.data(), o.data(), y.data(), rows, begin, half);
    kernel.operands(grad.data(), p.data(), again.data(), u.data(), rows, begin, half);
    kernel.gradient(dx.data(), grad.data(), p.data(), o.data(), dp.data(), rows, begin, half);
  }
  CHECK(x.intact() && y.intact() && u.intact() && again.intact() && dp.intact(), "%s wrote outside, %ldx%ldx%ld",
        Type<T>::name, long(frames), long(batch), long(width));
  // Without a fused multiply-add, e^x rounds x log2(e), which makes a relative error that grows with x.
  const long double rounded = cpu::simd() == cpu::Simd::portable ? 2 : 0;
  for (int64_t r = 0; r < count; r++) {
    const int64_t across = (r % batch * frames + r / batch) * width;
    for (int64_t j = 0; j < width; j++) {
      const int64_t i = r * width + j, k = across + j;
      const T* row = p.data() + r * rows.stride;
      const long double s = value(row[j]), v = value(row[width + j]), z = value(row[2 * width + j]);
      const long double t = std::tanh(s), c = std::cosh(s), slope = 1 / (c * c), g = value(grad[i]), d = value(dx[k]);
      CHECK(close(x[i], v * t, 6 * std::fabs(v * t)), "%s x, %ld %ld", Type<T>::name, long(r), long(j));
      CHECK(value(again[i]) == value(x[i]), "%s x again, %ld %ld", Type<T>::name, long(r), long(j));
      CHECK(close(y[i], value(o[k]) * z, 2 * std::fabs(value(o[k]) * z)), "%s y, %ld %ld", Type<T>::name, long(r),
            long(j));
      CHECK(close(u[i], g * z, 2 * std::fabs(g * z)), "%s u, %ld %ld", Type<T>::name, long(r), long(j));
      const T* q = dp.data() + r * 3 * width;
      CHECK(close(q[j], d * v * slope, (12 + rounded * std::fabs(s)) * std::fabs(d * v * slope)),
            "%s ds, %ld %ld: expected %.9Lg, got %.9g", Type<T>::name, long(r), long(j), d * v * slope, value(q[j]));
      CHECK(close(q[width + j], d * t, 6 * std::fabs(d * t)), "%s dv, %ld %ld", Type<T>::name, long(r), long(j));
      CHECK(close(q[2 * width + j], g * value(o[k]), 2 * std::fabs(g * value(o[k]))), "%s dz, %ld %ld", Type<T>::name,
            long(r), long(j));
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
