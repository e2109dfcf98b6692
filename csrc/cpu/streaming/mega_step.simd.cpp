// SPDX-License-Identifier: Apache-2.0
#include "cpu/streaming/mega_step.h"

#include <algorithm>
#include <cmath>

#include "cpu/gemm/skinny_gemm.h"
#include "cpu/math/activation.h"

namespace fastasr::cpu {
namespace {

FASTASR_INLINE float silu(float x) { return x * sigmoid(x); }

// Computes y = (x - mean) / sqrt(variance + eps) scale + bias, with the sums in double.
FASTASR_INLINE void normalize(const float* x, const float* __restrict scale, const float* __restrict bias, float eps,
                              float* out, int64_t channels) {
  double sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < channels; i++) sum += static_cast<double>(x[i]);
  const double mean = sum / static_cast<double>(channels);
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < channels; i++) {
    const double d = static_cast<double>(x[i]) - mean;
    square += d * d;
  }
  const auto r = static_cast<float>(1 / std::sqrt(square / static_cast<double>(channels) + static_cast<double>(eps)));
  const auto m = static_cast<float>(mean);
#pragma omp simd
  for (int64_t i = 0; i < channels; i++) out[i] = (x[i] - m) * r * scale[i] + bias[i];
}

template <int64_t kOrders>  // 0: any number
void average_row(const float* __restrict input, const float* __restrict decay, const float* __restrict projection,
                 const float* __restrict residual, const float* __restrict x, const float* state, float* next,
                 float* __restrict y, int64_t channels, int64_t any_orders) {
  const int64_t orders = kOrders ? kOrders : any_orders;
  for (int64_t d = 0; d < channels; d++) {
    float sum = 0;
    for (int64_t n = 0; n < orders; n++) {
      const int64_t i = d * orders + n;
      const float h = state ? input[i] * x[d] + decay[i] * state[i] : input[i] * x[d];
      next[i] = h;
      sum += projection[i] * h;
    }
    y[d] = sum + residual[d] * x[d];
  }
#pragma omp simd
  for (int64_t d = 0; d < channels; d++) y[d] = silu(y[d]);
}

void silu_panel(float* y, int64_t stride, int64_t rows) {
  for (int64_t r = 0; r < rows; r++, y += stride) {
#pragma omp simd
    for (int64_t c = 0; c < kPanelColumns; c++) y[c] = silu(y[c]);
  }
}

void products(const Product* all, int64_t count, int64_t rows, int64_t begin, int64_t end) {
  int64_t first = 0;
  for (int64_t i = 0; i < count; first += all[i].panels, i++) {
    const Product& p = all[i];
    const int64_t from = std::max<int64_t>(begin - first, 0), to = std::min(end - first, p.panels);
    for (int64_t panel = from; panel < to; panel++) {
      skinny_gemm(p.x, p.x_stride, rows, p.inputs, {p.packed}, p.bias, p.y, p.y_stride, panel, panel + 1);
      if (p.silu) silu_panel(p.y + panel * kPanelColumns, p.y_stride, rows);
    }
  }
}

void average(const MegaLayout& l, const float* block, const float* x, const float* state, float* next, float* y,
             int64_t stride, int64_t rows) {
  const int64_t size = l.shape.size * l.shape.orders;
  const auto row = l.shape.orders == 4 ? average_row<4> : average_row<0>;
  for (int64_t r = 0; r < rows; r++)
    row(block + l.vector[kMegaInput], block + l.vector[kMegaDecay], block + l.vector[kMegaProjection],
        block + l.vector[kMegaResidual], x + r * stride, state ? state + r * size : nullptr, next + r * size,
        y + r * stride, l.shape.size, l.shape.orders);
}

void query_key(const MegaLayout& l, const float* block, const float* z, float* query, float* key) {
  const float *q0 = block + l.vector[kMegaQueryScale], *q1 = block + l.vector[kMegaQueryBias];
  const float *k0 = block + l.vector[kMegaKeyScale], *k1 = block + l.vector[kMegaKeyBias];
#pragma omp simd
  for (int64_t i = 0; i < l.shape.key; i++) {
    query[i] = z[i] * q0[i] + q1[i];
    key[i] = z[i] * k0[i] + k1[i];
  }
}

void attention(const MegaLayout& l, const float* __restrict query, const float* __restrict keys, int64_t key_stride,
               const float* __restrict values, int64_t value_stride, int64_t length, const float* __restrict bias,
               const float* __restrict gate, float* __restrict scores, float* __restrict out) {
  const int64_t width = l.shape.key, columns = l.shape.value;
  float top = -INFINITY;
  for (int64_t j = 0; j < length; j++) {
    const float* __restrict k = keys + j * key_stride;
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < width; i++) dot += query[i] * k[i];
    scores[j] = dot + bias[j];
    top = std::max(top, scores[j]);
  }
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < length; j++) {
    scores[j] = exp_nonpositive(scores[j] - top);
    sum += scores[j];
  }
  // Rows of values are read in order, eight at a time: eight multiply-adds for each load and store of out.
  for (int64_t c = 0; c < columns; c++) out[c] = 0;
  int64_t j = 0;
  for (; j + 8 <= length; j += 8) {
    const float* __restrict v = values + j * value_stride;
    const float* __restrict w = scores + j;
#pragma omp simd
    for (int64_t c = 0; c < columns; c++) {
      float s = w[0] * v[c];
      s += w[1] * v[value_stride + c];
      s += w[2] * v[2 * value_stride + c];
      s += w[3] * v[3 * value_stride + c];
      s += w[4] * v[4 * value_stride + c];
      s += w[5] * v[5 * value_stride + c];
      s += w[6] * v[6 * value_stride + c];
      s += w[7] * v[7 * value_stride + c];
      out[c] += s;
    }
  }
  for (; j < length; j++) {
    const float* __restrict v = values + j * value_stride;
    const float w = scores[j];
#pragma omp simd
    for (int64_t c = 0; c < columns; c++) out[c] += w * v[c];
  }
  const float scale = 1.0f / sum;
#pragma omp simd
  for (int64_t c = 0; c < columns; c++) out[c] = out[c] * scale * gate[c];
}

void gated_norm(float* __restrict x, const float* __restrict u, const float* __restrict hx, const float* __restrict h,
                const float* __restrict scale, const float* __restrict bias, float eps, int64_t channels) {
#pragma omp simd
  for (int64_t i = 0; i < channels; i++) x[i] = x[i] + sigmoid(u[i]) * (silu(hx[i] + h[i]) - x[i]);
  normalize(x, scale, bias, eps, x, channels);
}

void norm(const float* x, const float* y, const float* scale, const float* bias, float eps, float* out,
          int64_t channels) {
  if (y) {
#pragma omp simd
    for (int64_t i = 0; i < channels; i++) out[i] = x[i] + y[i];
    normalize(out, scale, bias, eps, out, channels);
  } else {
    normalize(x, scale, bias, eps, out, channels);
  }
}

}  // namespace

FASTASR_KERNELS_FLOAT(MegaKernels, .products = products, .average = average, .query_key = query_key,
                      .attention = attention, .gated_norm = gated_norm, .norm = norm)

}  // namespace fastasr::cpu
