// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "cpu/rows/bias_norm.h"
#include "cpu/rows/bypass.h"
#include "cpu/rows/swoosh.h"
#include "cpu/streaming/zipformer_chunk_rows.simd.h"
#include "cpu/streaming/zipformer_chunk_scratch.h"
#include "cpu/streaming/zipformer_layer.h"

namespace fastasr::cpu {
inline namespace FASTASR_SIMD {

// Runs one layer's step: x holds each stream's frames, rows (streams frames, stride).
class Layer {
 public:
  Layer(const ChunkStep& step, const ChunkPlan::Stack& stack, const ChunkLayer& layer)
      : step_(step),
        s_(stack),
        l_(layer),
        rows_(step.streams * stack.frames),
        padded_keys_(round_up(stack.keys, kChunkLanes)),
        room_(step.plan, step.streams, step.scratch) {}

  void run(float* input) {
    input_ = input, x_ = room_.x;
    std::copy(input, input + rows_ * s_.stride, x_);
    run_zipformer_layer(*this);
  }

  // The modules, see run_zipformer_layer. This one appends the keys, and leaves every head's weights in room_.weights.
  void attention_weights() const {
    const ZipformerSizes& n = s_.shape;
    const int64_t stride = l_.scores.stride(), width = n.heads * n.query;
    product(l_.scores, x_, s_.stride, room_.projected);
    step_.workers.split(step_.streams * n.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t stream = i / n.heads, head = i % n.heads;
        const float* const row = room_.projected + stream * s_.frames * stride;
        float* const keys = state(stream) + l_.keys + head * n.query * s_.capacity + behind(stream);
        for (int64_t t = 0; t < s_.frames; t++)
          for (int64_t d = 0; d < n.query; d++)
            keys[d * s_.capacity + s_.left + t] = row[t * stride + width + head * n.query + d];
        float* const w = weights(stream, head);
        chunk_scores({row + head * n.query, row + 2 * width + head * n.pos, stride, s_.frames, s_.keys, n.query, n.pos,
                      keys, s_.capacity, vector(l_.positions) + head * n.pos * l_.positions.stride, l_.positions.stride,
                      w});
        const int64_t missing = step_.plan.shape.left - step_.counters[step_.slots[stream]].processed;
        const int64_t unseen = missing <= 0 ? 0 : (missing + n.factor - 1) / n.factor;
        chunk_softmax(w, padded_keys_, s_.frames, unseen, masked(stream), s_.keys);
      }
    });
  }

  void feed_forward(int i) const {
    product(l_.feed_forward[i].in, x_, s_.stride, room_.projected);
    swoosh(s_.shape.inner[i], l_.feed_forward[i].in.stride(), Swoosh::L);
    product(l_.feed_forward[i].out, room_.hidden, l_.feed_forward[i].in.stride(), room_.y);
    add();
  }

