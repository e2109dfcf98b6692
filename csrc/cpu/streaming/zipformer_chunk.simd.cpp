// SPDX-License-Identifier: Apache-2.0
#include "cpu/streaming/zipformer_chunk.h"

#include <algorithm>
#include <cstring>

#include "cpu/streaming/zipformer_chunk_front.simd.h"
#include "cpu/streaming/zipformer_chunk_layer.simd.h"

namespace fastasr::cpu {
namespace {

// Copies rows of `from` channels to rows of `dim`: it cuts channels off, or puts zeros behind them. Rows are `stride`
// apart.
void change_width(const float* x, int64_t x_stride, int64_t from, float* y, int64_t y_stride, int64_t dim,
                  int64_t rows) {
  const int64_t taken = std::min(from, dim);
  for (int64_t r = 0; r < rows; r++) {
    std::memcpy(y + r * y_stride, x + r * x_stride, static_cast<size_t>(taken) * 4);
    std::memset(y + r * y_stride + taken, 0, static_cast<size_t>(y_stride - taken) * 4);
  }
}

void run(const ChunkStep& step, const float* features, float* out) {
  const ChunkPlan& plan = step.plan;
  const int64_t rows = step.streams * plan.shape.chunk;
  const ChunkRoom room(plan, step.streams, step.scratch);
  chunk_begin(step);
  Front(step).run(features, room.outputs[0]);
  for (size_t i = 0; i < plan.stacks.size(); i++) {
    const ChunkPlan::Stack& s = plan.stacks[i];
    float* const x = room.outputs[i];
    if (i > 0)
      change_width(room.outputs[i - 1], plan.stacks[i - 1].stride, plan.stacks[i - 1].shape.dim, x, s.stride,
                   s.shape.dim, rows);
    const int64_t factor = s.shape.factor;
    float* const own = factor > 1 ? room.lower : x;
    if (factor > 1)
      chunk_downsample(x, s.stride, step.vectors + s.downsample.at, factor, own, rows / factor, s.stride, s.stride);
    for (const ChunkLayer& layer : s.layers) Layer(step, s, layer).run(own);
    if (factor > 1) chunk_combine(x, own, step.vectors + s.combine.at, factor, rows, s.stride);
  }
  // Channels that the last stack lacks come from the last one that has them.
  const int64_t dim = plan.shape.output_dim();
  for (int64_t from = 0, i = static_cast<int64_t>(plan.stacks.size()) - 1; from < dim; i--) {
    const ChunkPlan::Stack& s = plan.stacks[static_cast<size_t>(i)];
    if (s.shape.dim <= from) continue;
    chunk_downsample(room.outputs[static_cast<size_t>(i)] + from, s.stride, step.vectors + plan.output.at, 2,
                     out + from, rows / 2, dim, s.shape.dim - from);
    from = s.shape.dim;
  }
  chunk_end(step);
}

void layer(const ChunkStep& step, const ChunkPlan::Stack& stack, const ChunkLayer& l, float* x) {
  Layer(step, stack, l).run(x);
}

}  // namespace

FASTASR_KERNELS_FLOAT(ChunkKernels, .step = run, .layer = layer)

}  // namespace fastasr::cpu
