// SPDX-License-Identifier: Apache-2.0
// The kernels of csrc/cpu/rows against their formulas in long double.
#include <limits>
#include <random>

#include "cpu/math/activation.h"
#include "cpu/rows/balancer_gradient.h"
#include "cpu/rows/dropout.h"
#include "cpu/rows/residual_norm.h"
#include "cpu/rows/rows.h"
#include "cpu/rows/swoosh.h"
#include "cpu/rows/whitening_gradient.h"
#include "tests/check.h"

namespace fastasr::test {
namespace {

using cpu::Mask;
using cpu::Swoosh;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();

// Rows are independent: in pieces, one after another or on several threads without a race, they have the bits of the
// whole. make(step) returns a case whose run(begin, end) computes these rows and writes their sums to a place of their
// own.
template <typename F>
void rows_apart(int64_t rows, int64_t step, const F& make) {
  INFO("pieces of ", step, " out of ", rows);
  auto whole = make(rows), pieces = make(step);
  whole.run(0, rows);
  in_pieces(rows, step, [&](int64_t begin, int64_t end) { pieces.run(begin, end); });
  CHECK(whole.same_rows(pieces), "pieces differ from the whole");
  for (const int64_t count : {2, 3, 8}) {
    auto parallel = make(step);
    on_threads(count, [&](int64_t t) {
      for (int repeat = 0; repeat < 20; repeat++)
        for (int64_t begin = t * step; begin < rows; begin += count * step)
          parallel.run(begin, std::min(begin + step, rows));
    });
    CHECK(parallel.same_rows(pieces) && parallel.same_sums(pieces), "%ld threads differ from one", long(count));
  }
}

// Returns how many pieces have sums of their own.
int64_t pieces_of(int64_t rows, int64_t step) { return rows ? (rows + step - 1) / step : 1; }

// ---------------------------------------------------------------- bypass

template <typename T>
struct Bypass {
  int64_t rows, period, step, n = rows * period;
  Random random;
  Buffer<T> x_orig{n, period % 3, random}, x{n, period % 4, random, 2}, grad{n, 0, random}, scale{period, period % 2};
  Buffer<T> y{n, period % 5}, dx_orig{n, 1}, dx{n, 2};
  Buffer<compute_t<T>> dscale{pieces_of(rows, step) * period};

  Bypass(int64_t rows_, int64_t period_, int64_t step_, uint64_t seed)
      : rows(rows_), period(period_), step(step_), random(seed) {
    for (int64_t j = 0; j < period; j++) scale[j] = make<T>(j % 9 == 3 ? 1.0 : random.uniform());
  }
  void run(int64_t begin, int64_t end) {
    const auto& kernel = cpu::kernels<cpu::BypassKernels<T>>();
    const int64_t at = begin * period, piece = step ? begin / step : 0;
    kernel.forward(x_orig + at, x + at, scale, y + at, end - begin, period);
    kernel.backward(grad + at, x_orig + at, x + at, scale, dx_orig + at, dx + at, dscale + piece * period, end - begin,
                    period);
  }
  bool same_rows(Bypass& o) { return y.equals(o.y) && dx_orig.equals(o.dx_orig) && dx.equals(o.dx); }
  bool same_sums(Bypass& o) { return dscale.equals(o.dscale); }
};

template <typename T>
void bypass_values(int64_t rows, int64_t period) {
  INFO(Type<T>::name, " ", rows, "x", period);
  Bypass<T> c(rows, period, rows, static_cast<uint64_t>(rows * 17 + period));
  c.run(0, rows);
  for (int64_t j = 0; j < period; j++) {
    const long double s = c.scale(j);
    Sum sum;
    for (int64_t i = j; i < c.n; i += period) {
      const long double o = c.x_orig(i), v = c.x(i), g = c.grad(i);
      sum.add(g * (v - o));
      EXPECT(c.y, i, o + (v - o) * s, 4 * (std::fabs(o) + std::fabs(v)));
      EXPECT(c.dx, i, g * s, 2 * std::fabs(g));
      EXPECT(c.dx_orig, i, g * (1 - s), 3 * std::fabs(g));
    }
    EXPECT(c.dscale, j, sum.value, sum.size * (4 + rows));
  }
}

// A NaN of x_orig reaches its element of the output, as in the formula, and no other.
template <typename T>
void bypass_nan() {
  Bypass<T> clean(9, 53, 9, 5), c(9, 53, 9, 5);
  c.x_orig[4 * 53 + 3] = make<T>(kNan);
  clean.run(0, 9), c.run(0, 9);
  for (int64_t i = 0; i < c.n; i++)
    CHECK(i == 4 * 53 + 3 ? std::isnan(c.y(i)) : same_bits(c.y[i], clean.y[i]), "%s %ld", Type<T>::name, long(i));
}

TEST_CASE("bypass") {
  for_each_type([&]<typename T>() {
    for (const int64_t rows : {0, 1, 4})
      for (const int64_t period : kSizes) bypass_values<T>(rows, period);
    rows_apart(9, 1, [](int64_t step) { return Bypass<T>(9, 53, step, 5); });
    rows_apart(61, 4, [](int64_t step) { return Bypass<T>(61, 67, step, 1); });
    bypass_nan<T>();
  });
}

// ---------------------------------------------------------------- bias_norm

template <typename T>
struct BiasNorm {
  using C = compute_t<T>;
  int64_t rows, channels, step, n = rows * channels;
  Random random;
  Buffer<T> x{n, channels % 4, random, 1.5, 0.2}, grad{n, channels % 3, random},
      bias{channels, channels % 2, random, 0.5}, y{n, channels % 5}, dx{n, channels % 2};
  Buffer<C> dbias{pieces_of(rows, step) * channels};
  Buffer<double> dlog_scale{pieces_of(rows, step)};
  C scale = static_cast<C>(0.8);

