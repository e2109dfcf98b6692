// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/few_queries.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

struct Problem {
  int64_t queries, keys, key_dim, value_dim, q_row = key_dim + 3, k_row = key_dim + 2, v_row = value_dim + 1,
                                             y_row = value_dim + 5;
  Random random{static_cast<uint64_t>(queries * 977 + keys * 31 + key_dim)};
  Buffer<float> q{queries * q_row, 2, random}, k{keys * k_row, 1, random}, v{keys * v_row, 1, random},
      y{queries * y_row, 2}, weights{queries * (keys + 2), 2};
  Buffer<float> mask{queries * (keys + 1), 1, random};
  float scale = 0.3f;
  bool masked = false;

  void run() {
    cpu::FewQueries a{q, q_row, k, k_row, v, v_row, y, y_row, queries, keys, key_dim, value_dim, scale};
    if (masked) a.mask = mask, a.mask_row = keys + 1;
    if (keys % 2) a.weights = weights, a.weights_row = keys + 2;
    Buffer<float> scratch(a.scratch());
    cpu::kernels<cpu::FewQueriesKernels>().attend(a, scratch);
  }
  long double score(int64_t i, int64_t j) {
    long double sum = 0;
    for (int64_t c = 0; c < key_dim; c++) sum += static_cast<long double>(q(i * q_row + c)) * k(j * k_row + c);
    return scale * sum + (masked ? mask(i * (keys + 1) + j) : 0);
  }
};

void attention(int64_t queries, int64_t keys, int64_t key_dim, int64_t value_dim, bool masked = false) {
  INFO(queries, " queries, ", keys, " keys, ", key_dim, " and ", value_dim, " channels");
  Problem p{queries, keys, key_dim, value_dim};
  p.masked = masked;
  for (int64_t i = 0; i < queries * (keys + 1); i += 3) p.mask[i] = -INFINITY;
  p.run();
  for (int64_t i = 0; i < queries; i++) {
    std::vector<long double> weights;
    long double top = -INFINITY, sum = 0;
    for (int64_t j = 0; j < keys; j++) top = std::max(top, p.score(i, j));
    const bool none = top == -INFINITY;
    for (int64_t j = 0; j < keys; j++) sum += weights.emplace_back(none ? 0 : std::exp(p.score(i, j) - top));
    if (none) sum = 1;
    for (int64_t j = 0; j < keys + 2; j++) {
      const int64_t at = i * (keys + 2) + j;
      if (keys % 2 && j < keys)
        EXPECT_WITHIN(p.weights, at, static_cast<double>(weights[static_cast<size_t>(j)] / sum), 0x1p-18L);
      else
        CHECK(p.weights.unset(at), "wrote behind the weights, or without being asked");
    }
    for (int64_t c = 0; c < p.y_row; c++) {
      if (c >= value_dim) {
        CHECK(p.y.unset(i * p.y_row + c), "wrote behind the channels");
        continue;
      }
      Sum expected;
      for (int64_t j = 0; j < keys; j++)
        expected.add(static_cast<double>(weights[static_cast<size_t>(j)] / sum) * p.v(j * p.v_row + c));
      EXPECT_WITHIN(p.y, i * p.y_row + c, expected.value, expected.size * 0x1p-18L);
    }
  }
}

// A NaN reaches the query that meets it, and large scores do not overflow.
void extremes() {
  Problem p{3, 40, 16, 16};
  for (int64_t c = 0; c < p.key_dim; c++) p.q[p.q_row + c] = NAN, p.q[2 * p.q_row + c] = 1e18f;
  p.run();
  CHECK(std::isfinite(p.y(0)), "another query's NaN");
  CHECK(std::isnan(p.y(p.y_row)), "a NaN is lost");
  CHECK(std::isfinite(p.y(2 * p.y_row)), "large scores");
  p.masked = true;
  for (int64_t i = 0; i < 3 * (p.keys + 1); i++) p.mask[i] = -INFINITY;
  p.run();
  CHECK(p.y(0) == 0, "no key is seen");
  CHECK(std::isnan(p.y(p.y_row)), "a NaN is lost behind a mask");
}

}  // namespace

TEST_CASE("few_queries") {
  for (const int64_t queries : {1, 2, 5, 7, 15})
    for (const int64_t keys : {1, 5, 8, 33, 300})
      for (const int64_t dim : {1, 16, 64, 70}) attention(queries, keys, dim, dim);
  for (const int64_t keys : {1, 2, 129}) attention(4, keys, 24, 80, true);
  extremes();
}

}  // namespace fastasr::test
