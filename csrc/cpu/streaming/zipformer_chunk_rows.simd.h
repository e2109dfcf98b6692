// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/math/activation.h"
#include "cpu/math/elementary.h"
#include "cpu/streaming/zipformer_chunk.h"

// The parts of a chunk's step between the matrix products. Each element is computed with the same operations whatever
// the rows and columns beside it.
namespace fastasr::cpu {
inline namespace FASTASR_SIMD {

constexpr int64_t kLanes = kChunkLanes;
constexpr float kMasked = -1000;
// A worker reads at least this many weights: with fewer, waking it takes longer.
constexpr int64_t kLeastWeights = 32768;

// Computes s[i][j] = q[i] . keys[.][j] + p[i] . positions[.][frames - 1 - i + j] for `frames` queries and `keys` keys,
// computed for whole vectors of keys. keys (query, capacity), positions (pos, stride).
struct ChunkScores {
  const float *q, *p;
  int64_t row_stride;  // stride of q and p
  int64_t frames, keys, query, pos;
  const float* transposed;
  int64_t capacity;
  const float* positions;
  int64_t position_stride;
  float* scores;  // (frames, round_up(keys, kChunkLanes))
};

// Each number of rows has its own function: several tiles inlined into one function would spill.
template <int kRows>
__attribute__((noinline)) void score_tile(const ChunkScores& a, int64_t first) {
  const int64_t padded = round_up(a.keys, kLanes);
  const float* __restrict q = a.q + first * a.row_stride;
  const float* __restrict p = a.p + first * a.row_stride;
  const float* __restrict shifted = a.positions + a.frames - 1 - first;
  float* __restrict out = a.scores + first * padded;
  for (int64_t j = 0; j < padded; j += kLanes) {
    float sum[kRows][kLanes];
    for (int i = 0; i < kRows; i++)
      for (int c = 0; c < kLanes; c++) sum[i][c] = 0;
    for (int64_t d = 0; d < a.query; d++) {
      const float* __restrict key = a.transposed + d * a.capacity + j;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; i++) {
        const float s = q[i * a.row_stride + d];
#pragma omp simd
        for (int c = 0; c < kLanes; c++) sum[i][c] += s * key[c];
      }
    }
    for (int64_t d = 0; d < a.pos; d++) {
      const float* __restrict relative = shifted + d * a.position_stride + j;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; i++) {
        const float s = p[i * a.row_stride + d];
#pragma omp simd
        for (int c = 0; c < kLanes; c++) sum[i][c] += s * relative[c - i];
      }
    }
    for (int i = 0; i < kRows; i++)
#pragma omp simd
      for (int c = 0; c < kLanes; c++) out[i * padded + j + c] = sum[i][c];
  }
}

struct Weighted {
  const float* weights;
  int64_t weight_stride, keys;
  const float* values;
  int64_t value_stride;
  float* out;
  int64_t out_stride, columns;
};

template <int kRows>
__attribute__((noinline)) void weighted_tile(const Weighted& a, int64_t first) {
  const float* __restrict w = a.weights + first * a.weight_stride;
  float* __restrict out = a.out + first * a.out_stride;
  float sum[kRows][kLanes];
  for (int i = 0; i < kRows; i++)
    for (int c = 0; c < kLanes; c++) sum[i][c] = 0;
  for (int64_t j = 0; j < a.keys; j++) {
    const float* __restrict v = a.values + j * a.value_stride;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++) {
      const float s = w[i * a.weight_stride + j];
#pragma omp simd
      for (int c = 0; c < kLanes; c++) sum[i][c] += s * v[c];
    }
  }
  for (int i = 0; i < kRows; i++)
    for (int64_t c = 0; c < a.columns; c++) out[i * a.out_stride + c] = sum[i][c];
}

inline void chunk_scores(const ChunkScores& a) {
  int64_t i = 0;
  for (; i + 8 <= a.frames; i += 8) score_tile<8>(a, i);
  for (; i + 4 <= a.frames; i += 4) score_tile<4>(a, i);
  for (; i + 2 <= a.frames; i += 2) score_tile<2>(a, i);
  for (; i < a.frames; i++) score_tile<1>(a, i);
}

// Computes out[i][c] = sum_j weights[i][j] values[j][c] for `columns` <= kChunkLanes columns. A row of values holds
// kChunkLanes.
inline void chunk_weighted(const float* weights, int64_t weight_stride, int64_t rows, int64_t keys, const float* values,
                           int64_t value_stride, float* out, int64_t out_stride, int64_t columns) {
  const Weighted a{weights, weight_stride, keys, values, value_stride, out, out_stride, columns};
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) weighted_tile<8>(a, i);
  for (; i + 4 <= rows; i += 4) weighted_tile<4>(a, i);
  for (; i + 2 <= rows; i += 2) weighted_tile<2>(a, i);
  for (; i < rows; i++) weighted_tile<1>(a, i);
}

