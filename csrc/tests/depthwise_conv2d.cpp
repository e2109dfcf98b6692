// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/depthwise_conv2d.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

using cpu::DepthwiseSizes;

// Makes every call as the bindings do, `step` blocks or groups at a time.
template <typename T>
struct Case {
  DepthwiseSizes s;
  int64_t in_size, out_size;
  Buffer<T> x, weight, bias, grad, y, dx, dweight, dbias;

  explicit Case(const DepthwiseSizes& sizes)
      : s(sizes),
        in_size(s.batch * s.frames * s.width * s.channels),
        out_size(s.batch * s.out_frames() * s.out_width() * s.channels),
        x(in_size, s.width % 3),
        weight(s.channels * s.taps(), 1),
        bias(s.channels),
        grad(out_size, s.frames % 4),
        y(out_size, 1),
        dx(in_size, 2),
        dweight(s.channels * s.taps(), 3),
        dbias(s.channels, 1) {
    Random random(static_cast<uint64_t>(in_size * 31 + s.taps()));
    x.fill(random), weight.fill(random, 0.3), bias.fill(random), grad.fill(random);
  }

  void run(int64_t step) {
    const auto& kernel = cpu::kernels<cpu::DepthwiseConv2dKernels<T>>();
    const auto blocks = [&](const DepthwiseSizes& sizes, const T* in, const T* b, bool flip, T* out) {
      for (int64_t i = 0; i < cpu::depthwise_blocks(sizes); i += step)
        kernel.forward(sizes, in, weight.data(), b, flip, out, i, std::min(i + step, cpu::depthwise_blocks(sizes)));
    };
    blocks(s, x.data(), bias.data(), false, y.data());
    blocks(s.transposed(), grad.data(), nullptr, true, dx.data());
    const int64_t groups = cpu::depthwise_groups(s);
    std::vector<double> parts(static_cast<size_t>(groups * (s.taps() + 1) * s.channels));
    for (int64_t g = 0; g < groups; g += step)
      kernel.weight_gradient(s, grad.data(), x.data(), parts.data(), g, std::min(g + step, groups));
    kernel.reduce(s, parts.data(), dweight.data(), dbias.data());
  }
};

struct Sum {
  long double value = 0, size = 0;
  void add(long double v) { value += v, size += std::fabs(v); }
};

template <typename T>
void values(const DepthwiseSizes& s) {
  Case<T> k(s);
  k.run(3);
  std::vector<Sum> y(size_t(k.out_size)), dx(size_t(k.in_size)), dw(size_t(s.channels * s.taps())),
      db(size_t(s.channels));
  for (int64_t b = 0; b < s.batch; b++)
    for (int64_t t = 0; t < s.out_frames(); t++)
      for (int64_t f = 0; f < s.out_width(); f++)
        for (int64_t c = 0; c < s.channels; c++) {
          const int64_t o = ((b * s.out_frames() + t) * s.out_width() + f) * s.channels + c;
          const long double g = value(k.grad[o]);
          y[size_t(o)].add(value(k.bias[c])), db[size_t(c)].add(g);
          for (int64_t i = 0; i < s.taps_t; i++)
            for (int64_t j = 0; j < s.taps_f; j++) {
              const int64_t from = t + i - s.pad_t, at = f + j - s.pad_f, w = c * s.taps() + i * s.taps_f + j;
              if (from < 0 || from >= s.frames || at < 0 || at >= s.width) continue;
              const int64_t x = ((b * s.frames + from) * s.width + at) * s.channels + c;
              y[size_t(o)].add(static_cast<long double>(value(k.weight[w])) * value(k.x[x]));
              dx[size_t(x)].add(static_cast<long double>(value(k.weight[w])) * g);
              dw[size_t(w)].add(g * value(k.x[x]));
            }
        }
  // y and dx are one chain of products, without fused multiply-adds on some machines
  const long double chain = 4 + static_cast<long double>(s.taps()) / 8;
  const auto check = [&](const char* name, Buffer<T>& got, const std::vector<Sum>& expected) {
    CHECK(got.intact(), "%s %s: wrote outside", Type<T>::name, name);
    for (int64_t i = 0; i < got.size(); i++)
      CHECK(close(got[i], expected[size_t(i)].value, chain * expected[size_t(i)].size),
            "%s %s[%ld], B=%ld T=%ld F=%ld C=%ld taps %ldx%ld pads %ld, %ld: expected %.9Lg, got %.9g", Type<T>::name,
            name, long(i), long(s.batch), long(s.frames), long(s.width), long(s.channels), long(s.taps_t),
            long(s.taps_f), long(s.pad_t), long(s.pad_f), expected[size_t(i)].value, value(got[i]));
  };
  check("y", k.y, y), check("dx", k.dx, dx), check("dweight", k.dweight, dw), check("dbias", k.dbias, db);

  Case<T> other(s);
  other.run(1);
  CHECK(k.y.equals(other.y) && k.dx.equals(other.dx) && k.dweight.equals(other.dweight) && k.dbias.equals(other.dbias),
        "%s: the pieces that work is cut into show in the result", Type<T>::name);
}

}  // namespace

TEST_CASE("depthwise_conv2d") {
  for_each_type([]<typename T>() {
    for (const int64_t channels : {1, 4, 15, 16, 33})
      for (const int64_t width : {1, 3, 6, 9, 19}) values<T>({2, 9, width, channels, 7, 7, 3, 3});
    for (const int64_t frames : {1, 2, 31, 32, 33, 67}) values<T>({2, frames, 5, 20, 3, 5, 1, 2});
    values<T>({3, 40, 12, 17, 1, 1, 0, 0});
    values<T>({2, 20, 31, 8, 4, 9, 0, 3});  // narrower than the input along time
    values<T>({2, 20, 31, 8, 7, 7, 0, 3});  // a streaming step with its cache
    values<T>({1, 4, 4, 8, 5, 12, 4, 11});  // wider than the input
    values<T>({40, 3, 3, 5, 2, 2, 1, 1});   // more blocks than groups
    values<T>({0, 3, 3, 5, 3, 3, 1, 1});
    values<T>({2, 0, 3, 5, 1, 3, 0, 1});
  });
}

}  // namespace fastasr::test
