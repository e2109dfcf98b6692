// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>

#include "cpu/streaming/zipformer_chunk.h"

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

// Calls f(float in the state, tensor, index in it) for each number of a stream's states, `at` chunks behind the front.
template <typename F>
void each_number(const ChunkPlan& plan, int64_t at, const F& f) {
  int64_t tensor = 0;
  for (const ChunkPlan::Stack& s : plan.stacks) {
    const ChunkStack& n = s.shape;
    const int64_t skip = at * s.frames, width = n.heads * n.query, value = round_up(n.value, kChunkLanes);
    for (const ChunkLayer& l : s.layers) {
      for (int64_t t = 0; t < s.left; t++)
        for (int64_t c = 0; c < width; c++) f(l.keys + c * s.capacity + skip + t, tensor, t * width + c);
      tensor++;
      for (int64_t t = 0; t < s.left; t++)
        for (int64_t c = 0; c < n.hidden; c++) f(l.hidden + (skip + t) * s.hidden + c, tensor, t * n.hidden + c);
      tensor++;
      for (int i = 0; i < 2; i++, tensor++)
        for (int64_t t = 0; t < s.left; t++)
          for (int64_t h = 0; h < n.heads; h++)
            for (int64_t c = 0; c < n.value; c++)
              f(l.values[i] + (h * s.capacity + skip + t) * value + c, tensor, (t * n.heads + h) * n.value + c);
      for (int i = 0; i < 2; i++, tensor++)
        for (int64_t c = 0; c < n.dim; c++)
          for (int64_t t = 0; t < s.pad; t++) f(l.conv[i].ring + (skip + t) * s.channels + c, tensor, c * s.pad + t);
    }
  }
  const int64_t width = plan.shape.width3(), maps = plan.shape.maps[2];
  for (int64_t c = 0; c < maps; c++)
    for (int64_t t = 0; t < kFrontPast; t++)
      for (int64_t b = 0; b < width; b++)
        f(plan.front_past + (t * width + b) * maps + c, tensor, (c * kFrontPast + t) * width + b);
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
  each_number(plan, counters.at, [&](int64_t from, int64_t tensor, int64_t to) { tensors[tensor][to] = state[from]; });
}

void chunk_import(const ChunkPlan& plan, const float* const* tensors, float* state, ChunkCounters* counters) {
  std::fill(state, state + plan.state_floats, 0.0f);
  counters->at = 0;
  each_number(plan, 0, [&](int64_t to, int64_t tensor, int64_t from) { state[to] = tensors[tensor][from]; });
}

}  // namespace fastasr::cpu