  BiasNorm(int64_t rows_, int64_t channels_, int64_t step_, uint64_t seed)
      : rows(rows_), channels(channels_), step(step_), random(seed) {}
  void run(int64_t begin, int64_t end) {
    const auto& kernel = cpu::kernels<cpu::BiasNormKernels<T>>();
    const int64_t at = begin * channels, piece = step ? begin / step : 0;
    kernel.forward(x + at, bias, scale, y + at, end - begin, channels);
    kernel.backward(grad + at, x + at, bias, scale, dx + at, dbias + piece * channels, dlog_scale + piece, end - begin,
                    channels);
  }
  bool same_rows(BiasNorm& o) { return y.equals(o.y) && dx.equals(o.dx); }
  bool same_sums(BiasNorm& o) { return dbias.equals(o.dbias) && dlog_scale.equals(o.dlog_scale); }
};

template <typename T>
void bias_norm_values(int64_t rows, int64_t channels) {
  INFO(Type<T>::name, " ", rows, "x", channels);
  BiasNorm<T> c(rows, channels, rows, static_cast<uint64_t>(rows * 131 + channels));
  c.run(0, rows);
  std::vector<Sum> dbias(static_cast<size_t>(channels));
  Sum dlog_scale;
  for (int64_t first = 0; first < c.n; first += channels) {
    long double sum = 0;
    Sum dot;
    for (int64_t j = 0; j < channels; j++) {
      const long double v = c.x(first + j), d = v - c.bias(j);
      sum += d * d, dot.add(c.grad(first + j) * v);
    }
    const long double s = c.scale / std::sqrt(sum / channels), k = dot.value * s / sum, units = 6;
    dlog_scale.add(dot.value * s, dot.size * s * units);
    for (int64_t j = 0; j < channels; j++) {
      const int64_t i = first + j;
      const long double v = c.x(i), d = v - c.bias(j), g = c.grad(i);
      const long double k_size = dot.size * s / sum * std::fabs(d) * units;
      dbias[j].add(k * d, k_size + std::fabs(k * d) * rows);
      EXPECT(c.y, i, v * s, units * std::fabs(v * s));
      EXPECT(c.dx, i, g * s - k * d, units * std::fabs(g * s) + k_size);
    }
  }
  EXPECT_ALL(c.dbias, dbias, 1);
  if (channels)
    EXPECT_WITHIN(c.dlog_scale, 0, dlog_scale.value, dlog_scale.size * Type<compute_t<T>>::half_ulp + 1e-15L);
}

// A NaN marks its row; a row that equals the bias has no norm (there is no epsilon: x * inf); no other row changes.
template <typename T>
void bias_norm_special_rows() {
  constexpr int64_t kChannels = 37;
  BiasNorm<T> clean(7, kChannels, 7, 11), c(7, kChannels, 7, 11);
  c.x[2 * kChannels + 5] = make<T>(kNan);
  for (int64_t j = 0; j < kChannels; j++) c.x[4 * kChannels + j] = c.bias[j];
  clean.run(0, 7), c.run(0, 7);
  for (int64_t i = 0; i < c.n; i++) {
    const int64_t row = i / kChannels;
    CHECK(row == 2   ? std::isnan(c.y(i))
          : row == 4 ? !std::isfinite(c.y(i))
                     : same_bits(c.y[i], clean.y[i]),
          "%s row %ld", Type<T>::name, long(row));
  }
}

TEST_CASE("bias_norm") {
  for_each_type([&]<typename T>() {
    for (const int64_t rows : {0, 1, 3})
      for (const int64_t channels : kSizes) bias_norm_values<T>(rows, channels);
    rows_apart(7, 2, [](int64_t step) { return BiasNorm<T>(7, 37, step, 11); });
    rows_apart(61, 4, [](int64_t step) { return BiasNorm<T>(61, 67, step, 1); });
    bias_norm_special_rows<T>();
  });
}

// ---------------------------------------------------------------- balancer_gradient

template <typename T>
void balancer_values(int64_t rows, int64_t channels) {
  INFO(Type<T>::name, " ", rows, "x", channels);
  const auto& kernel = cpu::kernels<cpu::BalancerKernels<T>>();
  using C = compute_t<T>;
  const int64_t stride = channels + channels % 3, n = rows * channels;
  Random random(static_cast<uint64_t>(rows * 31 + channels));
  Buffer<T> x(rows * stride, channels % 4, random, 0.5, 3), grad(n, 1, random), y(n, 2), run(rows), run_grad(rows),
      run_y(rows);
  Buffer<C> shift(channels, 0, random, 0.2, 3), offset(channels, 0, random, 0.1), slope(channels, 0, random, 0.1);
  Buffer<double> s1(channels), s2(channels), t1(1), t2(1);
  kernel.sums_rows(x, stride, shift, s1, s2, rows, channels);
  kernel.apply_rows(grad, x, stride, shift, offset, slope, y, rows, channels);
  for (int64_t c = 0; c < channels; c++) {
    long double e1 = 0, e2 = 0, size = 0;
    for (int64_t r = 0; r < rows; r++) {
      const long double d = x(r * stride + c) - shift(c), g = grad(r * channels + c), l = offset(c) + slope(c) * d;
      e1 += d, e2 += d * d, size += std::fabs(d) + std::fabs(shift(c));
      const long double parts = std::fabs(offset(c)) + std::fabs(slope(c)) * (std::fabs(d) + 8);
      EXPECT(y, r * channels + c, g + std::fabs(g) * l, 6 * std::fabs(g) * (1 + parts));
      run[r] = x[r * stride + c], run_grad[r] = grad[r * channels + c];
    }
    const double unit = Type<C>::half_ulp;
    EXPECT_WITHIN(s1, c, e1, 16 * unit * size);
    EXPECT_WITHIN(s2, c, e2, 16 * unit * (e2 + size));
    kernel.sums_run(run, shift[c], t1, t2, rows);
    kernel.apply_run(run_grad, run, shift[c], offset[c], slope[c], run_y, rows);
    EXPECT_WITHIN(t1, 0, e1, 64 * unit * size);
    EXPECT_WITHIN(t2, 0, e2, 64 * unit * (e2 + size));
    for (int64_t r = 0; r < rows; r++) EXPECT(run_y, r, y(r * channels + c), 8);
  }
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

// ---------------------------------------------------------------- whitening

void whitening_rows(int64_t rows, int64_t channels) {
  INFO(rows, "x", channels);
  const auto& kernel = cpu::kernels<cpu::WhiteningKernels>();
  const int64_t stride = channels + 3, n = rows * channels;
  Random random(static_cast<uint64_t>(rows * 31 + channels));
  Buffer<float> x(rows * stride, 1, random), mean(channels, 2, random), grad(n, 3, random), y(n, 1), z(n, 2);
  kernel.centre(x, stride, mean, y, rows, channels);
  kernel.add(grad, y, mean, 0.3f, z, rows, channels);
  for (int64_t i = 0; i < n; i++) {
    const int64_t r = i / channels, c = i % channels;
    const long double centred = x(r * stride + c) - mean(c), change = y(i) - mean(c);
    EXPECT(y, i, centred, std::fabs(centred));
    EXPECT(z, i, grad(i) + 0.3f * change, 4 * (std::fabs(grad(i)) + std::fabs(change)));
  }
}

void mirrored(int64_t n, int64_t block) {
  INFO(n, " in blocks of ", block);
  Random random(static_cast<uint64_t>(n));
  Buffer<float> values(n * n, 1, random), matrix(n * n, 2);
  Buffer<double> squares(n);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < n; j++)  // what no product wrote is NaN
      matrix[i * n + j] =
          j < i / block * block ? std::numeric_limits<float>::quiet_NaN() : values[std::min(i, j) * n + std::max(i, j)];
  const int64_t half = n / 2;
  cpu::kernels<cpu::WhiteningKernels>().mirror(matrix, n, block, squares, half, n);
  cpu::kernels<cpu::WhiteningKernels>().mirror(matrix, n, block, squares, 0, half);
  for (int64_t i = 0; i < n; i++) {
    long double sum = 0;
    for (int64_t j = 0; j < n; j++) {
      const float expected = values[std::min(i, j) * n + std::max(i, j)];
      CHECK(matrix[i * n + j] == expected, "%ld, %ld", long(i), long(j));
      sum += static_cast<long double>(expected) * expected;
    }
    EXPECT_WITHIN(squares, i, sum, 1e-12 * sum);
  }
}

TEST_CASE("whitening") {
  for (const int64_t rows : {0, 1, 7})
    for (const int64_t channels : {1, 16, 33}) whitening_rows(rows, channels);
  for (const int64_t n : {1, 16, 40, 101})
    for (const int64_t block : {16, 48, 128}) mirrored(n, block);
}

// ---------------------------------------------------------------- dropout

// Draws the same numbers as word by word, from any place within a block.
void draws(int64_t skipped, int64_t n, double p) {
  INFO(n, " draws after ", skipped);
  const auto& kernel = cpu::kernels<cpu::DropoutKernels>();
  std::mt19937 words(4321);
  cpu::Twister generator{};
  generator.state[0] = 4321;
  for (uint32_t i = 1; i < cpu::kTwisterWords; i++) {
    const uint32_t before = generator.state[i - 1];
    generator.state[i] = 1812433253u * (before ^ (before >> 30)) + i;
  }
  generator.given = cpu::kTwisterWords;
  const auto next = [&] {
    const uint64_t first = words(), second = words();
    return static_cast<double>((first << 32 | second) & ((uint64_t{1} << 53) - 1)) * 0x1p-53;
  };
  for (int64_t part : {skipped, n}) {
    Buffer<uint8_t> keep(part, 3);
    kernel.draw(generator, p, part, keep);
    for (int64_t i = 0; i < part; i++) CHECK(keep[i] == (next() < p), "draw %ld", long(i));
  }
  std::vector<uint8_t> want(20), row(20);
  for (auto& k : want) k = next() < p;
  const int64_t places[4] = {19, 0, 7, 7};
  Buffer<float> picked(4, 1);
  kernel.picked(generator, p, 20, places, 4, 1.5f, row.data(), picked);
  for (int64_t i = 0; i < 4; i++) CHECK(picked[i] == (want[places[i]] ? 1.5f : 0.0f), "picked %ld", long(i));
}

void applied(int64_t n) {
  Random random(static_cast<uint64_t>(n));
  Buffer<float> x(n, 1, random), residual(n, 2, random), y(n, 3);
  Buffer<uint8_t> keep(n, 1);
  for (int64_t i = 0; i < n; i++) keep[i] = random.uniform() < 0.7;
  for (const bool add : {false, true}) {
    cpu::kernels<cpu::DropoutKernels>().apply(x, keep, 1.25f, add ? residual.data() : nullptr, y, n);
    for (int64_t i = 0; i < n; i++)
      EXPECT(y, i, (keep[i] ? 1.25 * x(i) : 0) + (add ? residual(i) : 0), 2 * (1 + std::fabs(x(i))));
  }
}

TEST_CASE("dropout") {
  for (const int64_t skipped : {0, 1, 311, 312, 313}) draws(skipped, 1300, 0.9);
  draws(5, 700, 0.25);
  for (const int64_t n : kSizes) applied(n);
}

// ---------------------------------------------------------------- swoosh

struct Expected {
  long double value, slope, size;  // size: magnitude of the summands, which bounds the rounding of the value
};

Expected swoosh(long double x, Swoosh kind) {
  const long double shift = kind == Swoosh::L ? 4 : 1, offset = kind == Swoosh::L ? 0.035L : 0.313261687L;
  const long double z = x - shift, u = std::exp(-std::fabs(z));
  const long double softplus = (z > 0 ? z : 0) + std::log1p(u), line = 0.08L * x + offset;
  return {softplus - line, (z > 0 ? 1 : u) / (1 + u) - 0.08L, softplus + std::fabs(line) + shift};
}

template <typename T>
struct SwooshCase {
  int64_t n;
  Mask mask_kind;
  Swoosh kind;
  Random random;
  Buffer<T> x{n, n % 4}, grad{n, n % 3}, mask{mask_kind == Mask::elementwise ? n : 1, n % 5};
  Buffer<T> y{n, n % 2}, dx{n, n % 7}, again{n};

