// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/rnnt_joiner.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

using cpu::JoinerRow;

// The problem has ragged sequences, starts that leave the sequence, and a symbol outside the vocabulary.
void rows() {
  const int64_t starts[] = {0, 1, 3, 9, /**/ -2, 0, 2, int64_t{1} << 62}, symbols[] = {4, 9, 2, /**/ 1, -1, 3};
  const int64_t boundary[] = {0, 0, 3, 4, /**/ 1, 1, 2, 3};
  cpu::JoinerBand band{starts, symbols, nullptr, 2, 4, 3, 2, 5};
  const auto& kernel = cpu::kernels<cpu::JoinerKernels<float>>();
  const float* none = nullptr;
  CHECK(kernel.rows(band, none, none, nullptr) == 2 + 2 + 1 + 0 + 0 + 2 + 2 + 0, "rows without a boundary");
  band.boundary = boundary;
  const int64_t count = kernel.rows(band, none, none, nullptr);
  std::vector<JoinerRow> found(static_cast<size_t>(count));
  kernel.rows(band, none, none, found.data());
  const JoinerRow expected[] = {{0, 0, 0, 4},
                                {1, 0, 1, JoinerRow::kUnknown},
                                {2, 1, 1, JoinerRow::kUnknown},
                                {3, 1, 2, 2},
                                {4, 2, 3, JoinerRow::kNoSymbol},
                                {11, 5, 5, JoinerRow::kUnknown},
                                {12, 6, 6, JoinerRow::kNoSymbol}};
  CHECK(count == 7 && std::memcmp(found.data(), expected, sizeof(expected)) == 0, "rows in a boundary: %ld",
        long(count));
  float gx[16] = {}, gy[16] = {};
  gx[3] = 1, gx[4] = 1, gy[12] = 1;  // at 4 there is no symbol
  CHECK(kernel.rows(band, gx, gy, found.data()) == 2 && found[0].place == 3 && found[1].place == 12,
        "rows with a gradient");
}

template <typename T>
void hidden(int64_t n) {
  using C = compute_t<T>;
  const auto& kernel = cpu::kernels<cpu::JoinerKernels<T>>();
  INFO("hidden ", n);
  Random random(static_cast<uint64_t>(n) + 1);
  Buffer<T> am(3 * n, 0, random, 1.5), lm(4 * n, 0, random, 1.5);
  const JoinerRow table[] = {{0, 2, 1, 0}, {1, 0, 3, 0}, {2, 1, 0, 0}};
  for (const bool tanh : {true, false}) {
    Buffer<C> h(3 * n);
    kernel.hidden(am, lm, table, 0, 2, n, tanh, h);
    kernel.hidden(am, lm, table, 2, 3, n, tanh, h);
    for (int64_t i = 0; i < 3 * n; i++) {
      const JoinerRow& row = table[i / n];
      const C x = static_cast<C>(value(am[row.frame * n + i % n])) + static_cast<C>(value(lm[row.context * n + i % n]));
      EXPECT(h, i, activated(tanh ? 3 : 2, x).value, 4);
    }
  }
}

// A row keeps the same channels wherever it lies in a chunk; what is kept is scaled.
template <typename C>
void dropout(int64_t n) {
  const auto& kernel = cpu::kernels<cpu::JoinerKernels<C>>();
  const cpu::WeightsDropout half{12345, int32_t{1} << 30, 2.0};
  const JoinerRow table[] = {{7, 0, 0, 0}, {9, 0, 0, 0}, {7, 0, 0, 0}};
  Buffer<C> x(3 * n);
  x.set(C(3));
  kernel.dropout(half, table, 0, 2, n, x);
  kernel.dropout(half, table, 2, 3, n, x);
  for (int64_t j = 0; j < n; j++) {
    const bool kept = cpu::dropout_bits(cpu::dropout_row(half, 7), static_cast<uint32_t>(j)) >= half.threshold;
    CHECK(x[j] == (kept ? C(6) : C(0)) && x[2 * n + j] == x[j], "%s: channel %ld", Type<C>::name, long(j));
  }
}

