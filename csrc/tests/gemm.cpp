// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/gemm.h"

#include <array>

#include "cpu/rows/swoosh.h"
#include "tests/check.h"

namespace fastasr::test {
namespace {

// Returns strides of an operand with `rows` by `columns`: rows, columns, or neither of them next to each other.
struct Layout {
  int64_t row, column, size;
  Layout(int kind, int64_t rows, int64_t columns) {
    if (kind == 0)
      row = columns + 3, column = 1;
    else if (kind == 1)
      row = 1, column = rows + 2;
    else
      row = 2, column = 2 * rows + 1;
    size = (rows - 1) * row + (columns - 1) * column + 1;
  }
};

template <typename T>
struct Problem {
  Random random;
  Layout la, lb;
  Buffer<T> a, b;
  Buffer<float> bias, c;
  cpu::Gemm<T> g;
  Problem(int64_t m, int64_t n, int64_t k, int kind_a, int kind_b, bool with_bias, int64_t chain = cpu::kGemmChain)
      : random(static_cast<uint64_t>(m * 7919 + n * 131 + k)),
        la(kind_a, m, k),
        lb(kind_b, k, n),
        a(la.size, 1, random),
        b(lb.size, 3, random),
        bias(n, 5, random),
        c((m - 1) * (n + 7) + n, 2),
        g{a, la.row, la.column, b, lb.row, lb.column, with_bias ? bias.data() : nullptr, c, n + 7, m, n, k} {
    g.chain = chain;
  }
  // Runs panels and tasks in pieces of `step`.
  void run(int64_t step) {
    const auto& kernel = cpu::kernels<cpu::GemmKernels<T>>();
    Buffer<float> pa(kernel.packed_a(g)), pb(kernel.packed_b(g));
    in_pieces(kernel.a_panels(g), step, [&](int64_t begin, int64_t end) { kernel.pack_a(g, pa, begin, end); });
    in_pieces(kernel.b_panels(g), step, [&](int64_t begin, int64_t end) { kernel.pack_b(g, pb, begin, end); });
    in_pieces(kernel.tasks(g), step, [&](int64_t begin, int64_t end) { kernel.products(g, pa, pb, begin, end); });
  }
  // Packs B on the way, in `count` strips.
  void run_strips(int64_t count) {
    const auto& kernel = cpu::kernels<cpu::GemmKernels<T>>();
    Buffer<float> pa(kernel.packed_a(g));
    kernel.pack_a(g, pa, 0, kernel.a_panels(g));
    in_pieces(count, 2, [&](int64_t begin, int64_t end) { kernel.strips(g, pa, count, begin, end); });
  }
};

// Checks the product, which the problem holds, against exact sums; chains of terms are at most so long, and `held` is
// what C held before.
template <typename T>
void check_values(Problem<T>& p, bool with_bias, int64_t terms, double held = 0) {
  const auto [m, n, k] = std::array{p.g.m, p.g.n, p.g.k};
  for (int64_t at = 0; at < p.c.size(); at++) {
    const int64_t i = at / (n + 7), j = at % (n + 7);
    if (j >= n) {
      CHECK(p.c.unset(at), "wrote behind a row");
      continue;
    }
    Sum sum;
    sum.add(with_bias ? p.bias(j) : 0), sum.add(held);
    for (int64_t l = 0; l < k; l++) sum.add(p.a(i * p.la.row + l * p.la.column) * p.b(l * p.lb.row + j * p.lb.column));
    EXPECT_WITHIN(p.c, at, sum.value, static_cast<long double>(terms) * 0x1p-24L * sum.size);
  }
}

template <typename T>
void values(int64_t m, int64_t n, int64_t k, int kind_a, int kind_b, int64_t chain = cpu::kGemmChain) {
  INFO(Type<T>::name, " ", m, "x", n, "x", k, " layouts ", kind_a, " and ", kind_b, ", chains of ", chain);
  const bool with_bias = (m + n + k) % 2;
  Problem<T> p(m, n, k, kind_a, kind_b, with_bias, chain), pieces(m, n, k, kind_a, kind_b, with_bias, chain);
  p.run(int64_t{1} << 40);
  pieces.run(3);
  CHECK(p.c.equals(pieces.c), "the split shows");
  for (const int64_t count : {int64_t{1}, int64_t{3}, cpu::kernels<cpu::GemmKernels<T>>().strip_count(p.g, 2)}) {
    Problem<T> strips(m, n, k, kind_a, kind_b, with_bias, chain);
    if (count) strips.run_strips(count);
    CHECK(!count || p.c.equals(strips.c), "strips have other bits");
  }
  const int64_t longest = chain * 4 / static_cast<int64_t>(sizeof(T));
  const int64_t terms = std::min(k, longest) + (k + longest - 1) / longest + 1;
  check_values(p, with_bias, terms);
  Problem<T> added(m, n, k, kind_a, kind_b, with_bias, chain);
  for (int64_t i = 0; i < m; i++) std::fill_n(added.c + i * (n + 7), n, 3.0f);
  added.g.add = true;
  added.run(3);
  check_values(added, with_bias, terms + 1, 3);
}

// Another matrix is added last and SwooshL is of all that, whatever the split: the bits are those of separate steps.
template <typename T>
void addends(int64_t m, int64_t n, int64_t k) {
  INFO(Type<T>::name, " ", m, "x", n, "x", k);
  Problem<T> plain(m, n, k, 0, 1, true), pieces(m, n, k, 0, 1, true), strips(m, n, k, 0, 1, true);
  Random random(7);
  Buffer<float> onto(m * (n + 2), 1, random);
  for (cpu::Gemm<T>* g : {&pieces.g, &strips.g}) g->onto = onto, g->onto_row = n + 2, g->swoosh_l = true;
  plain.run(int64_t{1} << 40);
  for (int64_t i = 0; i < m; i++) {
    float* const c = plain.c + i * (n + 7);
    for (int64_t j = 0; j < n; j++) c[j] += onto[i * (n + 2) + j];
    cpu::kernels<cpu::SwooshKernels<float>>().forward(c, nullptr, cpu::Mask::none, c, n, cpu::Swoosh::L);
  }
  pieces.run(3), strips.run_strips(3);
  CHECK(plain.c.equals(pieces.c), "tasks");
  CHECK(plain.c.equals(strips.c), "strips");
}

// The first rows of a product whose rows are read where they lie have the bits of those rows alone, which are packed.
void in_place(int64_t m, int64_t n, int64_t k) {
  INFO(m, "x", n, "x", k);
  const auto& kernel = cpu::kernels<cpu::GemmKernels<float>>();
  Problem<float> all(m, n, k, 0, 1, true), some(m, n, k, 0, 1, true);
  CHECK(kernel.packed_a(all.g) == 0, "packed");
  all.run(int64_t{1} << 40);
  some.g.m = m / 2;
  CHECK(kernel.packed_a(some.g) > 0, "not packed");
  some.run(5);
  some.g.a += m / 2 * some.g.a_row, some.g.c += m / 2 * some.g.c_row, some.g.m = m - m / 2;
  some.run(5);
  CHECK(all.c.equals(some.c), "other bits");
}

// A few rows read B where it lies: any split gives the same bits, and so does any number of rows beside them.
void few_rows(int64_t m, int64_t n, int64_t k) {
  INFO(m, " rows, ", n, "x", k);
  const auto& kernel = cpu::kernels<cpu::FewRowsGemm>();
  const bool with_bias = (m + n + k) % 2;
  Problem<float> p(m, n, k, 0, 1, with_bias), pieces(m, n, k, 0, 1, with_bias);
  const int64_t groups = kernel.groups(p.g);
  CHECK(groups > 0, "the product does not fit");
  kernel.products(p.g, 0, groups);
  in_pieces(groups, 3, [&](int64_t begin, int64_t end) { kernel.products(pieces.g, begin, end); });
  CHECK(p.c.equals(pieces.c), "the split shows");
  check_values(p, with_bias, 64 + 4 + (k + 255) / 256 + 1);
  Problem<float> some(m, n, k, 0, 1, with_bias);
  in_pieces(m, 2, [&](int64_t begin, int64_t end) {
    cpu::Gemm<float> g = some.g;
    g.a += begin * g.a_row, g.c += begin * g.c_row, g.m = end - begin;
    kernel.products(g, 0, kernel.groups(g));
  });
  CHECK(p.c.equals(some.c), "rows by two differ from all at once");
}

void no_few_rows() {
  const auto& kernel = cpu::kernels<cpu::FewRowsGemm>();
  for (int kind = 0; kind < 9; kind++)
    CHECK((kernel.groups(Problem<float>(3, 40, 20, kind / 3, kind % 3, false).g) > 0) == (kind == 1), "strides");
  CHECK(kernel.groups(Problem<float>(cpu::kFewRows + 1, 40, 20, 0, 1, false).g) == 0, "many rows");
  CHECK(kernel.groups(Problem<float>(3, 7, 20, 0, 1, false).g) == 0, "few columns");
}

// Rows of `width` elements in lines of `line` rows; nobody reads what is between them.
struct Lined {
  cpu::Lines lines;
  int64_t step;  // from one row to the next
  Lined(int64_t line, int64_t width)
      : lines{line, line * (width + 2) + 3, 3, 3 * line * (width + 2) + 20}, step(width + 2) {}
  int64_t size(int64_t rows, int64_t width) const { return lines.at(rows - 1, step) + width; }
};

// Rows of A or C that lie in lines, and rows of A in parts, give the bits of the same rows without.
void lines(int64_t line, int64_t n, int64_t k, int64_t parts) {
  INFO("lines of ", line, ", ", n, "x", k, " in ", parts, " parts");
  const int64_t m = 6 * line;
  Problem<float> plain(m, n, k, 0, 1, true), lined(m, n, k, 0, 1, true);
  plain.g.parts = parts, plain.g.part_step = k / parts;
  plain.run(int64_t{1} << 40);
  check_values(plain, true, std::min(k, cpu::kGemmChain) + parts * (k / cpu::kGemmChain + 1) + 1);

  const Lined of_a(line, k + parts), of_c(line, n);
  Buffer<float> a(of_a.size(m, k + parts), 2), c(of_c.size(m, n), 2);
  for (int64_t i = 0; i < m; i++)
    for (int64_t l = 0; l < k; l++)  // parts are an element apart
      a[of_a.lines.at(i, of_a.step) + l + l / (k / parts)] = plain.a[i * plain.la.row + l];
  cpu::Gemm<float>& g = lined.g;
  g.a = a, g.a_row = of_a.step, g.a_lines = of_a.lines, g.parts = parts, g.part_step = k / parts + 1;
  lined.run(3);
  CHECK(plain.c.equals(lined.c), "rows of A");
  g.c = c, g.c_row = of_c.step, g.c_lines = of_c.lines;
  lined.run(5);
  for (int64_t i = 0; i < m; i++)
    CHECK(!std::memcmp(plain.c + i * (n + 7), c + of_c.lines.at(i, of_c.step), 4 * n), "row ", i, " of C");
  for (int64_t i = 0; i < of_c.size(m, n); i++)
    if (i % of_c.lines.next_map % of_c.lines.next_line % of_c.step >= n) CHECK(c.unset(i), "wrote between rows");
}

// So do terms of A whose rows lie next to each other.
void depth_in_lines(int64_t line, int64_t m, int64_t n) {
  INFO("terms in lines of ", line, ", ", m, "x", n);
  const int64_t k = 6 * line;
  Problem<float> plain(m, n, k, 1, 0, false), lined(m, n, k, 1, 0, false);
  plain.run(int64_t{1} << 40);
  const Lined of_a(line, m);
  Buffer<float> a(of_a.size(k, m), 2);
  for (int64_t l = 0; l < k; l++) std::copy_n(plain.a + l * plain.la.column, m, a + of_a.lines.at(l, of_a.step));
  lined.g.a = a, lined.g.a_depth = of_a.step, lined.g.depth_lines = of_a.lines;
  lined.run(3);
  CHECK(plain.c.equals(lined.c), "other bits");
}

template <typename T>
void all_values() {
  for (const int64_t m : {1, 5, 6, 13, 14, 29})
    for (const int64_t n : {1, 15, 32, 33})
      for (const int64_t k : {1, 7, 16, 41})
        for (int kind = 0; kind < 9; kind++) values<T>(m, n, k, kind / 3, kind % 3);
  for (int kind = 0; kind < 9; kind++)
    values<T>(37, 65, 401, kind / 3, kind % 3), values<T>(15, 70, 800, kind / 3, kind % 3);
  for (const int64_t chain : {16, 48}) values<T>(37, 65, 401, 0, 1, chain), values<T>(530, 40, 210, 0, 0, chain);
  values<T>(113, 530, 20, 0, 1);   // more than one block of rows and of columns
  values<T>(115, 40, 5003, 1, 0);  // more than one group of terms
}

}  // namespace

TEST_CASE("gemm") {
  all_values<float>(), all_values<bfloat16>();
  for (int64_t m = 1; m <= cpu::kFewRows; m++)
    for (const int64_t n : {8, 13, 40})
      for (const int64_t k : {1, 16, 41, 1100}) few_rows(m, n, k);
  no_few_rows();
  addends<float>(29, 65, 401), addends<float>(530, 40, 20), addends<bfloat16>(29, 65, 40);
  values<float>(530, 9, 401, 0, 1), values<float>(520, 2, 1021, 0, 0);  // the second one's rows are 4 KiB apart
  for (const int64_t m : {513, 518, 672}) in_place(m, 40, 210);
  for (const int64_t line : {1, 5, 13, 31, 100})
    for (const int64_t parts : {1, 3}) lines(line, 40, 30, parts), lines(line, 33, 603, parts);
  for (const int64_t line : {1, 7, 40, 100}) depth_in_lines(line, 37, 40), depth_in_lines(line, 6, 15);
}

}  // namespace fastasr::test
