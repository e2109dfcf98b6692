// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/few_queries.h"

#include <algorithm>
#include <limits>

#include "cpu/attention/attention_rows.h"
#include "cpu/gemm/gemm.h"
#include "cpu/simd/vectors.simd.h"

namespace fastasr::cpu {
namespace {

constexpr int64_t kLanes = Lanes<float>::count;
// A tile's sums, those of a few queries and vectors of channels, leave registers for a row of values and a weight.
constexpr int64_t kRows = kRegisters == 32 ? 6 : 2, kVectors = 4;

// Weights of some queries and the values of some keys.
struct Part {
  const float* w;
  int64_t w_row;
  const float* v;
  int64_t v_row, keys;
};

// total[i][c] += sum_j w[i][j] v[j][c], for kCount vectors of channels. Each shape has its own function: several tiles
// inlined into one would spill.
template <int64_t kQueries, int64_t kCount>
__attribute__((noinline)) void tile(const Part& p, float* total, int64_t total_row) {
  Vector<float> sum[kQueries][kCount] = {};
  for (int64_t j = 0; j < p.keys; j++) {
    const float* v = p.v + j * p.v_row;
    Vector<float> row[kCount];
#pragma GCC unroll 4
    for (int64_t c = 0; c < kCount; c++) row[c] = at(v + c * kLanes);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kQueries; i++) {
      const Vector<float> weight = vector_of(p.w[i * p.w_row + j]);
#pragma GCC unroll 4
      for (int64_t c = 0; c < kCount; c++) sum[i][c] += weight * row[c];
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kQueries; i++)
#pragma GCC unroll 4
    for (int64_t c = 0; c < kCount; c++) {
      float* const t = total + i * total_row + c * kLanes;
      put(t, at(t) + sum[i][c]);
    }
}

template <int64_t kQueries>
void add_queries(const Part& p, float* total, int64_t channels) {
  int64_t c = 0;
  const auto part = [&] { return Part{p.w, p.w_row, p.v + c, p.v_row, p.keys}; };
  for (; c + kVectors * kLanes <= channels; c += kVectors * kLanes)
    tile<kQueries, kVectors>(part(), total + c, channels);
  for (; c + kLanes <= channels; c += kLanes) tile<kQueries, 1>(part(), total + c, channels);
  for (; c < channels; c++)
    for (int64_t i = 0; i < kQueries; i++) {
      float sum = 0;
      for (int64_t j = 0; j < p.keys; j++) sum += p.w[i * p.w_row + j] * p.v[j * p.v_row + c];
      total[i * channels + c] += sum;
    }
}

template <int64_t kQueries = kRows>
void add_part(int64_t queries, const Part& p, float* total, int64_t channels) {
  if (queries == kQueries) return add_queries<kQueries>(p, total, channels);
  if constexpr (kQueries > 1) add_part<kQueries - 1>(queries, p, total, channels);
}

// scores[i][j] = q_i k_j
void multiply(const FewQueries& a, float* scores, int64_t row) {
  const Gemm<float> g = {a.q, a.q_row, 1, a.k, 1, a.k_row, nullptr, scores, row, a.queries, a.keys, a.key_dim};
  const FewRowsGemm& gemm = kernels<FewRowsGemm>();
  if (const int64_t groups = gemm.groups(g)) return gemm.products(g, 0, groups);
  for (int64_t i = 0; i < a.queries; i++)  // fewer keys than a group of columns
    for (int64_t j = 0; j < a.keys; j++) {
      float sum = 0;
      for (int64_t c = 0; c < a.key_dim; c++) sum += a.q[i * a.q_row + c] * a.k[j * a.k_row + c];
      scores[i * row + j] = sum;
    }
}

void attend(const FewQueries& a, float* scratch) {
  const int64_t row = a.padded_keys();
  float *const weights = scratch, *const total = scratch + a.queries * row;
  multiply(a, weights, row);
  const AttentionRows<float>& rows = kernels<AttentionRows<float>>();
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  float sums[kFewRows];
  for (int64_t i = 0; i < a.queries; i++) {
    float* const w = weights + i * row;
    for (int64_t j = 0; j < a.keys; j++) w[j] *= a.scale;
    if (a.mask)
      for (int64_t j = 0; j < a.keys; j++) w[j] += a.mask[i * a.mask_row + j];
    std::fill(w + a.keys, w + row, kNone);
    const float top = rows.maximum(w, row);
    if (top == kNone && std::all_of(w, w + row, [](float score) { return score == kNone; }))
      std::fill_n(w, row, 0.0f), sums[i] = 1;
    else
      sums[i] = rows.exponentials(w, row, top);
    if (a.weights)
      for (int64_t j = 0; j < a.keys; j++) a.weights[i * a.weights_row + j] = w[j] / sums[i];
  }
  std::fill_n(total, a.queries * a.value_dim, 0.0f);
  for (int64_t j = 0; j < a.keys; j += kFewQueriesChain) {
    const int64_t keys = std::min(kFewQueriesChain, a.keys - j);
    for (int64_t i = 0; i < a.queries; i += kRows)
      add_part(std::min(kRows, a.queries - i), {weights + i * row + j, row, a.v + j * a.v_row, a.v_row, keys},
               total + i * a.value_dim, a.value_dim);
  }
  for (int64_t i = 0; i < a.queries; i++)
    for (int64_t c = 0; c < a.value_dim; c++) a.y[i * a.y_row + c] = total[i * a.value_dim + c] / sums[i];
}

}  // namespace

FASTASR_KERNELS_FLOAT(FewQueriesKernels, .attend = attend)

}  // namespace fastasr::cpu