// Applies softmax over the first `keys` of each row, after setting the first `unseen` scores and those where `masked`,
// if not null, is nonzero to -1000.
inline void chunk_softmax(float* scores, int64_t stride, int64_t rows, int64_t unseen, const uint8_t* masked,
                          int64_t keys) {
  for (int64_t r = 0; r < rows; r++) {
    float* __restrict x = scores + r * stride;
    for (int64_t j = 0; j < unseen; j++) x[j] = kMasked;
    if (masked)
      for (int64_t j = 0; j < keys; j++) x[j] = masked[j] ? kMasked : x[j];
    float most = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < keys; j++) most = x[j] > most ? x[j] : most;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < keys; j++) {
      const float e = exp_nonpositive(x[j] - most);
      x[j] = e;
      sum += e;
    }
    const float share = 1 / sum;
#pragma omp simd
    for (int64_t j = 0; j < keys; j++) x[j] *= share;
  }
}

// Computes out = v tanh(s), over n elements.
inline void chunk_tanh_gate(const float* __restrict v, const float* __restrict s, float* __restrict out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] = v[i] * tanh(s[i]);
}

// Computes out = x sigmoid(s).
inline void chunk_sigmoid_gate(const float* __restrict x, const float* __restrict s, float* __restrict out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] = x[i] * sigmoid(s[i]);
}

// out *= y
inline void chunk_multiply(const float* __restrict y, float* __restrict out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] *= y[i];
}

// x += y
inline void chunk_add(const float* __restrict y, float* __restrict x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] += y[i];
}

// One stripe of kChunkLanes channels of the chunk-causal depthwise convolution. u holds `pad` frames before the chunk,
// then the chunk, `stride` apart; the tables start at the stripe's first channel.
struct ChunkConvStripe {
  const float* u;
  int64_t stride, frames, pad;
  const float *causal, *causal_bias, *chunkwise, *chunkwise_bias, *scale;
  int64_t table_stride;
  float* out;
  int64_t out_stride, columns;
};

// Each number of frames has its own function, see score_tile.
template <int kFrames>
__attribute__((noinline)) void convolution_tile(const ChunkConvStripe& a, int64_t t) {
  const int64_t table = a.table_stride, stride = a.stride;
  float past[kFrames][kLanes], around[kFrames][kLanes];
  for (int i = 0; i < kFrames; i++)
    for (int c = 0; c < kLanes; c++) past[i][c] = around[i][c] = 0;
  const float* __restrict u = a.u + t * stride;
  for (int64_t j = 0; j <= a.pad; j++) {
    const float* __restrict w = a.causal + j * table;
#pragma GCC unroll 8
    for (int i = 0; i < kFrames; i++)
#pragma omp simd
      for (int c = 0; c < kLanes; c++) past[i][c] += w[c] * u[(j + i) * stride + c];
  }
  // the frames of the chunk, which lie behind `pad` others, as far as the 2 pad + 1 taps reach
  const auto add = [&](int64_t f, int first, int last) __attribute__((always_inline)) {
    const float* __restrict v = a.u + (a.pad + f) * stride;
#pragma GCC unroll 8
    for (int i = 0; i < kFrames; i++) {
      if (i < first || i > last) continue;
      const float* __restrict w = a.chunkwise + (f - t - i + a.pad) * table;
#pragma omp simd
      for (int c = 0; c < kLanes; c++) around[i][c] += w[c] * v[c];
    }
  };
  constexpr int kLast = kFrames - 1;
  const int64_t all = std::max<int64_t>(0, t + kLast - a.pad), end = std::min(a.frames - 1, t + kLast + a.pad);
  int64_t f = std::max<int64_t>(0, t - a.pad);
  for (; f < std::min(all, a.frames); f++) add(f, 0, static_cast<int>(f - t + a.pad));
  for (; f <= std::min(a.frames - 1, t + a.pad); f++) add(f, 0, kLast);
  for (; f <= end; f++) add(f, static_cast<int>(f - t - a.pad), kLast);
  for (int i = 0; i < kFrames; i++) {
    float* __restrict out = a.out + (t + i) * a.out_stride;
    const float* __restrict scale = a.scale + (t + i) * table;
    for (int64_t c = 0; c < a.columns; c++)
      out[c] = (a.causal_bias[c] + past[i][c]) + (a.chunkwise_bias[c] + around[i][c]) * scale[c];
  }
}

