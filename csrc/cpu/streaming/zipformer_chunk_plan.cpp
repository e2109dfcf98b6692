// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <type_traits>
#include <utility>

#include "cpu/streaming/zipformer_chunk_scratch.h"

namespace fastasr::cpu {
namespace {

constexpr int64_t kConvTaps = 9;    // taps of the front end's convolutions, 3 x 3
constexpr int64_t kDepthTaps = 49;  // taps of ConvNeXt's convolution, 7 x 7

// Reads the sizes from index `at` on, which it advances. It returns false if the list is too short.
template <typename T>
bool read(const std::vector<int64_t>& sizes, size_t* at, T* to) {
  bool fits = true;
  to->each_size([&](const char*, auto& size) {
    fits = fits && *at < sizes.size();
    if (fits) size = static_cast<std::remove_reference_t<decltype(size)>>(sizes[(*at)++]);
  });
  return fits;
}

// Hands out offsets in the order of the calls.
struct Layout {
  ChunkPlan* plan;

  ChunkTable table(int64_t rows, int64_t columns, int64_t stride) const {
    const ChunkTable t{plan->vector_floats, rows, columns, stride};
    plan->vector_floats += round_up(rows * stride, kChunkLanes);
    plan->tables.push_back(t);
    return t;
  }
  ChunkTable row(int64_t columns) const { return table(1, columns, round_up(columns, kPanelColumns)); }

  ChunkProduct product(int64_t inputs, int64_t outputs, WeightFormat format) const {
    const int64_t padded = panel_count(outputs) * kPanelColumns;
    const bool reduced = format != WeightFormat::fp32 && plan->shape.rounds_inputs();
    ChunkProduct p{inputs, outputs, plan->weight_bytes, plan->vector_floats, plan->vector_floats + padded,
                   format, reduced};
    plan->weight_bytes +=
        reduced ? padded * reduced_words(inputs, format) * 4 : packed_size(outputs, inputs) * weight_bytes(format);
    plan->vector_floats += padded * (format == WeightFormat::int8 ? 3 : 1);
    plan->products.push_back(p);
    return p;
  }
  ChunkProduct product(int64_t inputs, int64_t outputs) const { return product(inputs, outputs, plan->shape.weights); }
  // The front end's weights stay in a cache, so fewer bytes gain nothing; fewer instructions do.
  ChunkProduct front_product(int64_t inputs, int64_t outputs) const {
    return product(inputs, outputs, plan->shape.rounds_inputs() ? plan->shape.weights : WeightFormat::fp32);
  }

