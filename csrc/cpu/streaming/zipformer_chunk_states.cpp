// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/streaming/zipformer_chunk_scratch.h"

namespace fastasr::cpu {
namespace {

// Moves rows or columns [at, at + n) of a ring to the front.
void rows_to_front(float* ring, int64_t at, int64_t n, int64_t width) {
  std::memmove(ring, ring + at * width, static_cast<size_t>(n * width) * 4);
}
void columns_to_front(float* ring, int64_t at, int64_t n, int64_t rows, int64_t capacity) {
  for (int64_t r = 0; r < rows; r++)
    std::memmove(ring + r * capacity, ring + r * capacity + at, static_cast<size_t>(n) * 4);
}

void to_front(const ChunkPlan::Stack& s, const ChunkLayer& l, float* state, int64_t chunks) {
  const int64_t at = chunks * s.frames, value = round_up(s.shape.value, kChunkLanes);
  columns_to_front(state + l.keys, at, s.left, s.shape.heads * s.shape.query, s.capacity);
  rows_to_front(state + l.hidden, at, s.left, s.hidden);
  for (int i = 0; i < 2; i++) {
    for (int64_t h = 0; h < s.shape.heads; h++)
      rows_to_front(state + l.values[i] + h * s.capacity * value, at, s.left, value);
    rows_to_front(state + l.conv[i].ring, at, s.pad, s.channels);
  }
}

constexpr int64_t kBlock = 16;  // a transposition works on blocks of this size

void copy(const float* from, float* to, int64_t n) { std::memcpy(to, from, static_cast<size_t>(n) * 4); }

// Computes to[c][t] = from[t][c].
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t first = 0; first < rows; first += kBlock)
    for (int64_t c = 0; c < columns; c++)
      for (int64_t t = first; t < std::min(rows, first + kBlock); t++)
        to[c * to_stride + t] = from[t * from_stride + c];
}

// Copies a layer's states of stream `index` of `streams` between upstream's tensors and `state`, the stream's states.
struct LayerStates {
  const ChunkPlan::Stack& s;
  const ChunkLayer& l;
  int64_t index, streams;

  int64_t key_width() const { return s.shape.heads * s.shape.query; }
  int64_t value_width() const { return s.shape.heads * s.shape.value; }
  int64_t value_lanes() const { return round_up(s.shape.value, kChunkLanes); }

  void load(const float* const* tensors, float* state) const {
    const int64_t keys = key_width();
    transpose(tensors[0] + index * keys, streams * keys, s.left, keys, state + l.keys, s.capacity);
    const float* hidden = tensors[1] + index * s.left * s.shape.hidden;
    for (int64_t t = 0; t < s.left; t++)
      copy(hidden + t * s.shape.hidden, state + l.hidden + t * s.hidden, s.shape.hidden);
    for (int i = 0; i < 2; i++) {
      for (int64_t t = 0; t < s.left; t++)
        for (int64_t h = 0; h < s.shape.heads; h++)
          copy(tensors[2 + i] + (t * streams + index) * value_width() + h * s.shape.value,
               state + l.values[i] + (h * s.capacity + t) * value_lanes(), s.shape.value);
      transpose(tensors[4 + i] + index * s.shape.dim * s.pad, s.pad, s.shape.dim, s.pad, state + l.conv[i].ring,
                s.channels);
    }
  }

  // Writes the states that begin `behind` frames behind the rings' front. `before`, if not null, are the tensors that
  // the front was loaded from: the rows of the context that they hold are copied from there.
  void store(const float* state, int64_t behind, const float* const* before, float* const* tensors) const {
    const int64_t kept = before ? std::max<int64_t>(0, s.left - behind) : 0, keys = key_width();
    const int64_t values = value_width();
    for (int64_t t = 0; t < s.left; t++) {
      float* const row = tensors[0] + (t * streams + index) * keys;
      if (t < kept)
        copy(before[0] + ((t + behind) * streams + index) * keys, row, keys);
      else
        for (int64_t c = 0; c < keys; c++) row[c] = state[l.keys + c * s.capacity + behind + t];
      copy(state + l.hidden + (behind + t) * s.hidden, tensors[1] + (index * s.left + t) * s.shape.hidden,
           s.shape.hidden);
    }
    for (int i = 0; i < 2; i++) {
      for (int64_t t = 0; t < s.left; t++) {
        float* const row = tensors[2 + i] + (t * streams + index) * values;
        if (t < kept) {
          copy(before[2 + i] + ((t + behind) * streams + index) * values, row, values);
        } else {
          for (int64_t h = 0; h < s.shape.heads; h++)
            copy(state + l.values[i] + (h * s.capacity + behind + t) * value_lanes(), row + h * s.shape.value,
                 s.shape.value);
        }
      }
      transpose(state + l.conv[i].ring + behind * s.channels, s.channels, s.pad, s.shape.dim,
                tensors[4 + i] + index * s.shape.dim * s.pad, s.pad);
    }
  }
};