// Scores and the gradient of the logits of 19 rows.
template <typename C>
struct Logits {
  cpu::JoinerOutputs outputs;
  Rounding rounding = rounded<C>;
  int64_t count = 19, all = outputs.all;
  Random random{static_cast<uint64_t>(2 * outputs.tokens + outputs.hat), rounding};
  Buffer<C> x{count * all, 0, random, 3}, gx{count, 0, random}, gy{count, 0, random},
      gz{count * outputs.durations, 0, random};
  Buffer<C> px{count}, py{count}, pz{gz.size()}, d{count * all}, sum{all};
  Buffer<double> total{count};

  void run() {
    std::vector<JoinerRow> table;
    for (int64_t i = 0; i < count; i++) {
      int64_t symbol = static_cast<int64_t>(random.bits() % static_cast<uint64_t>(outputs.tokens));
      if (i % 5 == 4) symbol = JoinerRow::kNoSymbol;
      table.push_back({count - 1 - i, 0, 0, symbol});  // places in another order
    }
    const auto& kernel = cpu::kernels<cpu::JoinerKernels<C>>();
    kernel.scores(x, table.data(), 0, 7, outputs, {px, py, total, pz});
    kernel.scores(x, table.data(), 7, count, outputs, {px, py, total, pz});
    kernel.logits_gradient({x, total, gx, gy, gz, d}, table.data(), 0, count, outputs, sum);
    Buffer<C> again(all);
    kernel.logits_gradient({x, total, gx, gy, gz, x}, table.data(), 0, count, outputs, again);
    CHECK(x.equals(d) && again.equals(sum), "%s: in place", Type<C>::name);
  }
  auto results() { return std::tie(px, py, pz, d, sum); }
};

void logits(int64_t n, bool hat, int64_t durations) {
  INFO("logits ", n, ", hat ", hat, ", durations ", durations);
  const cpu::JoinerOutputs outputs{n, durations, n / 2, hat, n + durations};
  Logits<float> c{outputs};
  Logits<double> exact{outputs, rounded<float>};
  c.run(), exact.run();
  expect_like<float>(c.results(), exact.results(), 100);
}

// Scores and the gradient of one row of given logits.
template <typename T>
void given_logits(int64_t n, bool hat) {
  const auto& kernel = cpu::kernels<cpu::JoinerKernels<T>>();
  const auto& in_double = cpu::kernels<cpu::JoinerKernels<double>>();
  const int64_t blank = n / 2;
  INFO("given logits ", n, ", hat ", hat);
  Random random(static_cast<uint64_t>(2 * n + hat) + 7);
  Buffer<T> x(n, 0, random, 3);
  Buffer<double> wide(n);
  for (int64_t j = 0; j < n; j++) wide[j] = value(x[j]);
  for (const int64_t symbol : {int64_t{0}, blank, n - 1}) {
    Buffer<compute_t<T>> px(1), py(1), total(1);
    Buffer<double> exact_px(1), exact_py(1), exact_total(1);
    kernel.row_scores(x, n, symbol, blank, hat, px, py, total);
    in_double.row_scores(wide, n, symbol, blank, hat, exact_px, exact_py, exact_total);
    expect_like<T>(std::tie(px, py, total), std::tie(exact_px, exact_py, exact_total), 100);
    Buffer<T> d(n), same(n);
    Buffer<double> exact(n);
    kernel.row_gradient(x, total[0], 0.75, -1.25, n, symbol, blank, hat, d);
    in_double.row_gradient(wide, exact_total[0], 0.75, -1.25, n, symbol, blank, hat, exact);
    expect_like<T>("gradient", d, exact, 100);
    for (int64_t j = 0; j < n; j++) same[j] = x[j];
    kernel.row_gradient(same, total[0], 0.75, -1.25, n, symbol, blank, hat, same);
    CHECK(same.equals(d), "symbol %ld: in place", long(symbol));
    same.set(std::numeric_limits<double>::quiet_NaN());
    kernel.row_gradient(same, std::numeric_limits<float>::quiet_NaN(), 0, 0, n, symbol, blank, hat, same);
    for (int64_t j = 0; j < n; j++) CHECK(same(j) == 0, "symbol %ld: a row without gradients", long(symbol));
  }
}

