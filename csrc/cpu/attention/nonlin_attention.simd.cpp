// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/nonlin_attention.h"

#include "cpu/math/activation.h"

namespace fastasr::cpu {
namespace {

template <typename T>
void gate_row(const T* __restrict p, T* __restrict x, int64_t width) {
#pragma omp simd
  for (int64_t j = 0; j < width; j++) store(&x[j], load(p[width + j]) * tanh(load(p[j])));
}

template <typename T>
void product_row(const T* __restrict a, const T* __restrict b, T* __restrict y, int64_t width) {
#pragma omp simd
  for (int64_t j = 0; j < width; j++) store(&y[j], load(a[j]) * load(b[j]));
}

template <typename T>
void gradient_row(const T* __restrict dx, const T* __restrict grad, const T* __restrict p, const T* __restrict o,
                  T* __restrict dp, int64_t width) {
  using C = compute_t<T>;
#pragma omp simd
  for (int64_t j = 0; j < width; j++) {
    const C s = load(p[j]), d = load(dx[j]);
    C slope;
    const C t = activate<Activation::tanh>(s, &slope);
    store(&dp[j], d * load(p[width + j]) * slope);
    store(&dp[width + j], d * t);
    store(&dp[2 * width + j], load(grad[j]) * load(o[j]));
  }
}

template <typename T>
void gate(const T* p, T* x, const NonlinAttentionRows& rows, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) gate_row(p + r * rows.stride, x + r * rows.width, rows.width);
}

template <typename T>
void product(const T* p, const T* o, T* y, const NonlinAttentionRows& rows, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++)
    product_row(o + rows.batch_major(r), p + r * rows.stride + 2 * rows.width, y + r * rows.width, rows.width);
}

template <typename T>
void operands(const T* grad, const T* p, T* x, T* u, const NonlinAttentionRows& rows, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const T* row = p + r * rows.stride;
    gate_row(row, x + r * rows.width, rows.width);
    product_row(grad + r * rows.width, row + 2 * rows.width, u + r * rows.width, rows.width);
  }
}

template <typename T>
void gradient(const T* dx, const T* grad, const T* p, const T* o, T* dp, const NonlinAttentionRows& rows, int64_t begin,
              int64_t end) {
  for (int64_t r = begin; r < end; r++)
    gradient_row(dx + rows.batch_major(r), grad + r * rows.width, p + r * rows.stride, o + rows.batch_major(r),
                 dp + r * 3 * rows.width, rows.width);
}

}  // namespace

FASTASR_KERNELS(NonlinAttentionKernels, .gate = gate<T>, .product = product<T>, .operands = operands<T>,
                .gradient = gradient<T>)

}  // namespace fastasr::cpu