  void nonlin_attention() const {
    const int64_t n = s_.shape.hidden, stride = l_.nonlin.in.stride(), stripes = s_.hidden / kChunkLanes;
    product(l_.nonlin.in, x_, s_.stride, room_.projected);
    step_.workers.split(step_.streams * stripes, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t stream = i / stripes, c = i % stripes * kChunkLanes, columns = std::min(kChunkLanes, n - c);
        const float* const row = room_.projected + stream * s_.frames * stride + c;
        float* const ring = state(stream) + l_.hidden + behind(stream) * s_.hidden + c;
        for (int64_t t = 0; t < s_.frames; t++)
          chunk_tanh_gate(row + t * stride + n, row + t * stride, ring + (s_.left + t) * s_.hidden, columns);
        float* const out = room_.hidden + stream * s_.frames * s_.hidden + c;
        chunk_weighted(weights(stream, 0), padded_keys_, s_.frames, s_.keys, ring, s_.hidden, out, s_.hidden, columns);
        for (int64_t t = 0; t < s_.frames; t++) chunk_multiply(row + t * stride + 2 * n, out + t * s_.hidden, columns);
      }
    });
    product(l_.nonlin.out, room_.hidden, s_.hidden, room_.y);
    add();
  }

  void self_attention(int which) const {
    const ZipformerSizes& n = s_.shape;
    const int64_t stride = l_.attention[which].in.stride(), width = n.heads * n.value;
    const int64_t value = round_up(n.value, kChunkLanes);
    product(l_.attention[which].in, x_, s_.stride, room_.projected);
    step_.workers.split(step_.streams * n.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t stream = i / n.heads, head = i % n.heads;
        const float* const row = room_.projected + stream * s_.frames * stride + head * n.value;
        float* const ring = state(stream) + l_.values[which] + (head * s_.capacity + behind(stream)) * value;
        for (int64_t t = 0; t < s_.frames; t++)
          std::copy(row + t * stride, row + t * stride + n.value, ring + (s_.left + t) * value);
        float* const out = room_.hidden + stream * s_.frames * width + head * n.value;
        for (int64_t c = 0; c < n.value; c += kChunkLanes)
          chunk_weighted(weights(stream, head), padded_keys_, s_.frames, s_.keys, ring + c, value, out + c, width,
                         std::min(kChunkLanes, n.value - c));
      }
    });
    product(l_.attention[which].out, room_.hidden, width, room_.y);
    add();
  }

  void convolution(int which) const {
    const int64_t n = s_.shape.dim, stride = l_.convolution[which].in.stride(), stripes = s_.channels / kChunkLanes;
    const ChunkConvolution& conv = l_.conv[which];
    product(l_.convolution[which].in, x_, s_.stride, room_.projected);
    step_.workers.split(step_.streams * stripes, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t stream = i / stripes, c = i % stripes * kChunkLanes, columns = std::min(kChunkLanes, n - c);
        const float* const row = room_.projected + stream * s_.frames * stride + c;
        float* const ring = state(stream) + conv.ring + behind(stream) * s_.channels + c;
        for (int64_t t = 0; t < s_.frames; t++) {
          float* const gated = ring + (s_.pad + t) * s_.channels;
          if (masked(stream) && masked(stream)[s_.left + t])
            std::fill(gated, gated + columns, 0.0f);
          else
            chunk_sigmoid_gate(row + t * stride, row + t * stride + n, gated, columns);
        }
        chunk_convolution({ring, s_.channels, s_.frames, s_.pad, vector(conv.causal) + c, vector(conv.causal_bias) + c,
                           vector(conv.chunkwise) + c, vector(conv.chunkwise_bias) + c, vector(conv.scale) + c,
                           s_.channels, room_.y + stream * s_.frames * s_.stride + c, s_.stride, columns});
      }
    });
    for (int64_t r = 0; r < rows_; r++)
      kernels<SwooshKernels<float>>().forward(room_.y + r * s_.stride, nullptr, Mask::none,
                                              room_.hidden + r * s_.stride, n, Swoosh::R);
    product(l_.convolution[which].out, room_.hidden, s_.stride, room_.y);
    add();
  }

  void bypass_mid() {
    kernels<BypassKernels<float>>().forward(input_, x_, vector(l_.mid), room_.y, rows_, s_.stride);
    std::swap(x_, room_.y);
  }

  // Leaves the layer's output in place of its input.
  void norm_and_bypass() const {
    for (int64_t r = 0; r < rows_; r++)
      kernels<BiasNormKernels<float>>().forward(x_ + r * s_.stride, vector(l_.norm_bias), *vector(l_.norm_scale),
                                                room_.y + r * s_.stride, 1, s_.shape.dim);
    chunk_combine(input_, room_.y, vector(l_.bypass), 1, rows_, s_.stride);
  }

 private:
  const float* vector(const ChunkTable& t) const { return step_.vectors + t.at; }
  float* state(int64_t stream) const { return step_.states + step_.slots[stream] * step_.plan.state_floats; }
  int64_t behind(int64_t stream) const { return step_.counters[step_.slots[stream]].at * s_.frames; }
  float* weights(int64_t stream, int64_t head) const {
    return room_.weights + (stream * s_.shape.heads + head) * s_.frames * padded_keys_;
  }
  const uint8_t* masked(int64_t stream) const { return step_.masked ? step_.masked + stream * s_.keys : nullptr; }
  void product(const ChunkProduct& p, const float* x, int64_t x_stride, float* y) const {
    chunk_product(step_, p, x, x_stride, rows_, room_.levels, y);
  }
  void add() const { chunk_add(room_.y, x_, rows_ * s_.stride); }

  // Computes hidden = swoosh(projected), rows of n elements.
  void swoosh(int64_t n, int64_t stride, Swoosh kind) const {
    step_.workers.split(rows_, std::max<int64_t>(1, 16384 / n), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        kernels<SwooshKernels<float>>().forward(room_.projected + r * stride, nullptr, Mask::none,
                                                room_.hidden + r * stride, n, kind);
    });
  }

  const ChunkStep& step_;
  const ChunkPlan::Stack& s_;
  const ChunkLayer& l_;
  const int64_t rows_, padded_keys_;
  ChunkRoom room_;
  float *input_ = nullptr, *x_ = nullptr;
};

}  // namespace FASTASR_SIMD
}  // namespace fastasr::cpu
