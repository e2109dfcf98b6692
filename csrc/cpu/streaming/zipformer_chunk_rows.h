// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/streaming/zipformer_chunk.h"

// The operands of a chunk's step between the matrix products, and the parts that tests call by themselves.
namespace fastasr::cpu {

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

// See zipformer_chunk_rows.simd.h.
struct ChunkRows {
  void (*scores)(const ChunkScores& a);
  void (*softmax)(float* scores, int64_t stride, int64_t rows, int64_t unseen, const uint8_t* masked, int64_t keys);
  void (*weighted)(const float* weights, int64_t weight_stride, int64_t rows, int64_t keys, const float* values,
                   int64_t value_stride, float* out, int64_t out_stride, int64_t columns);
  void (*convolution)(const ChunkConvStripe& a);
  void (*downsample)(const float* x, int64_t stride, const float* weight, int64_t factor, float* y, int64_t rows,
                     int64_t y_stride, int64_t n);
  void (*combine)(float* x, const float* y, const float* scale, int64_t factor, int64_t rows, int64_t stride);
};

}  // namespace fastasr::cpu
