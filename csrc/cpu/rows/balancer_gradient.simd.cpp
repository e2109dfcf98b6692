// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/balancer_gradient.h"

#include <algorithm>

namespace fastasr::cpu {
namespace {

// This many columns at a time: the sums of 16 rows stay in the first-level cache. A run adds this many elements per
// chain.
constexpr int64_t kColumns = 512, kChain = 256;

template <typename C>
FASTASR_INLINE C magnitude(C v) {
  return v < 0 ? -v : v;
}

template <typename T>
void sums_rows(const T* __restrict x, int64_t stride, const compute_t<T>* __restrict shift, double* __restrict s1,
               double* __restrict s2, int64_t rows, int64_t channels) {
  using C = compute_t<T>;
  C a1[kColumns], a2[kColumns];
  for (int64_t c = 0; c < channels; c++) s1[c] = s2[c] = 0;
  for (int64_t first = 0; first < channels; first += kColumns) {
    const int64_t n = std::min(kColumns, channels - first);
    const C* sh = shift + first;
    for (int64_t r = 0; r < rows; r += 16) {
      for (int64_t j = 0; j < n; j++) a1[j] = a2[j] = 0;
      for (int64_t i = r; i < std::min(r + 16, rows); i++) {
        const T* row = x + i * stride + first;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
          const C d = load(row[j]) - sh[j];
          a1[j] += d;
          a2[j] += d * d;
        }
      }
#pragma omp simd
      for (int64_t j = 0; j < n; j++) {
        s1[first + j] += static_cast<double>(a1[j]);
        s2[first + j] += static_cast<double>(a2[j]);
      }
    }
  }
}

template <typename T>
void sums_run(const T* __restrict x, compute_t<T> shift, double* __restrict s1, double* __restrict s2, int64_t n) {
  using C = compute_t<T>;
  double t1 = 0, t2 = 0;
  for (int64_t first = 0; first < n; first += kChain) {
    const int64_t last = std::min(first + kChain, n);
    C a1 = 0, a2 = 0;
#pragma omp simd reduction(+ : a1, a2)
    for (int64_t i = first; i < last; i++) {
      const C d = load(x[i]) - shift;
      a1 += d;
      a2 += d * d;
    }
    t1 += static_cast<double>(a1), t2 += static_cast<double>(a2);
  }
  *s1 = t1, *s2 = t2;
}

template <typename T>
void apply_rows(const T* __restrict grad, const T* __restrict x, int64_t stride, const compute_t<T>* __restrict shift,
                const compute_t<T>* __restrict offset, const compute_t<T>* __restrict slope, T* __restrict y,
                int64_t rows, int64_t channels) {
  using C = compute_t<T>;
  for (int64_t r = 0; r < rows; r++, grad += channels, x += stride, y += channels) {
#pragma omp simd
    for (int64_t j = 0; j < channels; j++) {
      const C g = load(grad[j]);
      store(&y[j], g + magnitude(g) * (offset[j] + slope[j] * (load(x[j]) - shift[j])));
    }
  }
}

template <typename T>
void apply_run(const T* __restrict grad, const T* __restrict x, compute_t<T> shift, compute_t<T> offset,
               compute_t<T> slope, T* __restrict y, int64_t n) {
  using C = compute_t<T>;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const C g = load(grad[i]);
    store(&y[i], g + magnitude(g) * (offset + slope * (load(x[i]) - shift)));
  }
}

}  // namespace

FASTASR_KERNELS(BalancerKernels, .sums_rows = sums_rows<T>, .sums_run = sums_run<T>, .apply_rows = apply_rows<T>,
                .apply_run = apply_run<T>)

}  // namespace fastasr::cpu
