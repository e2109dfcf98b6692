// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/reduced_gemm.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

using cpu::kReducedColumns;
using cpu::WeightFormat;

struct Problem {
  WeightFormat format;
  int64_t m, n, k, words = cpu::reduced_words(k, format), columns = cpu::reduced_panels(n) * kReducedColumns;
  Random random{static_cast<uint64_t>(m * 7919 + n * 131 + k)};
  Buffer<float> w{n * (k + 3), 1, random}, x{m * (k + 5), 3, random}, bias{n, 0, random}, step{m}, scale{columns},
      y{m * n, 2};
  std::vector<int32_t> rows, packed, zero, sum;
  cpu::ReducedGemm g;

  Problem(WeightFormat format_, int64_t m_, int64_t n_, int64_t k_)
      : format(format_), m(m_), n(n_), k(k_), rows(m * words), packed(columns * words), zero(m), sum(columns) {
    pack();
    g = {x, k + 5, rows.data(), step, zero.data(), {packed.data(), scale, sum.data()}, n % 2 ? bias.data() : nullptr, y,
         n, m,     n,           k,    format};
  }
  void pack() {
    cpu::pack_reduced(w, n, k, k + 3, format, packed.data(), scale, sum.data(), 0, cpu::reduced_panels(n));
  }
  const cpu::ReducedGemmKernels& kernel = cpu::reduced_gemm_kernels(format);
  void run(int64_t pieces) {
    in_pieces(m, pieces, [&](int64_t begin, int64_t end) { kernel.rows(g, begin, end); });
    in_pieces(kernel.tasks(g), pieces, [&](int64_t begin, int64_t end) { kernel.products(g, begin, end); });
  }
  // The weight of output j and input l as it is kept, in units of its scale for int8.
  double weight(int64_t j, int64_t l) {
    const int32_t* word = packed.data() + j / kReducedColumns * kReducedColumns * words + j % kReducedColumns;
    return element(word + l / each() * kReducedColumns, l % each(), true);
  }
  double input(int64_t i, int64_t l) { return element(rows.data() + i * words + l / each(), l % each(), false); }

 private:
  int64_t each() const { return format == WeightFormat::int8 ? 4 : 2; }
  double element(const int32_t* word, int64_t at, bool is_signed) {
    const char* const bytes = reinterpret_cast<const char*>(word) + at * (4 / each());
    if (format == WeightFormat::bf16) {
      bfloat16 v;
      std::memcpy(&v, bytes, 2);
      return value(v);
    }
    return is_signed ? static_cast<double>(static_cast<int8_t>(*bytes)) : static_cast<uint8_t>(*bytes);
  }
};

void values(WeightFormat format, int64_t m, int64_t n, int64_t k) {
  const bool int8 = format == WeightFormat::int8;
  INFO(int8 ? "int8 " : "bf16 ", m, "x", n, "x", k);
  Problem p(format, m, n, k), pieces(format, m, n, k);
  p.run(int64_t{1} << 40);
  pieces.run(2);
  CHECK(p.y.equals(pieces.y), "the split shows");
  if (p.kernel.tasks_are_rows(p.g)) {
    in_pieces(p.kernel.tasks(p.g), 2, [&](int64_t begin, int64_t end) { p.kernel.rows_and_products(p.g, begin, end); });
    CHECK(p.y.equals(pieces.y), "the order of rows and products shows");
  }
  std::vector<double> x(m * k), w(n * k);
  for (int64_t j = 0; j < n; j++) {
    double most = 0;
    for (int64_t l = 0; l < k; l++) most = std::max<double>(most, std::fabs(p.w[j * (k + 3) + l]));
    if (int8) CHECK(std::fabs(p.scale[j] - most / 127) <= most * 1e-7, "scale %g", p.scale[j]);
    for (int64_t l = 0; l < k; l++) {
      const double exact = p.w[j * (k + 3) + l], kept = w[j * k + l] = p.weight(j, l) * (int8 ? p.scale[j] : 1);
      CHECK(std::fabs(kept - exact) <= (int8 ? 0.5001 * p.scale[j] : std::fabs(exact) * 0x1p-8), "%g as %g", exact,
            kept);
    }
  }
  for (int64_t i = 0; i < m; i++) {
    double least = 0, most = 0;
    for (int64_t l = 0; l < k; l++) {
      least = std::min<double>(least, p.x[i * (k + 5) + l]);
      most = std::max<double>(most, p.x[i * (k + 5) + l]);
    }
    const double step = (most - least) / p.kernel.levels;
    if (int8) CHECK(std::fabs(p.step[i] - step) <= step * 1e-6, "step %g, not %g", p.step[i], step);
    for (int64_t l = 0; l < k; l++) {
      const double exact = p.x[i * (k + 5) + l];
      const double kept = x[i * k + l] = int8 ? (p.input(i, l) - p.zero[i]) * p.step[i] : p.input(i, l);
      CHECK(!int8 || p.input(i, l) <= p.kernel.levels, "beyond the levels");
      // the zero is rounded to a level as well: at the ends of the range that costs half a step more
      CHECK(std::fabs(kept - exact) <= (int8 ? 1.001 * step : std::fabs(exact) * 0x1p-8), "%g as %g", exact, kept);
    }
  }
  for (int64_t at = 0; at < p.y.size(); at++) {
    const int64_t i = at / n, j = at % n;
    Sum sum;
    sum.add(n % 2 ? p.bias(j) : 0);
    for (int64_t l = 0; l < k; l++) sum.add(x[i * k + l] * w[j * k + l]);
    EXPECT_WITHIN(p.y, at, sum.value, (int8 ? 4 : k + 2) * 0x1p-24L * sum.size);
  }
}

}  // namespace

