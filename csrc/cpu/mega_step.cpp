// SPDX-License-Identifier: Apache-2.0
#include "cpu/mega_step.h"

#include <algorithm>
#include <cmath>

#include "cpu/elementary.h"
#include "cpu/skinny_gemm.h"

namespace fastasr::cpu {
namespace {

constexpr int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

FASTASR_INLINE float sigmoid(float x) {
  const float u = exp_nonpositive(-std::fabs(x));
  return (x > 0 ? 1.0f : u) / (1.0f + u);
}
FASTASR_INLINE float silu(float x) { return x * sigmoid(x); }

// y = (x - mean) / sqrt(variance + eps) scale + bias, the sums in double.
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
FASTASR_INLINE void average(const float* __restrict input, const float* __restrict decay,
                            const float* __restrict projection, const float* __restrict residual,
                            const float* __restrict x, const float* state, float* next, float* __restrict y,
                            int64_t channels, int64_t any_orders) {
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

FASTASR_CLONES void silu_panel(float* y, int64_t stride, int64_t rows) {
  for (int64_t r = 0; r < rows; r++, y += stride) {
#pragma omp simd
    for (int64_t c = 0; c < kPanelColumns; c++) y[c] = silu(y[c]);
  }
}

FASTASR_CLONES void average_row(const float* input, const float* decay, const float* projection, const float* residual,
                                const float* x, const float* state, float* next, float* y, int64_t channels,
                                int64_t orders) {
  if (orders == 4)
    average<4>(input, decay, projection, residual, x, state, next, y, channels, orders);
  else
    average<0>(input, decay, projection, residual, x, state, next, y, channels, orders);
}

}  // namespace

MegaLayout::MegaLayout(const MegaShape& s) : shape(s) {
  const int64_t average_size = s.size * s.orders;
  const int64_t sizes[kMegaVectors] = {average_size, average_size, average_size, s.size, s.key,  s.key,  s.key,
                                       s.key,        s.size,       s.size,       1,      s.size, s.size, 1};
  const int64_t in[kMegaProducts] = {s.size, s.size, s.size, s.size, s.size, s.value, s.size, s.inner};
  const int64_t out[kMegaProducts] = {s.value, s.size, s.key, s.value, s.size, s.size, s.inner, s.size};
  int64_t at = 0;
  for (int i = 0; i < kMegaVectors; i++) {
    vector[i] = at, vector_size[i] = sizes[i];
    at += aligned(sizes[i]);
  }
  for (int i = 0; i < kMegaProducts; i++) {
    inputs[i] = in[i], outputs[i] = out[i], stride[i] = panel_count(out[i]) * kPanelColumns;
    bias[i] = at;
    at += stride[i];
  }
  for (int i = 0; i < kMegaProducts; i++) {
    weight[i] = at;
    at += packed_size(out[i], in[i]);
  }
  block = at;
  final_scale = s.blocks * block;
  final_bias = final_scale + aligned(s.size);
  final_eps = final_bias + aligned(s.size);
  total = final_eps + aligned(1);
}

void mega_pack_block(const MegaLayout& l, const MegaParameters& p, float* block) {
  const MegaShape& s = l.shape;
  const auto logistic = [](float x) { return 1 / (1 + std::exp(-static_cast<double>(x))); };
  const double scaling = std::sqrt(1.0 / static_cast<double>(s.orders));
  for (int64_t i = 0; i < s.size * s.orders; i++) {
    const double damping = logistic(p.damping[i]);
    block[l.vector[kMegaInput] + i] = static_cast<float>(damping * static_cast<double>(p.expansion[i]));
    block[l.vector[kMegaDecay] + i] = static_cast<float>(1 - damping * logistic(p.decay[i]));
    block[l.vector[kMegaProjection] + i] = static_cast<float>(scaling * static_cast<double>(p.projection[i]));
  }
  const auto copy = [&](MegaVector to, const float* from, double factor, float missing) {
    for (int64_t i = 0; i < l.vector_size[to]; i++)
      block[l.vector[to] + i] = from ? static_cast<float>(factor * static_cast<double>(from[i])) : missing;
  };
  const double root = 1 / std::sqrt(static_cast<double>(s.key));
  copy(kMegaResidual, p.residual, 1, 0);
  copy(kMegaQueryScale, p.qk_weight, root, 0);
  copy(kMegaQueryBias, p.qk_bias, root, 0);
  copy(kMegaKeyScale, p.qk_weight + s.key, 1, 0);
  copy(kMegaKeyBias, p.qk_bias + s.key, 1, 0);
  copy(kMegaNormScale, p.norm_weight, 1, 1);
  copy(kMegaNormBias, p.norm_bias, 1, 0);
  copy(kMegaNormEps, &p.norm_eps, 1, 0);
  copy(kMegaOuterNormScale, p.outer_norm_weight, 1, 1);
  copy(kMegaOuterNormBias, p.outer_norm_bias, 1, 0);
  copy(kMegaOuterNormEps, &p.outer_norm_eps, 1, 0);

  const auto product = [&](MegaProduct to, const float* weight, const float* bias) {
    const int64_t n = l.outputs[to], k = l.inputs[to];
    pack_panels(weight, n, k, k, WeightFormat::fp32, block + l.weight[to], nullptr, 0, panel_count(n));
    for (int64_t i = 0; i < l.stride[to]; i++) block[l.bias[to] + i] = bias && i < n ? bias[i] : 0.0f;
  };
  product(kMegaV, p.v_weight, p.v_bias);
  int64_t row = 0;
  for (const MegaProduct part : {kMegaU, kMegaZ, kMegaR, kMegaHx}) {
    product(part, p.mx_weight + row * s.size, p.mx_bias ? p.mx_bias + row : nullptr);
    row += l.outputs[part];
  }
  product(kMegaH, p.h_weight, p.h_bias);
  product(kMegaI, p.inner_weight, p.inner_bias);
  product(kMegaO, p.outer_weight, p.outer_bias);
}

void mega_pack_final(const MegaLayout& l, const float* weight, const float* bias, float eps, float* arena) {
  for (int64_t i = 0; i < l.shape.size; i++) {
    arena[l.final_scale + i] = weight ? weight[i] : 1.0f;
    arena[l.final_bias + i] = bias ? bias[i] : 0.0f;
  }
  arena[l.final_eps] = eps;
}

void run_products(const Product* products, int64_t count, int64_t rows, int64_t begin, int64_t end) {
  int64_t first = 0;
  for (int64_t i = 0; i < count; first += products[i].panels, i++) {
    const Product& p = products[i];
    const int64_t from = std::max<int64_t>(begin - first, 0), to = std::min(end - first, p.panels);
    for (int64_t panel = from; panel < to; panel++) {
      skinny_gemm(p.x, p.x_stride, rows, p.inputs, {p.packed}, p.bias, p.y, p.y_stride, panel, panel + 1);
      if (p.silu) silu_panel(p.y + panel * kPanelColumns, p.y_stride, rows);
    }
  }
}

void mega_average(const MegaLayout& l, const float* block, const float* x, const float* state, float* next, float* y,
                  int64_t stride, int64_t rows) {
  const int64_t size = l.shape.size * l.shape.orders;
  for (int64_t r = 0; r < rows; r++)
    average_row(block + l.vector[kMegaInput], block + l.vector[kMegaDecay], block + l.vector[kMegaProjection],
                block + l.vector[kMegaResidual], x + r * stride, state ? state + r * size : nullptr, next + r * size,
                y + r * stride, l.shape.size, l.shape.orders);
}

FASTASR_CLONES void mega_query_key(const MegaLayout& l, const float* block, const float* z, float* query, float* key) {
  const float *q0 = block + l.vector[kMegaQueryScale], *q1 = block + l.vector[kMegaQueryBias];
  const float *k0 = block + l.vector[kMegaKeyScale], *k1 = block + l.vector[kMegaKeyBias];
#pragma omp simd
  for (int64_t i = 0; i < l.shape.key; i++) {
    query[i] = z[i] * q0[i] + q1[i];
    key[i] = z[i] * k0[i] + k1[i];
  }
}

FASTASR_CLONES void mega_attention(const MegaLayout& l, const float* __restrict query, const float* __restrict keys,
                                   int64_t key_stride, const float* __restrict values, int64_t value_stride,
                                   int64_t length, const float* __restrict bias, const float* __restrict gate,
                                   float* __restrict scores, float* __restrict out) {
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

FASTASR_CLONES void mega_gated_norm(float* __restrict x, const float* __restrict u, const float* __restrict hx,
                                    const float* __restrict h, const float* __restrict scale,
                                    const float* __restrict bias, float eps, int64_t channels) {
#pragma omp simd
  for (int64_t i = 0; i < channels; i++) x[i] = x[i] + sigmoid(u[i]) * (silu(hx[i] + h[i]) - x[i]);
  normalize(x, scale, bias, eps, x, channels);
}

FASTASR_CLONES void mega_norm(const float* x, const float* y, const float* scale, const float* bias, float eps,
                              float* out, int64_t channels) {
  if (y) {
#pragma omp simd
    for (int64_t i = 0; i < channels; i++) out[i] = x[i] + y[i];
    normalize(out, scale, bias, eps, out, channels);
  } else {
    normalize(x, scale, bias, eps, out, channels);
  }
}

}  // namespace fastasr::cpu
