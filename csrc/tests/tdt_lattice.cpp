// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/tdt_lattice.h"

#include "tests/lattice_case.h"

namespace fastasr::test {
namespace {

// Compares the kernel with the recursion in double and in the log domain, and its gradients with the recursion's.
template <typename C>
void values(int64_t symbols, int64_t frames, const std::vector<int64_t>& durations, double mean, double scale,
            int64_t gap = 0) {
  INFO(Type<C>::name, " ", symbols, "x", frames, " durations ", durations.size(), " from ", durations[0]);
  const int64_t row = symbols + 1 + gap, count = static_cast<int64_t>(durations.size()), cells = frames * row;
  const cpu::TdtSize size{symbols, frames, row, durations.data(), count};
  Random random(static_cast<uint64_t>(symbols * 1000 + frames * 7 + count));
  const int64_t x_cells = frames * (row - 1);
  Buffer<C> x(x_cells, 1, random, scale, mean), y(cells, 2, random, scale, mean),
      z(cells * count, 3, random, scale, mean);
  Buffer<C> dx(x_cells, 1), dy(cells, 2), dz(cells * count, 3);
  Aligned<C> shares(frames * 2 * count * cpu::tdt_row(row)), scratch(cpu::tdt_scratch(size));
  const auto& kernel = cpu::kernels<cpu::TdtLatticeKernels<C>>();
  const C score = kernel.forward(size, x, y, z, shares, scratch);
  CHECK(same_bits(score, kernel.forward(size, x, y, z, nullptr, scratch)), "shares change the score");

  const auto at = [&](int64_t t, int64_t s) { return static_cast<size_t>(t * (symbols + 1) + s); };
  const auto arc = [&](int64_t t, int64_t s, int64_t i, bool symbol) {
    return value(symbol ? x[t * (row - 1) + s] : y[t * row + s]) + value(z[(t * row + s) * count + i]);
  };
  const auto each = [&](int64_t t, int64_t s, auto visit) {  // the arcs into a cell: (from t, from s, i, symbol)
    for (int64_t i = 0; i < count; i++) {
      const int64_t from = t - durations[static_cast<size_t>(i)];
      if (from >= 0 && from < t) visit(from, s, i, false);
      if (from >= 0 && s > 0 && t < frames) visit(from, s - 1, i, true);
    }
  };
  std::vector<double> p(at(frames, symbols) + 1, -kInf), g(p.size(), 0.0);
  for (int64_t t = 0; t <= frames; t++)
    for (int64_t s = 0; s <= symbols; s++) {
      if (t + s == 0) p[0] = 0;
      each(t, s, [&](int64_t a, int64_t b, int64_t i, bool symbol) {
        p[at(t, s)] = log_add(p[at(t, s)], p[at(a, b)] + arc(a, b, i, symbol));
      });
    }
  const double truth = p.back(), allowed = sizeof(C) == 8 ? 1e-10 : 1e-4;
  CHECK((std::isinf(truth) ? score == truth : std::fabs(score - truth) < allowed + 1e-6 * std::fabs(truth)),
        "score %.9g, expected %.9g", double(score), truth);
  if (!(truth > -kInf)) return;
  kernel.backward(size, C(1), shares, dx, dy, dz, scratch);
  std::vector<double> ex(static_cast<size_t>(cells)), ey(ex), ez(static_cast<size_t>(cells * count));
  g.back() = 1;
  for (int64_t t = frames; t >= 0; t--)
    for (int64_t s = symbols; s >= 0; s--)
      each(t, s, [&](int64_t a, int64_t b, int64_t i, bool symbol) {
        if (g[at(t, s)] == 0 || p[at(t, s)] == -kInf) return;
        const double d = g[at(t, s)] * std::exp(p[at(a, b)] + arc(a, b, i, symbol) - p[at(t, s)]);
        g[at(a, b)] += d;
        (symbol ? ex[static_cast<size_t>(a * (row - 1) + b)] : ey[static_cast<size_t>(a * row + b)]) += d;
        ez[static_cast<size_t>((a * row + b) * count + i)] += d;
      });
  for (int64_t i = 0; i < x_cells; i++)
    if (i % (row - 1) < symbols)
      expect_within("dx", dx[i], i, ex[static_cast<size_t>(i)], allowed);
    else
      CHECK(dx.unset(i), "wrote between rows");
  for (int64_t i = 0; i < cells; i++) {
    if (i % row > symbols) {
      CHECK(dy.unset(i), "wrote between rows");
      continue;
    }
    expect_within("dy", dy[i], i, ey[static_cast<size_t>(i)], allowed);
    for (int64_t k = i * count; k < (i + 1) * count; k++)
      expect_within("dz", dz[k], k, ez[static_cast<size_t>(k)], allowed);
  }
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
