// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/streaming/zipformer_chunk.h"

// One chunk through one layer of a streaming Zipformer, with the states as upstream's tensors. Copying them into the
// layout of zipformer_chunk.h and back takes a hundredth of the time of reading the layer's weights. A stream's bits
// depend neither on the other streams nor on the number of threads.
namespace fastasr::cpu {

// The six states of a layer, contiguous: key (left, streams, heads query), hidden (streams, left, hidden), two values
// (left, streams, heads value), two convolutions (streams, dim, pad).
constexpr int64_t kLayerStates = 6;
int64_t layer_state_floats(const ChunkPlan& plan, int64_t index, int64_t streams);

struct LayerStep {
  const ChunkPlan& plan;  // the plan of one layer
  const char* weights;
  const float* vectors;
  const uint8_t* masked;  // (streams, left + frames), nonzero: masked; or null
  int64_t streams;
  float* scratch;  // layer_scratch_floats(plan, streams)
  Workers workers;
};
int64_t layer_scratch_floats(const ChunkPlan& plan, int64_t streams);

// Maps x (frames, streams, dim), contiguous, to y of the same shape, and writes the states after it.
void layer_step(const LayerStep& step, const float* x, const float* const* states, float* y, float* const* after);

}  // namespace fastasr::cpu
