// SPDX-License-Identifier: Apache-2.0
#include "cpu/streaming/zipformer_chunk.h"

#include "tests/check.h"

// Values are compared with the model's own code in tests/models/test_zipformer_streaming_layer.py. These tests check
// what is read and written, the states that are handed on, and that a stream's bits depend on nothing but the stream.
namespace fastasr::test {
namespace {

using cpu::ChunkPlan;
using cpu::kLayerStates;

void run_threads(int64_t parts, void (*part)(const void*, int64_t), const void* context) {
  on_threads(parts, [&](int64_t i) { part(context, i); });
}

constexpr cpu::ZipformerSizes kOdd{21, 1, 1, 3, 4, 18, 3, 7, {20, 70, 6}, 17};

struct Layer {
  ChunkPlan plan;
  Buffer<float> weights, vectors;

  Layer(int64_t frames, int64_t left)
      : plan(kOdd, frames, left), weights((plan.weight_bytes + 3) / 4), vectors(plan.vector_floats) {
    Random random(5);
    vectors.set(0);
    for (size_t i = 0; i < plan.products.size(); i++) {
      const cpu::ChunkProduct& p = plan.products[i];
      Buffer<float> w(p.outputs * p.inputs, 0, random, 1 / std::sqrt(static_cast<double>(p.inputs))),
          bias(p.outputs, 0, random, 0.3);
      const auto index = static_cast<int64_t>(i);
      cpu::chunk_pack_product(plan, index, w, nullptr, reinterpret_cast<char*>(weights.data()), nullptr);
      cpu::chunk_pack_product(plan, index, nullptr, bias, nullptr, vectors);
    }
    for (const cpu::ChunkTable& t : plan.tables) {
      Buffer<float> values(t.rows * t.columns, 0, random, 0.3, 0.4);
      cpu::chunk_pack_table(t, values, vectors);
    }
  }
};

// The inputs or outputs: x or y first, then the states.
using Tensors = std::vector<std::vector<float>>;

Tensors run(Layer& layer, const Tensors& in, const std::vector<uint8_t>& masked, int64_t streams, int64_t threads) {
  const ChunkPlan& plan = layer.plan;
  const int64_t frames = plan.stacks[0].frames;
  Buffer<float> scratch(cpu::layer_scratch_floats(plan, streams)), y(frames * streams * kOdd.dim);
  scratch.set(std::numeric_limits<double>::quiet_NaN());
  std::vector<Buffer<float>> after;
  const float* before[kLayerStates];
  float* results[kLayerStates];
  for (int64_t i = 0; i < kLayerStates; i++) after.emplace_back(cpu::layer_state_floats(plan.stacks[0], i, streams));
  for (size_t i = 0; i < kLayerStates; i++) {
    CHECK(in[i + 1].size() == static_cast<size_t>(after[i].size()), "size of state %zu", i);
    before[i] = in[i + 1].data(), results[i] = after[i].data();
  }
  cpu::layer_step({plan,
                   reinterpret_cast<const char*>(layer.weights.data()),
                   layer.vectors,
                   masked.empty() ? nullptr : masked.data(),
                   streams,
                   scratch,
                   {threads, run_threads}},
                  in[0].data(), before, y, results);
  Tensors out{{y.data(), y + y.size()}};
  for (Buffer<float>& t : after) out.emplace_back(t.data(), t + t.size());
  return out;
}

// Returns stream `index` of `streams`: these tensors have the streams second, those from the fifth state on and the
// hidden one first.
Tensors one_of(const Tensors& all, int64_t streams, int64_t index) {
  Tensors one;
  for (size_t i = 0; i < all.size(); i++) {
    const bool first = i == 2 || i > 4;
    const auto size = static_cast<int64_t>(all[i].size()) / streams;
    const int64_t width = i == 0             ? kOdd.dim
                          : i == 1           ? kOdd.heads * kOdd.query
                          : i == 3 || i == 4 ? kOdd.heads * kOdd.value
                                             : size;
    std::vector<float> picked;
    for (int64_t row = 0; row * width < size; row++) {
      const auto from = all[i].begin() + (first ? index * size : (row * streams + index) * width);
      picked.insert(picked.end(), from, from + width);
    }
    one.push_back(picked);
  }
  return one;
}

bool same(const Tensors& a, const Tensors& b) {
  for (size_t i = 0; i < a.size(); i++)
    if (a[i].size() != b[i].size() ||
        (!a[i].empty() && std::memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(float)) != 0))
      return false;
  return true;
}

void streams(int64_t frames, int64_t left, bool with_mask) {
  constexpr int64_t kStreams = 3;
  Layer layer(frames, left);
  Random random(static_cast<uint64_t>(frames * 31 + left));
  Tensors in;
  for (int64_t i = -1; i < kLayerStates; i++) {
    const int64_t n = i < 0 ? frames * kStreams * kOdd.dim : cpu::layer_state_floats(layer.plan.stacks[0], i, kStreams);
    std::vector<float> values(static_cast<size_t>(n));
    for (float& v : values) v = static_cast<float>(random.normal());
    in.push_back(values);
  }
  const int64_t keys = left + frames;
  std::vector<uint8_t> masked(with_mask ? static_cast<size_t>(kStreams * keys) : 0);
  for (size_t i = 0; i < masked.size(); i++) masked[i] = i % 3 == 1;
  const Tensors together = run(layer, in, masked, kStreams, 1);
  CHECK(same(together, run(layer, in, masked, kStreams, 3)), "threads changed bits, %ld frames", long(frames));
  for (int64_t i = 0; i < kStreams; i++) {
    const std::vector<uint8_t> mask(masked.begin() + (with_mask ? i * keys : 0),
                                    masked.begin() + (with_mask ? (i + 1) * keys : 0));
    const Tensors alone = run(layer, one_of(in, kStreams, i), mask, 1, 1);
    CHECK(same(one_of(together, kStreams, i), alone), "stream %ld of %ld frames differs alone", long(i), long(frames));
    for (const float v : alone[0]) CHECK(std::isfinite(v), "read what was not written");
  }
  // keys and values of the context move up by a chunk
  for (size_t i : {1, 3, 4}) {
    const std::vector<float>&a = in[i], &b = together[i];
    const size_t moved = left > 0 ? a.size() / static_cast<size_t>(left) * static_cast<size_t>(frames) : 0;
    if (frames < left)
      CHECK(std::memcmp(a.data() + moved, b.data(), (a.size() - moved) * sizeof(float)) == 0, "state %zu", i);
  }
}

}  // namespace

TEST_CASE("zipformer_layer_step") {
  for (const bool masked : {false, true}) {
    streams(4, 6, masked);
    streams(1, 5, masked);
    streams(9, 4, masked);
    streams(3, 0, masked);
    streams(8, 32, masked);
  }
}

}  // namespace fastasr::test
