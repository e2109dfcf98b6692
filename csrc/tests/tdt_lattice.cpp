// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/tdt_lattice.h"

#include "tests/lattice_case.h"

namespace fastasr::test {
namespace {

template <typename C>
struct Case {
  int64_t symbols, frames;
  const std::vector<int64_t>& durations;
  double mean, scale;
  int64_t gap = 0;
  Rounding rounding = rounded<C>;
  int64_t row = symbols + 1 + gap, count = static_cast<int64_t>(durations.size()), cells = frames * row;
  cpu::TdtSize size{symbols, frames, row, durations.data(), count};
  Random random{static_cast<uint64_t>(symbols * 1000 + frames * 7 + count), rounding};
  Buffer<C> x{frames * (row - 1), 1, random, scale, mean}, y{cells, 2, random, scale, mean},
      z{cells * count, 3, random, scale, mean};
  Buffer<C> dx{x.size(), 1}, dy{cells, 2}, dz{z.size(), 3};
  Aligned<C> shares{frames * 2 * count * cpu::tdt_row(row)}, scratch{cpu::tdt_scratch(size)};

  C forward(bool keep = true) {
    return cpu::kernels<cpu::TdtLatticeKernels<C>>().forward(size, x, y, z, keep ? static_cast<C*>(shares) : nullptr,
                                                             scratch);
  }
  void backward() { cpu::kernels<cpu::TdtLatticeKernels<C>>().backward(size, C(1), shares, dx, dy, dz, scratch); }
};

template <typename C>
void values(int64_t symbols, int64_t frames, const std::vector<int64_t>& durations, double mean, double scale,
            int64_t gap = 0) {
  INFO(Type<C>::name, " ", symbols, "x", frames, " durations ", durations.size(), " from ", durations[0]);
  Case<C> c{symbols, frames, durations, mean, scale, gap};
  Case<double> exact{symbols, frames, durations, mean, scale, gap, rounded<C>};
  const C score = c.forward();
  const double expected = exact.forward(), allowed = 1e-4;
  CHECK(same_bits(score, c.forward(false)), "shares change the score");
  CHECK((std::isinf(expected) ? score == expected : std::fabs(score - expected) < allowed + 1e-6 * std::fabs(expected)),
        "score %.9g, expected %.9g", double(score), expected);
  if (!(expected > -kInf)) return;
  c.backward(), exact.backward();
  expect_rows("dx", c.dx, exact.dx, symbols, c.row - 1, allowed);
  expect_rows("dy", c.dy, exact.dy, symbols + 1, c.row, allowed);
  expect_rows("dz", c.dz, exact.dz, (symbols + 1) * c.count, c.row * c.count, allowed);
}

template <typename C>
void special() {
  const std::vector<int64_t> durations{0, 1, 2};
  const cpu::TdtSize size{3, 5, 4, durations.data(), 3};
  for (const int which : {0, 1, 2})
    for (const C bad : {std::numeric_limits<C>::quiet_NaN(), std::numeric_limits<C>::infinity()}) {
      std::vector<C> x(15, C(-1)), y(20, C(-1)), z(60, C(-1)), scratch(static_cast<size_t>(cpu::tdt_scratch(size)));
      (which == 0 ? x : which == 1 ? y : z)[9] = bad;
      const C score = cpu::kernels<cpu::TdtLatticeKernels<C>>().forward(size, x.data(), y.data(), z.data(), nullptr,
                                                                        scratch.data());
      CHECK(std::isnan(score), "%s: %g in argument %d is lost", Type<C>::name, double(bad), which);
    }
}

template <typename C>
void all() {
  const std::vector<std::vector<int64_t>> sets{{0, 1, 2, 3, 4}, {1}, {0}, {2, 0, 5}, {3, 1}, {0, 1000}};
  for (const auto& durations : sets)
    for (const int64_t symbols : {0, 1, 3, 7, 15, 16, 17, 33})
      for (const int64_t frames : {0, 1, 2, 5, 16, 40}) {
        values<C>(symbols, frames, durations, -2, 1);
        values<C>(symbols, frames, durations, -1, 1, 5);
      }
  values<C>(20, 60, {0, 1, 2, 3, 4}, -300, 100);
  special<C>();
}

}  // namespace

TEST_CASE("tdt_lattice") {
  all<float>();
  all<double>();
}

}  // namespace fastasr::test
