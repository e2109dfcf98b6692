// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv_spatial_gate.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/activation.h"
#include "cpu/instruction_sets.h"

#define FASTASR_BODY "cpu/conv_spatial_gate_stripes.h"
#include "cpu/each_instruction_set.h"

namespace fastasr::cpu {
namespace {

template <typename T, typename C = compute_t<T>>
FASTASR_INLINE void statistics_body(const ConvSpatialGate<T>& p, RowStatistics<C>* statistics, int64_t begin,
                                    int64_t end, C* __restrict scratch) {
  for (int64_t i = begin; i < end; i++) {
    const T* __restrict g = p.gate(i);
#pragma omp simd
    for (int64_t j = 0; j < p.channels; j++) scratch[j] = load(g[j]);
    statistics[i] = centre(scratch, p.channels, p.eps);
  }
}

// Chains of kTerms terms in the compute type, then double.
constexpr int64_t kTerms = 256;

template <typename T, typename C = compute_t<T>>
FASTASR_INLINE void norm_backward_body(const ConvSpatialGate<T>& p, const RowStatistics<C>* statistics, const C* du,
                                       int64_t du_row, T* dx, C* __restrict dweight, C* __restrict dbias, int64_t begin,
                                       int64_t end) {
  const int64_t n = p.channels;
  const C* __restrict w = p.norm_weight;
  for (int64_t j = 0; j < n; j++) dweight[j] = 0, dbias[j] = 0;
  for (int64_t i = begin; i < end; i++) {
    const T* __restrict g = p.gate(i);
    const C* d = du + i * du_row;  // may be where the result goes
    T* out = dx + i * 2 * n + n;
    if (p.mask && p.mask[i]) {
      for (int64_t j = 0; j < n; j++) store(&out[j], C(0));
      continue;
    }
    const C high = statistics[i].high, low = statistics[i].low, scale = statistics[i].scale;
    double sum = 0, product = 0;
    for (int64_t first = 0; first < n; first += kTerms) {
      const int64_t last = std::min(first + kTerms, n);
      C a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
      for (int64_t j = first; j < last; j++) {
        const C nj = ((load(g[j]) - high) - low) * scale, dj = d[j] * w[j];
        dweight[j] += d[j] * nj;
        dbias[j] += d[j];
        a += dj;
        b += dj * nj;
      }
      sum += static_cast<double>(a), product += static_cast<double>(b);
    }
    const C mean = static_cast<C>(sum / static_cast<double>(n)),
            along = static_cast<C>(product / static_cast<double>(n));
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
      const C nj = ((load(g[j]) - high) - low) * scale;
      store(&out[j], (d[j] * w[j] - mean - nj * along) * scale);
    }
  }
}

}  // namespace

#define FASTASR_DEFINE(T)                                                                                          \
  FASTASR_CLONES void conv_spatial_gate_statistics(const ConvSpatialGate<T>& p,                                    \
                                                   RowStatistics<compute_t<T>>* statistics, int64_t begin,         \
                                                   int64_t end, compute_t<T>* scratch) {                           \
    statistics_body<T>(p, statistics, begin, end, scratch);                                                        \
  }                                                                                                                \
  void conv_spatial_gate_forward(const ConvSpatialGate<T>& p, const RowStatistics<compute_t<T>>* statistics, T* y, \
                                 int64_t begin, int64_t end) {                                                     \
    FASTASR_DISPATCH(gate_forward(p, statistics, y, begin, end));                                                  \
  }                                                                                                                \
  void conv_spatial_gate_backward(const ConvSpatialGate<T>& p, const RowStatistics<compute_t<T>>* statistics,      \
                                  const T* grad, T* dx, compute_t<T>* du, int64_t du_row, compute_t<T>* dweight,   \
                                  compute_t<T>* dbias, int64_t begin, int64_t end) {                               \
    FASTASR_DISPATCH(gate_backward(p, statistics, grad, dx, du, du_row, dweight, dbias, begin, end));              \
  }                                                                                                                \
  FASTASR_CLONES void conv_spatial_gate_norm_backward(                                                             \
      const ConvSpatialGate<T>& p, const RowStatistics<compute_t<T>>* statistics, const compute_t<T>* du,          \
      int64_t du_row, T* dx, compute_t<T>* dnorm_weight, compute_t<T>* dnorm_bias, int64_t begin, int64_t end) {   \
    norm_backward_body<T>(p, statistics, du, du_row, dx, dnorm_weight, dnorm_bias, begin, end);                    \
  }

FASTASR_DEFINE(float)
FASTASR_DEFINE(double)
FASTASR_DEFINE(bfloat16)
FASTASR_DEFINE(float16)

}  // namespace fastasr::cpu