  int64_t state(int64_t floats) const {
    const int64_t at = plan->state_floats;
    plan->state_floats += round_up(floats, kChunkLanes);
    return at;
  }
};

ChunkConvolution convolution(const Layout& l, const ChunkPlan::Stack& s, int64_t ring_frames) {
  ChunkConvolution c;
  const int64_t dim = s.shape.dim;
  c.causal = l.table(s.pad + 1, dim, s.channels);
  c.causal_bias = l.row(dim);
  c.chunkwise = l.table(s.shape.taps, dim, s.channels);
  c.chunkwise_bias = l.row(dim);
  c.scale = l.table(s.frames, dim, s.channels);
  c.ring = l.state((s.pad + ring_frames) * s.channels);
  return c;
}

ChunkLayer layer(const Layout& l, const ChunkPlan::Stack& s, int64_t ring_frames) {
  const ZipformerSizes& n = s.shape;
  ChunkLayer y;
  y.each_product(
      n, [&](const char*, ChunkProduct& p, int64_t inputs, int64_t outputs) { p = l.product(inputs, outputs); });
  // a query reads whole vectors of offsets, up to a vector beyond the last
  const int64_t offsets = s.left + 2 * s.frames - 1;
  y.positions = l.table(n.heads * n.pos, offsets, round_up(offsets, kChunkLanes) + 2 * kChunkLanes);
  y.keys = l.state(n.heads * n.query * s.capacity);
  y.hidden = l.state(s.capacity * s.hidden);
  for (int i = 0; i < 2; i++) {
    y.values[i] = l.state(n.heads * s.capacity * round_up(n.value, kChunkLanes));
    y.conv[i] = convolution(l, s, ring_frames);
  }
  y.mid = l.row(n.dim);
  y.bypass = l.row(n.dim);
  y.norm_bias = l.row(n.dim);
  y.norm_scale = l.row(1);
  return y;
}

ChunkPlan::Stack stack(const ZipformerSizes& n, int64_t frames, int64_t left, int64_t ring_frames) {
  ChunkPlan::Stack s;
  s.shape = n;
  s.frames = frames;
  s.left = left;
  s.keys = left + frames;
  s.capacity = round_up(left + ring_frames + kChunkLanes - 1, kChunkLanes);  // reads end with a vector
  s.pad = n.taps / 2;
  s.channels = round_up(n.dim, kChunkLanes);
  s.hidden = round_up(n.hidden, kChunkLanes);
  s.stride = panel_count(n.dim) * kPanelColumns;
  return s;
}

}  // namespace

int64_t ChunkProduct::stride() const { return panel_count(outputs) * kPanelColumns; }

std::vector<ZipformerSizes> read_stacks(const std::vector<int64_t>& sizes, size_t at) {
  std::vector<ZipformerSizes> stacks;
  while (at < sizes.size()) {
    ZipformerSizes& s = stacks.emplace_back();
    if (!read(sizes, &at, &s) || s.taps % 2 == 0) return {};
    int64_t least = 1;
    s.each_size([&](const char*, int64_t size) { least = std::min(least, size); });
    if (least < 1) return {};
  }
  return stacks;
}

ChunkShape::ChunkShape(const std::vector<int64_t>& sizes) {
  size_t at = 0;
  if (!read(sizes, &at, this)) return;
  if (chunk < 2 || chunk % 2 != 0 || left < 0 || bins < 7 || expanded < 1) return;
  if (weights < WeightFormat::fp32 || weights > WeightFormat::fp16) return;
  if (std::min({maps[0], maps[1], maps[2]}) < 1) return;
  std::vector<ZipformerSizes> all = read_stacks(sizes, at);
  for (const ZipformerSizes& s : all)
    if (chunk % s.factor != 0 || left % s.factor != 0) return;
  stacks = std::move(all);
}

bool ChunkShape::rounds_inputs() const {
  const bool reduced = weights == WeightFormat::bf16 || weights == WeightFormat::int8;
  return reduced && reduced_gemm_kernels(weights).gains();
}

int64_t ChunkShape::output_dim() const {
  int64_t dim = 0;
  for (const ZipformerSizes& s : stacks) dim = std::max(dim, s.dim);
  return dim;
}

ChunkPlan::ChunkPlan(const ChunkShape& given) : shape(given) {
  const Layout l{this};
  // The left context is moved to the front of its ring once in 1 + slack chunks; the rings grow by slack chunks.
  slack = std::clamp<int64_t>(shape.left / shape.chunk / 2, 1, 7);
  const int64_t w3 = shape.width3();
  conv1 = l.table(kConvTaps, shape.bins * shape.maps[0], round_up(shape.bins * shape.maps[0], kChunkLanes));
  conv1_bias = l.row(shape.bins * shape.maps[0]);
  conv2 = l.product(kConvTaps * shape.maps[0], shape.maps[1], WeightFormat::fp32);
  conv3 = l.front_product(kConvTaps * shape.maps[1], shape.maps[2]);
  depthwise = l.table(1, shape.maps[2] * kDepthTaps, shape.maps[2] * kDepthTaps);
  depthwise_bias = l.row(shape.maps[2]);
  expand = l.front_product(shape.maps[2], shape.expanded);
  contract = l.front_product(shape.expanded, shape.maps[2]);
  front_out = l.front_product(w3 * shape.maps[2], shape.stacks[0].dim);
  front_norm_bias = l.row(shape.stacks[0].dim);
  front_norm_scale = l.row(1);
  front_past = l.state(kFrontPast * w3 * shape.maps[2]);
  for (const ZipformerSizes& n : shape.stacks) {
    const int64_t frames = shape.chunk / n.factor, ring_frames = (1 + slack) * frames;
    Stack s = stack(n, frames, shape.left / n.factor, ring_frames);
    if (n.factor > 1) {
      s.downsample = l.row(n.factor);
      s.combine = l.row(n.dim);
    }
    for (int64_t i = 0; i < n.layers; i++) s.layers.push_back(layer(l, s, ring_frames));
    stacks.push_back(s);
  }
  output = l.row(2);
}

ChunkPlan::ChunkPlan(const ZipformerSizes& n, int64_t frames, int64_t left) {
  shape.chunk = frames, shape.left = left, shape.stacks = {n};
  Stack s = stack(n, frames, left, frames);
  s.layers.push_back(layer(Layout{this}, s, frames));
  stacks.push_back(s);
}

int64_t ChunkPlan::scratch_floats(int64_t streams) const {
  return std::max(ChunkRoom(*this, streams, nullptr).size, FrontRoom(*this, streams, nullptr).size);
}

}  // namespace fastasr::cpu