  SwooshCase(int64_t n_, Mask mask_kind_, Swoosh kind_, uint64_t seed)
      : n(n_), mask_kind(mask_kind_), kind(kind_), random(seed) {
    // most around the bend, some far out on either side
    for (int64_t i = 0; i < n; i++) x[i] = make<T>(random.normal() * (i % 8 == 7 ? 50 : 4) + 2);
    grad.fill(random);
    for (int64_t i = 0; i < mask.size(); i++) mask[i] = make<T>(random.uniform() > 0.3 ? 1 / 0.7 : 0.0);
  }
  const T* mask_from(int64_t i) {
    return mask_kind == Mask::none ? nullptr : mask + (mask_kind == Mask::elementwise ? i : 0);
  }
  void backward(int64_t begin, int64_t end, T* dx_to, T* y_to) {
    cpu::kernels<cpu::SwooshKernels<T>>().backward(grad + begin, x + begin, mask_from(begin), mask_kind, dx_to, y_to,
                                                   end - begin, kind);
  }
  void run(int64_t begin, int64_t end) {
    cpu::kernels<cpu::SwooshKernels<T>>().forward(x + begin, mask_from(begin), mask_kind, y + begin, end - begin, kind);
    backward(begin, end, dx + begin, again + begin);
  }
  bool same_rows(SwooshCase& o) { return y.equals(o.y) && dx.equals(o.dx) && again.equals(o.again); }
  bool same_sums(SwooshCase&) { return true; }
};

template <typename T>
void swoosh_values(int64_t n, Mask mask_kind, Swoosh kind) {
  INFO(Type<T>::name, " swoosh ", int(kind), ", mask ", int(mask_kind), ", n = ", n);
  SwooshCase<T> c(n, mask_kind, kind, static_cast<uint64_t>(n) + 1);
  Buffer<T> dx_only(n);
  c.run(0, n);
  c.backward(0, n, dx_only, nullptr);
  for (int64_t i = 0; i < n; i++) {
    const Expected e = swoosh(c.x(i), kind);
    const long double m = mask_kind == Mask::none ? 1 : value(*c.mask_from(i)), g = c.grad(i);
    EXPECT(c.y, i, e.value * m, 6 * e.size * m);
    EXPECT(c.again, i, e.value * m, 6 * e.size * m);
    EXPECT(c.dx, i, g * e.slope * m, 8 * std::fabs(g) * m);
  }
  CHECK(c.dx.equals(dx_only), "dx depends on whether the output is asked for");
  c.backward(0, n, c.grad, c.again);
  CHECK(c.grad.equals(c.dx), "backward in place differs");
}

// A piece of the work gives the same bits as the whole, whatever its size.
template <typename T>
void swoosh_pieces(Mask mask_kind, Swoosh kind) {
  SwooshCase<T> c(1031, mask_kind, kind, 3), pieces(1031, mask_kind, kind, 3);
  c.run(0, c.n);
  for (int64_t begin = 0, step = 1; begin < c.n; begin += step, step = step * 2 + 1)
    pieces.run(begin, std::min(begin + step, c.n));
  CHECK(c.same_rows(pieces), "%s: pieces differ from the whole", Type<T>::name);
}

template <typename T>
void swoosh_special_values(Swoosh kind) {
  SwooshCase<T> c(40, Mask::none, kind, 1);  // the tail and the body of a vectorised loop both see each value
  c.grad.set(1);
  const auto run = [&](double v) { c.x.set(v), c.run(0, c.n); };
  run(kNan);
  for (int64_t i = 0; i < c.n; i++) CHECK(std::isnan(c.y(i)) && std::isnan(c.dx(i)), "%s NaN", Type<T>::name);
  run(kInf);
  for (int64_t i = 0; i < c.n; i++) CHECK(std::isnan(c.y(i)), "%s: inf - inf", Type<T>::name);
  run(-kInf);
  for (int64_t i = 0; i < c.n; i++) EXPECT(c.y, i, kInf, 0);
  for (const double v : {0.0, -0.0, 1e-30, -1e-30, 1e-42, 4.0, 1.0, 60.0, -60.0, 3e4, -3e4, 1e30, -1e30, 3e38, -3e38}) {
    INFO("at ", v);
    run(v);
    if (!std::isfinite(c.x(0))) continue;  // beyond this type
    const Expected e = swoosh(c.x(0), kind);
    for (int64_t i = 0; i < c.n; i++) {
      EXPECT(c.y, i, e.value, 6 * e.size);
      EXPECT(c.dx, i, e.slope, 8);
    }
  }
}

// Every bfloat16 and half gives the double result rounded once, or its neighbour.
template <typename T>
void swoosh_every_pattern(Swoosh kind) {
  Buffer<T> x(0x10000), y(0x10000);
  for (int64_t p = 0; p < 0x10000; p++) x[p].bits = static_cast<uint16_t>(p);
  cpu::kernels<cpu::SwooshKernels<T>>().forward(x, nullptr, Mask::none, y, 0x10000, kind);
  for (int64_t p = 0; p < 0x10000; p++) {
    if (!std::isfinite(x(p))) continue;
    const Expected e = swoosh(x(p), kind);
    EXPECT(y, p, e.value, 6 * e.size);
  }
}

TEST_CASE("swoosh") {
  for (const Swoosh kind : {Swoosh::L, Swoosh::R}) {
    for_each_type([&]<typename T>() {
      for (const Mask mask : {Mask::none, Mask::scalar, Mask::elementwise}) {
        for (const int64_t n : kSizes) swoosh_values<T>(n, mask, kind);
        swoosh_pieces<T>(mask, kind);
      }
      swoosh_special_values<T>(kind);
      rows_apart(61 * 67, 4 * 67, [&](int64_t) { return SwooshCase<T>(61 * 67, Mask::elementwise, kind, 1); });
    });
    swoosh_every_pattern<bfloat16>(kind);
    swoosh_every_pattern<float16>(kind);
  }
}

// ---------------------------------------------------------------- linear_activation

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

TEST_CASE("linear_activation") {
  for_each_type([]<typename T>() {
    for (int activation = 0; activation < cpu::kActivations; activation++)
      for (const int64_t channels : {1, 17, 1023, 1024, 1030, 2100})
        linear_activation_values<T>(activation, 5, channels);
    linear_activation_values<T>(1, 0, 8);
  });
}

// ---------------------------------------------------------------- residual_norm

// Makes one call with rows further apart than they are long, on both forms.
template <typename T>
void residual_norm_values(int64_t rows, int64_t channels, bool gated, bool masked) {
  INFO(Type<T>::name, " ", rows, "x", channels, gated ? " gated" : "", masked ? " masked" : "");
  const auto& kernel = cpu::kernels<cpu::ResidualNormKernels<T>>();
  using C = compute_t<T>;
  const int64_t stride = channels + 3, n = rows * channels;
  Random random(static_cast<uint64_t>(rows * 7919 + channels * 4 + gated * 2 + masked));
  Buffer<T> x(rows * stride, 0, random), u(rows * stride, 0, random), c(rows * stride, 0, random),
      h(rows * stride, 0, random), g(n, 0, random), y(n), dx(n), du(n), ds(n);
  Buffer<C> w(channels, 0, random, 0.5, 1), b(channels, 0, random, 0.5, 1), mask(n, 0, random, 0.5, 1);
  Buffer<C> dw(channels), db(channels), scratch(cpu::residual_norm_scratch(channels)), kept(3 * rows);
  cpu::ResidualNorm<T> p{};
  p.x = {x, stride}, p.update = {u, stride};
  if (gated) p.candidate = {c, stride}, p.hidden = {h, stride};
  p.mask = masked ? mask.data() : nullptr;
  p.weight = w, p.bias = b, p.eps = 1e-3, p.activation = 1, p.channels = channels;
  auto* statistics = reinterpret_cast<cpu::RowStatistics<C>*>(kept.data());
  kernel.forward(p, 0, rows, y, statistics, scratch);
  kernel.backward(p, g, channels % 2 ? statistics : nullptr, 0, rows, dx, gated ? du.data() : nullptr,
                  gated ? ds.data() : nullptr, dw, db, scratch);

  Reals ew(static_cast<size_t>(channels)), t(ew), a(ew), s(ew), slope(ew);
  for (int64_t r = 0; r < rows; r++) {
    long double mean = 0, var = 0, d_mean = 0, d_along = 0;
    for (int64_t j = 0; j < channels; j++) {
      const int64_t at = r * stride + j;
      const Activated act = activated(1, static_cast<long double>(value(c[at]) + value(h[at])));
      const long double m = masked ? mask(r * channels + j) : 1;
      s[j] = logistic(u(at)), a[j] = act.value * m, slope[j] = m * act.slope;
      t[j] = gated ? x(at) + s[j] * (a[j] - x(at)) : x(at) + u(at);
      mean += t[j] / channels;
    }
    for (long double v : t) var += (v - mean) * (v - mean) / channels;
    const long double scale = 1 / std::sqrt(var + p.eps);
    for (int64_t j = 0; j < channels; j++) {
      const long double normed = (t[j] - mean) * scale, d = g(r * channels + j) * w(j);
      d_mean += d / channels, d_along += d * normed / channels, ew[j] += g(r * channels + j) * normed;
    }
    // t is exact to a few units of its parts; scale magnifies that
    const long double room = 40 * scale * 3, size = room * scale * 10;
    for (int64_t j = 0; j < channels; j++) {
      const int64_t at = r * channels + j;
      const long double normed = (t[j] - mean) * scale, d = g(at) * w(j), xv = x(r * stride + j);
      const long double dt = (d - d_mean - normed * d_along) * scale;
      EXPECT(y, at, normed * w(j) + b(j), room);
      EXPECT(dx, at, gated ? dt * (1 - s[j]) : dt, size);
      if (!gated) continue;
      EXPECT(du, at, dt * (a[j] - xv) * s[j] * (1 - s[j]), size);
      EXPECT(ds, at, dt * s[j] * slope[j], size);
    }
  }
  for (int64_t j = 0; j < channels; j++)
    EXPECT_WITHIN(dw, j, ew[j], Type<C>::half_ulp * 4000 * (1 + static_cast<long double>(rows)));
}

// Rows are independent, and rows of one value become the bias whatever the epsilon.
template <typename T>
void residual_norm_rows_apart() {
  const auto& kernel = cpu::kernels<cpu::ResidualNormKernels<T>>();
  using C = compute_t<T>;
  const int64_t rows = 5, channels = 37;
  Random random(3);
  Buffer<T> x(rows * channels, 0, random), u(rows * channels, 0, random), y(rows * channels), y2(rows * channels);
  Buffer<C> w(channels, 0, random), b(channels, 0, random), scratch(cpu::residual_norm_scratch(channels));
  for (int64_t j = 0; j < channels; j++) x[2 * channels + j] = make<T>(0.1), u[2 * channels + j] = make<T>(0);
  cpu::ResidualNorm<T> p{};
  p.x = {x, channels}, p.update = {u, channels};
  p.weight = w, p.bias = b, p.eps = 1e-12, p.channels = channels;
  kernel.forward(p, 0, rows, y, nullptr, scratch);
  kernel.forward(p, 0, 2, y2, nullptr, scratch);
  kernel.forward(p, 2, rows, y2, nullptr, scratch);
  CHECK(y.equals(y2), "%s: blocks of rows differ from the whole", Type<T>::name);
  for (int64_t j = 0; j < channels; j++)
    CHECK(same_bits(y[2 * channels + j], make<T>(value(b[j]))), "%s: a row of one value", Type<T>::name);
}

TEST_CASE("residual_norm") {
  for_each_type([&]<typename T>() {
    for (const int64_t rows : {0, 1, 3})
      for (const int64_t channels : kSizes)
        if (channels > 0)
          for (int form = 0; form < 3; form++) residual_norm_values<T>(rows, channels, form > 0, form == 2);
    residual_norm_rows_apart<T>();
  });
}

}  // namespace
}  // namespace fastasr::test