// Where the largest given logit is infinite, L is it, unless a NaN is among them; a HAT's blank does not count.
void infinite() {
  const auto& kernel = cpu::kernels<cpu::JoinerKernels<float>>();
  const float inf = std::numeric_limits<float>::infinity(), nan = cpu::from_bits(0x7fffffff);
  const float rows[][3] = {{inf, 1, -inf}, {-inf, -inf, -inf}, {inf, nan, 1}, {-inf, -inf, nan}};
  const float expected[] = {inf, -inf, nan, nan}, hats[] = {inf, -inf, nan, -inf};
  for (int i = 0; i < 4; i++)
    for (const bool hat : {false, true}) {
      const float want = hat ? hats[i] : expected[i];
      float px, py, total;
      kernel.row_scores(rows[i], 3, 1, 2, hat, &px, &py, &total);
      CHECK(total == want || (std::isnan(total) && std::isnan(want)), "row %d, hat %d: %g", i, hat, double(total));
      CHECK(std::isnan(px) == (i != 0), "row %d, hat %d: %g", i, hat, double(px));
    }
}

// A NaN among the logits shows in the whole row, and a symbol outside the vocabulary as NaN; one output is certain.
void special() {
  const auto& kernel = cpu::kernels<cpu::JoinerKernels<float>>();
  const float nan = cpu::from_bits(0x7fffffff), x[] = {1, nan, 2, 3, 0.5f, -4};
  const JoinerRow table[] = {{0, 0, 0, 0}, {1, 0, 0, JoinerRow::kUnknown}};
  float px[2], py[2];
  double total[2];
  kernel.scores(x, table, 0, 2, {3, 0, 2, false, 3}, {px, py, total, nullptr});
  CHECK(std::isnan(px[0]) && std::isnan(py[0]), "a NaN logit");
  CHECK(std::isnan(px[1]) && std::isfinite(py[1]), "an unknown symbol");
  const JoinerRow one[] = {{0, 0, 0, 0}};
  const float gx = 0.7f, gy = 0.4f;
  float d, sum;
  kernel.scores(x + 3, one, 0, 1, {1, 0, 0, false, 1}, {px, py, total, nullptr});
  kernel.logits_gradient({x + 3, total, &gx, &gy, nullptr, &d}, one, 0, 1, {1, 0, 0, false, 1}, &sum);
  CHECK(px[0] == 0 && py[0] == 0 && d == 0 && sum == 0, "one output");
}

template <typename C>
void hidden_gradient(int64_t n) {
  const auto& kernel = cpu::kernels<cpu::JoinerKernels<C>>();
  INFO("hidden gradient ", n);
  Random random(static_cast<uint64_t>(n) + 5);
  Buffer<C> dh(4 * n, 0, random), h(4 * n, 0, random, 0.3), dam(2 * n), dlm(2 * n);
  const JoinerRow table[] = {{0, 0, 1, 0}, {1, 0, 0, 0}, {2, 1, 1, 0}, {3, 1, 0, 0}};
  for (const bool tanh : {true, false}) {
    dam.set(1), dlm.set(1);
    kernel.hidden_gradient(dh, h, table, 4, 0, n / 2, n, tanh, dam, dlm);
    kernel.hidden_gradient(dh, h, table, 4, n / 2, n, n, tanh, dam, dlm);
    const auto da = [&](int64_t row, int64_t j) -> long double {
      const long double y = h[row * n + j], g = dh[row * n + j];
      return tanh ? g * (1 - y * y) : (y > 0 ? g : 0);
    };
    for (int64_t j = 0; j < n; j++) {
      EXPECT(dam, j, 1 + da(0, j) + da(1, j), 20);
      EXPECT(dam, n + j, 1 + da(2, j) + da(3, j), 20);
      EXPECT(dlm, n + j, 1 + da(0, j) + da(2, j), 20);
      EXPECT(dlm, j, 1 + da(1, j) + da(3, j), 20);
    }
  }
}

}  // namespace

TEST_CASE("rnnt_joiner") {
  rows();
  special();
  infinite();
  for_each_type([&]<typename T>() {
    for (const int64_t n : kSizes) {
      hidden<T>(n);
      for (const bool hat : {false, true})
        if (n > hat) given_logits<T>(n, hat);
    }
  });
  for (const int64_t n : kSizes) {
    hidden_gradient<float>(n), hidden_gradient<double>(n);
    dropout<float>(n), dropout<double>(n);
    for (const bool hat : {false, true})
      if (n > hat) logits(n, hat, 0);
    if (n) logits(n, false, 5), logits(n, false, 1);
  }
}

}  // namespace fastasr::test
