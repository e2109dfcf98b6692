// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/rnnt_lattice.h"

#include "tests/lattice_case.h"

namespace fastasr::test {
namespace {

using cpu::LatticeSize;

template <typename C>
struct Case {
  LatticeSize size;
  int64_t gap, symbols = size.symbols, x_row = size.columns() + gap, y_row = size.frames + gap;  // gaps stay unchanged
  double mean, scale;
  Rounding rounding;
  Random random{static_cast<uint64_t>(symbols * 1000 + size.frames * 2 + size.regular), rounding};
  Buffer<C> x{symbols * x_row, 1, random, scale, mean}, y{(symbols + 1) * y_row, 3, random, scale, mean};
  Buffer<C> dx{symbols * x_row, 2}, dy{(symbols + 1) * y_row, 1};
  Aligned<C> shares{size.steps() * cpu::lattice_row(size)}, scratch{cpu::lattice_scratch(symbols)};

  Case(int64_t symbols_, int64_t frames, bool regular, double mean_, double scale_, int64_t gap_ = 0,
       Rounding rounding_ = rounded<C>)
      : size{symbols_, frames, regular}, gap(gap_), mean(mean_), scale(scale_), rounding(rounding_) {}
  C forward(bool keep = true) {
    return cpu::kernels<cpu::LatticeKernels<C>>().forward(size, x, x_row, y, y_row,
                                                          keep ? static_cast<C*>(shares) : nullptr, scratch);
  }
  void backward(C grad) {
    cpu::kernels<cpu::LatticeKernels<C>>().backward(size, grad, shares, dx, x_row, dy, y_row, scratch);
  }
};

bool near(double got, double expected, double relative) {
  if (std::isinf(expected)) return got == expected;
  return std::fabs(got - expected) <= relative * std::fabs(expected) + 1e-30;
}

template <typename C>
void values(int64_t symbols, int64_t frames, bool regular, double mean, double scale, int64_t gap = 0) {
  INFO(Type<C>::name, " ", symbols, "x", frames, regular ? " regular" : " modified", " gap ", gap);
  Case<C> c(symbols, frames, regular, mean, scale, gap);
  Case<double> exact(symbols, frames, regular, mean, scale, gap, rounded<C>);
  const C score = c.forward(), again = c.forward(false);
  const double expected = exact.forward(), allowed = 1e-5;  // a hundred roundings of a product, and the score's own
  CHECK(same_bits(score, again), "keeping shares changes the score");
  CHECK(near(score, expected, 2e-7) || std::fabs(score - expected) < allowed, "score %.9g, expected %.9g",
        double(score), expected);
  if (!(expected > -kInf)) return;
  c.backward(C(1)), exact.backward(1);
  expect_rows("dx", c.dx, exact.dx, c.size.columns(), c.x_row, allowed);
  expect_rows("dy", c.dy, exact.dy, frames, c.y_row, allowed);
}

// Every path takes every frame's blank once (regular), and every symbol once.
template <typename C>
void mass() {
  Case<C> c(37, 201, true, -200, 50);
  c.forward();
  c.backward(C(2));
  double symbols = 0, blanks = 0;
  for (int64_t i = 0; i < c.dx.size(); i++) symbols += c.dx[i];
  for (int64_t i = 0; i < c.dy.size(); i++) blanks += c.dy[i];
  CHECK(std::fabs(symbols - 2 * 37) < 1e-3 && std::fabs(blanks - 2 * 201) < 1e-3, "%s: %.9g symbols, %.9g blanks",
        Type<C>::name, symbols, blanks);
}

template <typename C>
void special() {
  const C nan = std::numeric_limits<C>::quiet_NaN(), inf = std::numeric_limits<C>::infinity();
  for (const bool regular : {true, false})
    for (const C bad : {nan, inf})
      for (const int64_t at : {0, 40, 399}) {
        Case<C> c(20, 20, regular, -1, 1);
        c.x[at % c.x.size()] = bad;
        CHECK(std::isnan(c.forward()), "%s: x[%ld] = %g is lost", Type<C>::name, long(at), double(bad));
        Case<C> d(20, 20, regular, -1, 1);
        d.y[at] = bad;
        CHECK(std::isnan(d.forward()), "%s: y[%ld] = %g is lost", Type<C>::name, long(at), double(bad));
      }
  for (const C none : {-inf, static_cast<C>(-1e30), std::numeric_limits<C>::lowest()}) {
    Case<C> c(18, 40, true, -1, 1);
    Case<double> without(18, 40, true, -1, 1, 0, rounded<C>);
    for (int64_t t = 0; t < 20; t++) c.x[9 * c.x_row + t] = none, without.x[9 * c.x_row + t] = -kInf;
    c.y[3 * c.y_row + 30] = none, without.y[3 * c.y_row + 30] = -kInf;
    CHECK(near(c.forward(), without.forward(), 1e-6), "%s: entries of %g", Type<C>::name, double(none));
    c.backward(C(1));
    for (int64_t t = 0; t < 20; t++)
      CHECK(c.dx[9 * c.x_row + t] == 0, "%s: occupied at %g", Type<C>::name, double(none));
    for (int64_t t = 0; t <= 40; t++) c.x[9 * c.x_row + t] = none;
    CHECK(c.forward() == -inf, "%s: a wall of %g is passed", Type<C>::name, double(none));
  }
  for (const double mean : {-1e4, -1e7, -1e12, 1e4, 1e7}) {  // far beyond what a float's exponent holds
    Case<C> c(21, 50, true, mean, 1);
    const double score = c.forward(), expected = Case<double>(21, 50, true, mean, 1, 0, rounded<C>).forward();
    CHECK(near(score, expected, 1e-6), "%s: mean %g: %.9g, expected %.9g", Type<C>::name, mean, score, expected);
    c.backward(C(1));
    for (int64_t i = 0; i < c.dx.size(); i++)
      CHECK(c.dx[i] >= 0 && c.dx[i] <= C(1.0001), "%s: mean %g: %g", Type<C>::name, mean, double(c.dx[i]));
  }
}

template <typename C>
void all() {
  for (const bool regular : {true, false}) {
    for (const int64_t symbols : {0, 1, 2, 3, 7, 8, 14, 15, 16, 17, 31, 33, 70})
      for (const int64_t frames : {0, 1, 2, 5, 15, 16, 17, 33, 90}) {
        values<C>(symbols, frames, regular, -2, 1);
        values<C>(symbols, frames, regular, -1, 1, 5);
      }
    values<C>(600, 40, regular, -1, 1);
    values<C>(40, 1000, regular, -1, 1);
    values<C>(25, 60, regular, -800, 200);
  }
  mass<C>();
  special<C>();
}

}  // namespace

TEST_CASE("rnnt_lattice") {
  all<float>();
  all<double>();
}

}  // namespace fastasr::test