inline void chunk_convolution(const ChunkConvStripe& a) {
  int64_t t = 0;
  for (; t + 4 <= a.frames; t += 4) convolution_tile<4>(a, t);
  for (; t + 2 <= a.frames; t += 2) convolution_tile<2>(a, t);
  for (; t < a.frames; t++) convolution_tile<1>(a, t);
}

// Computes the first convolution, 3 x 3 with zeros beside the bins, and SwooshR's input: three rows of features of
// which each bin is repeated `maps` times, (bins + 2) maps with zeros at both ends; weight (9, stride), out (bins
// maps).
inline void chunk_first_convolution(const float* const* rows, const float* weight, int64_t stride, const float* bias,
                                    int64_t maps, float* __restrict out, int64_t n) {
  const float *a = rows[0], *b = rows[1], *c = rows[2];
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    float sum = 0;
#pragma GCC unroll 3
    for (int64_t k = 0; k < 3; k++) {
      sum += weight[k * stride + i] * a[i + k * maps];
      sum += weight[(3 + k) * stride + i] * b[i + k * maps];
      sum += weight[(6 + k) * stride + i] * c[i + k * maps];
    }
    out[i] = bias[i] + sum;
  }
}

// Computes y[t] = sum_i weight[i] x[factor t + i], rows of n elements `stride` apart.
inline void chunk_downsample(const float* x, int64_t stride, const float* weight, int64_t factor, float* y,
                             int64_t rows, int64_t y_stride, int64_t n) {
  for (int64_t t = 0; t < rows; t++) {
    const float* __restrict in = x + t * factor * stride;
    float* __restrict out = y + t * y_stride;
    for (int64_t i = 0; i < factor; i++) {
      const float w = weight[i];
#pragma omp simd
      for (int64_t c = 0; c < n; c++) out[c] = i ? out[c] + w * in[i * stride + c] : w * in[c];
    }
  }
}

// Computes x[t] += (y[t / factor] - x[t]) scale.
inline void chunk_combine(float* x, const float* y, const float* scale, int64_t factor, int64_t rows, int64_t stride) {
  for (int64_t t = 0; t < rows; t++) {
    float* __restrict out = x + t * stride;
    const float* __restrict in = y + t / factor * stride;
#pragma omp simd
    for (int64_t c = 0; c < stride; c++) out[c] += (in[c] - out[c]) * scale[c];
  }
}

// A product of `rows` rows of x that rounds them; `levels` is memory for the rounded rows.
inline ReducedGemm chunk_reduced(const ChunkStep& step, const ChunkProduct& p, const float* x, int64_t x_stride,
                                 int64_t rows, int32_t* levels, float* y) {
  const int64_t words = reduced_words(p.inputs, p.format), n = p.stride();
  auto* const steps = reinterpret_cast<float*>(levels + rows * words);
  return {x,
          x_stride,
          levels,
          steps,
          levels + rows * (words + 1),
          p.reduced(step.weights, step.vectors),
          step.vectors + p.bias,
          y,
          n,
          rows,
          n,
          p.inputs,
          p.format};
}

// Computes y = x Wᵀ + bias for `rows` rows of x, on the workers. Rows of y have the product's stride.
inline void chunk_product(const ChunkStep& step, const ChunkProduct& p, const float* x, int64_t x_stride, int64_t rows,
                          int32_t* levels, float* y) {
  const int64_t panel = kPanelColumns * p.inputs, panels = panel_count(p.outputs);
  const int64_t least = std::max<int64_t>(1, kLeastWeights / panel);
  if (!p.rounds_inputs)
    return step.workers.split(panels, least, [&](int64_t begin, int64_t end) {
      skinny_gemm(x, x_stride, rows, p.inputs, p.panels(step.weights, step.vectors), step.vectors + p.bias, y,
                  p.stride(), begin, end);
    });
  const auto& kernel = reduced_gemm_kernels(p.format);
  const ReducedGemm whole = chunk_reduced(step, p, x, x_stride, rows, levels, y);
  step.workers.split(rows, std::max<int64_t>(1, kLeastWeights / p.inputs),
                     [&](int64_t begin, int64_t end) { kernel.rows(whole, begin, end); });
  step.workers.split(panels, least, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPanelColumns;
    ReducedGemm g = whole;
    g.weights.words += first * reduced_words(g.k, g.format), g.weights.scale += first, g.weights.sum += first;
    g.bias += first, g.y += first, g.n = (end - begin) * kPanelColumns;
    kernel.products(g, 0, kernel.tasks(g));
  });
}

}  // namespace FASTASR_SIMD
}  // namespace fastasr::cpu
