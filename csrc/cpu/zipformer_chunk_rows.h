// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/zipformer_chunk.h"

// The parts of a chunk's step between the matrix products. Each element is computed with the same operations whatever
// the rows and columns beside it.
namespace fastasr::cpu {

// s[i][j] = q[i] . keys[.][j] + p[i] . positions[.][frames - 1 - i + j] for `frames` queries and `keys` keys, computed
// for whole vectors of keys. keys (query, capacity), positions (pos, stride).
struct ChunkScores {
  const float *q, *p;
  int64_t row_stride;  // of q and p
  int64_t frames, keys, query, pos;
  const float* transposed;
  int64_t capacity;
  const float* positions;
  int64_t position_stride;
  float* scores;  // (frames, round_up(keys, kChunkLanes))
};
void chunk_scores(const ChunkScores& a);

// Softmax over the first `keys` of each row; before, the first `unseen` scores and those where `masked`, if not null,
// is nonzero are set to -1000.
void chunk_softmax(float* scores, int64_t stride, int64_t rows, int64_t unseen, const uint8_t* masked, int64_t keys);

// out[i][c] = sum_j weights[i][j] values[j][c] for `columns` <= kChunkLanes columns. A row of values holds kChunkLanes.
void chunk_weighted(const float* weights, int64_t weight_stride, int64_t rows, int64_t keys, const float* values,
                    int64_t value_stride, float* out, int64_t out_stride, int64_t columns);

// out = v tanh(s);  out = x sigmoid(s);  out *= y;  over n elements.
void chunk_tanh_gate(const float* v, const float* s, float* out, int64_t n);
void chunk_sigmoid_gate(const float* x, const float* s, float* out, int64_t n);
void chunk_multiply(const float* y, float* out, int64_t n);
// x += y
void chunk_add(const float* y, float* x, int64_t n);

// One stripe of kChunkLanes channels of the chunk-causal depthwise convolution. u: `pad` frames before the chunk, then
// the chunk, `stride` apart; the tables at the stripe's first channel.
struct ChunkConvStripe {
  const float* u;
  int64_t stride, frames, pad;
  const float *causal, *causal_bias, *chunkwise, *chunkwise_bias, *scale;
  int64_t table_stride;
  float* out;
  int64_t out_stride, columns;
};
void chunk_convolution(const ChunkConvStripe& a);

// The first convolution, 3 x 3 with zeros beside the bins, and SwooshR's input: three rows of features of which each
// bin is repeated `maps` times, (bins + 2) maps with zeros at both ends; weight (9, stride), out (bins maps).
void chunk_first_convolution(const float* const* rows, const float* weight, int64_t stride, const float* bias,
                             int64_t maps, float* out, int64_t n);

// y[t] = sum_i weight[i] x[factor t + i], rows of n elements `stride` apart.
void chunk_downsample(const float* x, int64_t stride, const float* weight, int64_t factor, float* y, int64_t rows,
                      int64_t y_stride, int64_t n);
// x[t] += (y[t / factor] - x[t]) scale
void chunk_combine(float* x, const float* y, const float* scale, int64_t factor, int64_t rows, int64_t stride);

// y = x Wᵀ + bias for `rows` rows of x, on the workers.
void chunk_product(const ChunkStep& step, const ChunkProduct& p, const float* x, int64_t x_stride, int64_t rows,
                   float* y, int64_t y_stride);

}  // namespace fastasr::cpu
