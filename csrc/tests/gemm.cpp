// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/gemm.h"

#include <algorithm>

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

struct Problem {
  Layout la, lb;
  Buffer<float> a, b, bias, c;
  cpu::Gemm g;
  Problem(int64_t m, int64_t n, int64_t k, int kind_a, int kind_b, bool with_bias)
      : la(kind_a, m, k), lb(kind_b, k, n), a(la.size, 1), b(lb.size, 3), bias(n, 5), c((m - 1) * (n + 7) + n, 2) {
    Random random(static_cast<uint64_t>(m * 7919 + n * 131 + k));
    a.fill(random), b.fill(random), bias.fill(random);
    g = {a.data(), la.row, la.column, b.data(), lb.row, lb.column, with_bias ? bias.data() : nullptr,
         c.data(), n + 7,  m,         n,        k};
    for (int64_t i = 0; i < c.size(); i++) c[i] = 1e30f;
  }
  // Runs panels and tasks in pieces of `step`.
  void run(int64_t step) {
    const auto& kernel = cpu::kernels<cpu::GemmKernels>();
    Buffer<float> pa(kernel.packed_a(g)), pb(kernel.packed_b(g));
    for (int64_t i = 0; i < kernel.a_panels(g); i += step)
      kernel.pack_a(g, pa.data(), i, std::min(i + step, kernel.a_panels(g)));
    for (int64_t i = 0; i < kernel.b_panels(g); i += step)
      kernel.pack_b(g, pb.data(), i, std::min(i + step, kernel.b_panels(g)));
    for (int64_t i = 0; i < kernel.tasks(g); i += step)
      kernel.products(g, pa.data(), pb.data(), i, std::min(i + step, kernel.tasks(g)));
    CHECK(pa.intact() && pb.intact() && c.intact(), "wrote outside, %ldx%ldx%ld", long(g.m), long(g.n), long(g.k));
  }
};

void values(int64_t m, int64_t n, int64_t k, int kind_a, int kind_b) {
  const bool with_bias = (m + n + k) % 2;
  Problem p(m, n, k, kind_a, kind_b, with_bias), pieces(m, n, k, kind_a, kind_b, with_bias);
  p.run(int64_t{1} << 40);
  pieces.run(3);
  CHECK(p.c.equals(pieces.c), "the split shows in %ldx%ldx%ld", long(m), long(n), long(k));
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n + 7 && i * (n + 7) + j < p.c.size(); j++) {
      const float got = p.c[i * (n + 7) + j];
      if (j >= n) {
        CHECK(got == 1e30f, "wrote behind a row");
        continue;
      }
      long double sum = with_bias ? p.bias[j] : 0, size = std::fabs(sum);
      for (int64_t l = 0; l < k; l++) {
        const long double term =
            static_cast<long double>(p.a[i * p.la.row + l * p.la.column]) * p.b[l * p.lb.row + j * p.lb.column];
        sum += term, size += std::fabs(term);
      }
      const long double chain = std::min(k, cpu::kGemmChain) + (k + cpu::kGemmChain - 1) / cpu::kGemmChain + 1;
      CHECK(std::fabs(got - sum) <= chain * 0x1p-24L * size, "%ldx%ldx%ld (%d %d) at %ld, %ld: %g, not %Lg", long(m),
            long(n), long(k), kind_a, kind_b, long(i), long(j), got, sum);
    }
}

}  // namespace

TEST_CASE("gemm") {
  for (const int64_t m : {1, 5, 6, 13, 14, 29})
    for (const int64_t n : {1, 15, 32, 33})
      for (const int64_t k : {1, 7, 16, 41})
        for (int kind = 0; kind < 9; kind++) values(m, n, k, kind / 3, kind % 3);
  for (int kind = 0; kind < 9; kind++) values(37, 65, 400, kind / 3, kind % 3);
  values(113, 530, 20, 0, 1);  // more than one block of rows and of columns
}

}  // namespace fastasr::test