// Calls f(states of a layer, index of its first tensor) for each layer of one stream; returns the number of tensors.
template <typename F>
int64_t each_layer(const ChunkPlan& plan, const F& f) {
  int64_t tensor = 0;
  for (const ChunkPlan::Stack& s : plan.stacks)
    for (const ChunkLayer& l : s.layers) {
      f(LayerStates{s, l, 0, 1}, tensor);
      tensor += kLayerStates;
    }
  return tensor;
}

}  // namespace

void chunk_begin(const ChunkStep& step) {
  const ChunkPlan& plan = step.plan;
  step.workers.split(step.streams, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      ChunkCounters& counters = step.counters[step.slots[i]];
      if (counters.at <= plan.slack) continue;
      float* const state = step.states + step.slots[i] * plan.state_floats;
      for (const ChunkPlan::Stack& s : plan.stacks)
        for (const ChunkLayer& l : s.layers) to_front(s, l, state, counters.at);
      counters.at = 0;
    }
  });
}

void chunk_end(const ChunkStep& step) {
  for (int64_t i = 0; i < step.streams; i++) {
    ChunkCounters& counters = step.counters[step.slots[i]];
    counters.processed += step.plan.shape.chunk;
    counters.at++;
  }
}

void chunk_export(const ChunkPlan& plan, const float* state, const ChunkCounters& counters, float* const* tensors) {
  const int64_t maps = plan.shape.maps[2], width = plan.shape.width3();
  const int64_t layers = each_layer(plan, [&](const LayerStates& layer, int64_t first) {
    layer.store(state, counters.at * layer.s.frames, nullptr, tensors + first);
  });
  transpose(state + plan.front_past, maps, kFrontPast * width, maps, tensors[layers], kFrontPast * width);
}

void chunk_import(const ChunkPlan& plan, const float* const* tensors, float* state, ChunkCounters* counters) {
  const int64_t maps = plan.shape.maps[2], width = plan.shape.width3();
  std::fill(state, state + plan.state_floats, 0.0f);
  counters->at = 0;
  const int64_t layers =
      each_layer(plan, [&](const LayerStates& layer, int64_t first) { layer.load(tensors + first, state); });
  transpose(tensors[layers], kFrontPast * width, maps, kFrontPast * width, state + plan.front_past, maps);
}

int64_t layer_state_floats(const ChunkPlan::Stack& s, int64_t index, int64_t streams) {
  const ZipformerSizes& n = s.shape;
  const int64_t frame = index == 0 ? n.heads * n.query : index == 1 ? n.hidden : n.heads * n.value;
  return streams * (index < 4 ? s.left * frame : n.dim * s.pad);
}

int64_t layer_scratch_floats(const ChunkPlan& plan, int64_t streams) {
  const ChunkPlan::Stack& s = plan.stacks[0];
  return ChunkRoom(plan, streams, nullptr).size + streams * (plan.state_floats + s.frames * s.stride);
}

void layer_step(ChunkStep step, const float* x, const float* const* states, float* y, float* const* after) {
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
      for (int64_t i = begin; i < end; i++) f(LayerStates{s, l, i, streams}, memory + i * plan.state_floats);
    });
  };
  each_stream([&](const LayerStates& stream, float* state) {
    stream.load(states, state);
    for (int64_t t = 0; t < s.frames; t++) {
      float* const row = rows + (stream.index * s.frames + t) * s.stride;
      copy(x + (t * streams + stream.index) * dim, row, dim);
      std::fill(row + dim, row + s.stride, 0.0f);
    }
  });
  step.states = memory, step.counters = counters.data(), step.slots = slots.data();
  kernels<ChunkKernels>().layer(step, s, l, rows);
  each_stream([&](const LayerStates& stream, const float* state) {
    stream.store(state, s.frames, states, after);
    for (int64_t t = 0; t < s.frames; t++)
      copy(rows + (stream.index * s.frames + t) * s.stride, y + (t * streams + stream.index) * dim, dim);
  });
}

}  // namespace fastasr::cpu
