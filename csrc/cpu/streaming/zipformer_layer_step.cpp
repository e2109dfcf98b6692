// SPDX-License-Identifier: Apache-2.0
#include "cpu/streaming/zipformer_layer_step.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/streaming/zipformer_chunk_scratch.h"

namespace fastasr::cpu {
namespace {

constexpr int64_t kBlock = 16;  // a transposition works on blocks of this size

void copy(const float* from, float* to, int64_t n) { std::memcpy(to, from, static_cast<size_t>(n) * 4); }

// transposes: to[c][t] = from[t][c]
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t first = 0; first < rows; first += kBlock)
    for (int64_t c = 0; c < columns; c++)
      for (int64_t t = first; t < std::min(rows, first + kBlock); t++)
        to[c * to_stride + t] = from[t * from_stride + c];
}

// Holds the states of one stream and their place in the chunk's layout.
struct Stream {
  const ChunkPlan::Stack& s;
  const ChunkLayer& l;
  int64_t index, streams;
  float* state;

  int64_t key_width() const { return s.shape.heads * s.shape.query; }
  int64_t value_width() const { return s.shape.heads * s.shape.value; }
  int64_t value_lanes() const { return round_up(s.shape.value, kChunkLanes); }

  void load(const float* const* states) const {
    const int64_t keys = key_width();
    transpose(states[0] + index * keys, streams * keys, s.left, keys, state + l.keys, s.capacity);
    const float* hidden = states[1] + index * s.left * s.shape.hidden;
    for (int64_t t = 0; t < s.left; t++)
      copy(hidden + t * s.shape.hidden, state + l.hidden + t * s.hidden, s.shape.hidden);
    for (int i = 0; i < 2; i++) {
      for (int64_t t = 0; t < s.left; t++)
        for (int64_t h = 0; h < s.shape.heads; h++)
          copy(states[2 + i] + (t * streams + index) * value_width() + h * s.shape.value,
               state + l.values[i] + (h * s.capacity + t) * value_lanes(), s.shape.value);
      transpose(states[4 + i] + index * s.shape.dim * s.pad, s.pad, s.shape.dim, s.pad, state + l.conv[i].ring,
                s.channels);
    }
  }

  // Rows that were already in the context before are copied from there.
  void store(const float* const* states, float* const* after) const {
    const int64_t kept = std::max<int64_t>(0, s.left - s.frames), keys = key_width(), values = value_width();
    for (int64_t t = 0; t < s.left; t++) {
      float* const row = after[0] + (t * streams + index) * keys;
      if (t < kept)
        copy(states[0] + ((t + s.frames) * streams + index) * keys, row, keys);
      else
        for (int64_t c = 0; c < keys; c++) row[c] = state[l.keys + c * s.capacity + s.frames + t];
      copy(state + l.hidden + (s.frames + t) * s.hidden, after[1] + (index * s.left + t) * s.shape.hidden,
           s.shape.hidden);
    }
    for (int i = 0; i < 2; i++) {
      for (int64_t t = 0; t < s.left; t++) {
        float* const row = after[2 + i] + (t * streams + index) * values;
        if (t < kept) {
          copy(states[2 + i] + ((t + s.frames) * streams + index) * values, row, values);
        } else {
          for (int64_t h = 0; h < s.shape.heads; h++)
            copy(state + l.values[i] + (h * s.capacity + s.frames + t) * value_lanes(), row + h * s.shape.value,
                 s.shape.value);
        }
      }
      transpose(state + l.conv[i].ring + s.frames * s.channels, s.channels, s.pad, s.shape.dim,
                after[4 + i] + index * s.shape.dim * s.pad, s.pad);
    }
  }
};

}  // namespace

int64_t layer_state_floats(const ChunkPlan& plan, int64_t index, int64_t streams) {
  const ChunkPlan::Stack& s = plan.stacks[0];
  const ChunkStack& n = s.shape;
  const int64_t frame = index == 0 ? n.heads * n.query : index == 1 ? n.hidden : n.heads * n.value;
  return streams * (index < 4 ? s.left * frame : n.dim * s.pad);
}

int64_t layer_scratch_floats(const ChunkPlan& plan, int64_t streams) {
  const ChunkPlan::Stack& s = plan.stacks[0];
  return ChunkRoom(plan, streams, nullptr).size + streams * (plan.state_floats + s.frames * s.stride);
}

void layer_step(const LayerStep& step, const float* x, const float* const* states, float* y, float* const* after) {
  const ChunkPlan& plan = step.plan;
  const ChunkPlan::Stack& s = plan.stacks[0];
  const ChunkLayer& l = s.layers[0];
  const int64_t streams = step.streams, dim = s.shape.dim;
  float* const memory = step.scratch + ChunkRoom(plan, streams, nullptr).size;
  float* const rows = memory + streams * plan.state_floats;
  std::vector<int64_t> slots(static_cast<size_t>(streams));
  std::iota(slots.begin(), slots.end(), 0);
  // a context that has been in full, and rings at their front
  std::vector<ChunkCounters> counters(static_cast<size_t>(streams), ChunkCounters{s.left, 0});
  const auto each_stream = [&](const auto& f) {
    step.workers.split(streams, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) f(Stream{s, l, i, streams, memory + i * plan.state_floats});
    });
  };
  each_stream([&](const Stream& stream) {
    stream.load(states);
    for (int64_t t = 0; t < s.frames; t++) {
      float* const row = rows + (stream.index * s.frames + t) * s.stride;
      copy(x + (t * streams + stream.index) * dim, row, dim);
      std::fill(row + dim, row + s.stride, 0.0f);
    }
  });
  kernels<ChunkKernels>().layer({plan, step.weights, step.vectors, memory, counters.data(), slots.data(), streams, 0,
                                 step.scratch, step.workers, step.masked},
                                s, l, rows);
  each_stream([&](const Stream& stream) {
    stream.store(states, after);
    for (int64_t t = 0; t < s.frames; t++)
      copy(rows + (stream.index * s.frames + t) * s.stride, y + (t * streams + stream.index) * dim, dim);
  });
}

}  // namespace fastasr::cpu