TEST_CASE("reduced_gemm") {
  for (const auto format : {WeightFormat::bf16, WeightFormat::int8})
    for (const int64_t m : {1, 2, 5, 14, 15, 16, 33})
      for (const int64_t n : {1, 16, 31, 33, 64})
        for (const int64_t k : {1, 3, 4, 17, 64, 96, 203}) values(format, m, n, k);
  values(WeightFormat::int8, 17, 97, 8191);  // more than one block of columns
  values(WeightFormat::bf16, 17, 97, 4099);
  values(WeightFormat::int8, 67, 97, 8192);  // in tiles, too
  values(WeightFormat::bf16, 67, 97, 4096);
}

TEST_CASE("reduced_gemm of swoosh(x)") {
  const auto& swoosh = cpu::kernels<cpu::SwooshKernels<float>>();
  for (const auto format : {WeightFormat::bf16, WeightFormat::int8})
    for (const bool right : {false, true}) {
      Problem p(format, 15, 33, 64), plain(format, 15, 33, 64);
      for (int64_t i = 0; i < p.m; i++) {
        float* const row = plain.x.data() + i * (p.k + 5);
        swoosh.forward(row, nullptr, cpu::Mask::none, row, p.k, right ? cpu::Swoosh::R : cpu::Swoosh::L);
      }
      p.g.input = right ? cpu::ReducedInput::swoosh_r : cpu::ReducedInput::swoosh_l;
      p.run(2), plain.run(2);
      CHECK(p.y.equals(plain.y), "another activation");
    }
}

TEST_CASE("reduced_gemm of the largest numbers") {  // sums of 16 bits would saturate, sums of 32 not
  Problem p(WeightFormat::int8, 3, 32, 4096);
  for (int64_t at = 0; at < p.w.size(); at++) p.w[at] = at % (2 * (p.k + 3)) < p.k + 3 ? 1 : -1;
  for (int64_t at = 0; at < p.x.size(); at++) p.x[at] = 1;
  p.pack();
  p.run(1);
  for (int64_t at = 0; at < p.y.size(); at++) {
    const double expected = at % p.n % 2 ? -4096 : 4096;
    CHECK(std::fabs(p.y[at] - expected) <= 1e-3, "%g, not %g", p.y[at], expected);
  }
}

TEST_CASE("reduced_gemm keeps what is not finite") {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Problem p(WeightFormat::int8, 3, 5, 40);
    p.x[1 * 45 + 39] = bad;
    p.w[3 * 43 + 7] = bad;
    p.pack();
    p.run(1);
    for (int64_t i = 0; i < 3; i++)
      for (int64_t j = 0; j < 5; j++)
        CHECK((p.y[i * 5 + j] != p.y[i * 5 + j] || std::isinf(p.y[i * 5 + j])) == (i == 1 || j == 3), "%d, %d: %g",
              int(i), int(j), p.y[i * 5 + j]);
  }
}

}  // namespace fastasr::test
