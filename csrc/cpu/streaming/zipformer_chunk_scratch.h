// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/streaming/zipformer_chunk.h"

// The division of a step's scratch memory. The front end's part and the encoder's share their memory.
namespace fastasr::cpu {

struct ChunkRoom {
  float *x, *y, *projected, *hidden, *weights;  // buffers of a layer
  int32_t* levels;                              // a product's rounded input as words, then int8's steps and zeros
  float* lower;                                 // a stack's activations at its own frame rate
  std::vector<float*> outputs;                  // outputs of each stack, (streams chunk, stride)
  int64_t size;

  FASTASR_MEMBER ChunkRoom(const ChunkPlan& plan, int64_t streams, float* memory) {
    int64_t row = 0, wide = 0, weight = 0, level = 0;
    const WeightFormat format = plan.shape.weights;
    for (const ChunkPlan::Stack& s : plan.stacks) {
      const ChunkLayer& l = s.layers[0];
      int64_t most = s.stride;
      for (const ChunkProduct* p : {&l.scores, &l.nonlin.in, &l.attention[0].in, &l.convolution[0].in,
                                    &l.feed_forward[0].in, &l.feed_forward[1].in, &l.feed_forward[2].in})
        most = std::max(most, p->stride());
      const int64_t rows = streams * s.frames;
      row = std::max(row, rows * s.stride);
      wide = std::max(wide, rows * most);
      level = std::max(level, rows * (reduced_words(most, format) + 2));  // no input is wider than these outputs
      weight = std::max(weight, rows * s.shape.heads * round_up(s.keys, kChunkLanes));
    }
    int64_t at = 0;
    const auto take = [&](int64_t floats) {
      float* const here = memory ? memory + at : nullptr;
      at += round_up(floats, kChunkLanes);
      return here;
    };
    for (const ChunkPlan::Stack& s : plan.stacks) outputs.push_back(take(streams * plan.shape.chunk * s.stride));
    x = take(row), y = take(row), lower = take(row);
    projected = take(wide), hidden = take(wide), weights = take(weight);
    levels = reinterpret_cast<int32_t*>(take(plan.shape.rounds_inputs() ? level : 0));
    size = at;
  }
};

// The front end's part serves one stream at a time, except for `frames`.
struct FrontRoom {
  float *repeated, *first, *patches, *product, *second, *third, *filtered, *expanded, *activated, *contracted, *frames;
  int32_t* levels;  // the rounded inputs of conv3, expand and contract of a frame, or of front_out, see ChunkRoom
  int64_t level;    // words of a frame
  int64_t size;

  FASTASR_MEMBER FrontRoom(const ChunkPlan& plan, int64_t streams, float* memory) {
    const ChunkShape& n = plan.shape;
    const int64_t rows = n.input_frames(), second_rows = n.chunk + 5, third_rows = n.chunk + 3;
    const int64_t w2 = n.width2(), w3 = n.width3();
    // this lies behind the encoder's outputs: the front end writes those of the first stack at the end
    int64_t at = streams * n.chunk * plan.stacks[0].stride;
    const auto take = [&](int64_t floats) {
      float* const here = memory ? memory + at : nullptr;
      at += round_up(floats, kChunkLanes);
      return here;
    };
    // later this is room for the rows of front_out
    repeated = take(std::max(rows * (n.bins + 2) * n.maps[0], streams * n.chunk * plan.front_out.stride()));
    first = take((rows - 2) * n.bins * n.maps[0]);
    // each row of output has one row of maps, so that workers need none of their own
    patches = take(std::max(second_rows * w2 * 9 * n.maps[0], third_rows * w3 * 9 * n.maps[1]));
    product = take(std::max({(rows - 2) * n.bins * n.maps[0], second_rows * w2 * plan.conv2.stride(),
                             third_rows * w3 * plan.conv3.stride()}));
    second = take(second_rows * w2 * n.maps[1]);
    third = take((kFrontPast + third_rows) * w3 * n.maps[2]);
    filtered = take(n.chunk * w3 * n.maps[2]);
    expanded = take(n.chunk * w3 * plan.expand.stride());
    activated = take(n.chunk * w3 * n.expanded);
    contracted = take(n.chunk * w3 * plan.contract.stride());
    frames = take(streams * n.chunk * w3 * n.maps[2]);
    level = w3 * (reduced_words(std::max({9 * n.maps[1], n.maps[2], n.expanded}), n.weights) + 2);
    const int64_t all =
        std::max(third_rows * level, streams * n.chunk * (reduced_words(w3 * n.maps[2], n.weights) + 2));
    levels = reinterpret_cast<int32_t*>(take(n.rounds_inputs() ? all : 0));
    size = at;
  }
};

}  // namespace fastasr::cpu
