// SPDX-License-Identifier: Apache-2.0
#include "cpu/streaming/zipformer_chunk.h"

#include "tests/check.h"

// The whole chunk's values are compared with the model's own code in tests/asr/streaming, a layer's in
// tests/models/test_zipformer_streaming_layer.py. These tests check what is read and written, and that a stream's bits
// depend on nothing but the stream.
namespace fastasr::test {
namespace {

using cpu::ChunkCounters;
using cpu::ChunkPlan;
using cpu::ChunkShape;
using cpu::kLayerStates;
using cpu::WeightFormat;

// Nothing is a multiple of a vector; the widest stack is neither the first nor the last.
std::vector<int64_t> numbers(int64_t chunk, int64_t left, WeightFormat weights) {
  std::vector<int64_t> n = {chunk, left, 14, 3, 5, 6, 11, static_cast<int64_t>(weights)};
  constexpr int64_t kStacks[3][12] = {{10, 1, 1, 2, 5, 3, 2, 5, 12, 9, 7, 8},
                                      {21, 2, 2, 3, 4, 18, 3, 7, 20, 70, 6, 17},
                                      {18, 1, 1, 1, 7, 6, 1, 3, 5, 4, 3, 13}};
  for (const auto& stack : kStacks) n.insert(n.end(), std::begin(stack), std::end(stack));
  return n;
}

// A plan with random weights, of an encoder or of a layer. A layer packs weights and vectors apart.
struct Packed {
  ChunkPlan plan;
  Buffer<float> weights{(plan.weight_bytes + 3) / 4}, vectors{plan.vector_floats};

  explicit Packed(const ChunkPlan& plan_) : plan(plan_) {
    Random random(5);
    vectors.set(0);
    for (size_t i = 0; i < plan.products.size(); i++) {
      const cpu::ChunkProduct& p = plan.products[i];
      Buffer<float> w(p.outputs * p.inputs, 0, random, 1 / std::sqrt(static_cast<double>(p.inputs))),
          all(p.outputs, 0, random, 0.3);
      const float* const bias = i % 5 ? all.data() : nullptr;
      char* const packed = reinterpret_cast<char*>(weights.data());
      const auto index = static_cast<int64_t>(i);
      if (plan.shape.maps[0]) {
        cpu::chunk_pack_product(plan, index, w, bias, packed, vectors);
      } else {
        cpu::chunk_pack_product(plan, index, w, nullptr, packed, nullptr);
        cpu::chunk_pack_product(plan, index, nullptr, bias, nullptr, vectors);
      }
    }
    for (const cpu::ChunkTable& t : plan.tables) {
      Buffer<float> values(t.rows * t.columns, 0, random, 0.3, 0.4);
      cpu::chunk_pack_table(t, values, vectors);
    }
  }
};

// Holds a model with random weights and the states of some streams of it.
struct Engine : Packed {
  int64_t slots;
  Buffer<float> states{slots * plan.state_floats};
  std::vector<ChunkCounters> counters;

  Engine(int64_t chunk, int64_t left, WeightFormat format, int64_t slots_)
      : Packed(ChunkPlan(ChunkShape(numbers(chunk, left, format)))),
        slots(slots_),
        counters(static_cast<size_t>(slots)) {
    states.set(0);
  }

  void reset(int64_t slot) {
    std::fill(state(slot), state(slot) + plan.state_floats, 0.0f);
    counters[slot] = {0, 0};
  }
  float* state(int64_t slot) { return states + slot * plan.state_floats; }
  int64_t inputs(int64_t bins) const { return plan.shape.input_frames() * bins; }
  int64_t outputs() const { return plan.shape.chunk / 2 * plan.shape.output_dim(); }

  // Runs a step on features and returns the result, a row for each of `of`. The scratch memory's contents do not
  // matter.
  std::vector<float> step(const std::vector<float>& features, const std::vector<int64_t>& of, int64_t bins = 14,
                          int64_t threads = 1) {
    const auto n = static_cast<int64_t>(of.size());
    Buffer<float> in(n * inputs(bins)), out(n * outputs()), scratch(plan.scratch_floats(n));
    std::copy(features.begin(), features.end(), in.data());
    scratch.set(std::numeric_limits<double>::quiet_NaN());
    cpu::kernels<cpu::ChunkKernels>().step({plan,
                                            reinterpret_cast<const char*>(weights.data()),
                                            vectors,
                                            states,
                                            counters.data(),
                                            of.data(),
                                            n,
                                            bins,
                                            scratch,
                                            {threads, run_threads}},
                                           in, out);
    return {out.data(), out + out.size()};
  }
};

std::vector<float> random_features(Random& random, int64_t n) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = static_cast<float>(random.normal());
  return x;
}

// Returns row i of n rows of equal length.
std::vector<float> row_of(const std::vector<float>& rows, size_t n, size_t i) {
  const size_t width = rows.size() / n;
  return {rows.begin() + static_cast<int64_t>(i * width), rows.begin() + static_cast<int64_t>((i + 1) * width)};
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Streams of any age in a call, in any order, on any number of threads have the bits that they have alone. Rings turn
// over several times.
void streams(int64_t chunk, int64_t left, WeightFormat format) {
  constexpr int64_t kSlots = 3;
  Engine together(chunk, left, format, kSlots), alone(chunk, left, format, kSlots);
  Random random(11);
  for (int step = 0; step < 12; step++) {
    std::vector<int64_t> of;
    for (int64_t slot = 0; slot < kSlots; slot++)
      if (random.bits() % 4) of.insert(of.begin() + static_cast<int64_t>(random.bits() % (of.size() + 1)), slot);
    if (of.empty()) of = {step % kSlots};
    if (step == 7) together.reset(of[0]), alone.reset(of[0]);
    const std::vector<float> x = random_features(random, static_cast<int64_t>(of.size()) * together.inputs(14));
    const std::vector<float> y = together.step(x, of, 14, 1 + step % 3);
    for (const float v : y) CHECK(std::isfinite(v), "not finite");
    for (size_t i = 0; i < of.size(); i++)
      CHECK(same(alone.step(row_of(x, of.size(), i), {of[i]}), row_of(y, of.size(), i)), "step %d, stream %ld of %zu",
            step, long(of[i]), of.size());
    CHECK(together.states.equals(alone.states), "states at step %d", step);
  }
}

// A stream that is exported and imported elsewhere goes on with the same bits, wherever its rings stand.
void moves(WeightFormat format) {
  Engine e(4, 8, format, 2);
  Random random(13);
  std::vector<std::vector<float>> tensors;
  for (const ChunkPlan::Stack& s : e.plan.stacks)
    for (int64_t i = 0; i < s.shape.layers * kLayerStates; i++)
      tensors.emplace_back(static_cast<size_t>(cpu::layer_state_floats(s, i % kLayerStates, 1)));
  tensors.emplace_back(static_cast<size_t>(e.plan.shape.maps[2] * cpu::kFrontPast * e.plan.shape.width3()));
  std::vector<float*> to;
  for (std::vector<float>& t : tensors) to.push_back(t.data());
  for (int step = 0; step < 9; step++) {
    e.step(random_features(random, e.inputs(14)), {0});
    cpu::chunk_export(e.plan, e.state(0), e.counters[0], to.data());
    cpu::chunk_import(e.plan, to.data(), e.state(1), &e.counters[1]);
    e.counters[1].processed = e.counters[0].processed;
    const std::vector<float> x = random_features(random, e.inputs(14));
    CHECK(same(e.step(x, {0}), e.step(x, {1})), "step %d", step);
  }
}

// It takes fewer features than the plan's that give maps of the same width; values that are not finite stay in their
// stream.
void features(WeightFormat format) {
  for (const int64_t bins : {11, 12, 13}) {
    Engine e(4, 8, format, 2);
    Random random(17);
    for (int step = 0; step < 5; step++) {
      std::vector<float> x = random_features(random, 2 * e.inputs(bins));
      if (step == 1) x[3] = std::numeric_limits<float>::quiet_NaN();
      const std::vector<float> y = e.step(x, {0, 1}, bins);
      for (const float v : row_of(y, 2, 1)) CHECK(std::isfinite(v), "%ld bins: not finite beside a NaN", long(bins));
      CHECK((step >= 1) == std::isnan(y[0]), "%ld bins: where a NaN is, step %d", long(bins), step);
    }
  }
}

// Where products round their inputs, and how far rounded weights move the output from that of fp32.
void rounding(WeightFormat format, double most) {
  constexpr int64_t kBins = 14;
  Engine exact(4, 8, WeightFormat::fp32, 1), rounded(4, 8, format, 1);
  const bool both = format != WeightFormat::fp16 && cpu::reduced_gemm_kernels(format).gains();
  CHECK(rounded.plan.shape.rounds_inputs() == both && rounded.plan.conv3.rounds_inputs == both, "which products");
  CHECK(!rounded.plan.conv2.rounds_inputs && !exact.plan.stacks[0].layers[0].scores.rounds_inputs, "fp32 products");
  CHECK((rounded.plan.expand.format == WeightFormat::fp32) == !both, "the front end's weights");
  Random random(19);
  double difference = 0, size = 0;
  for (int step = 0; step < 5; step++) {
    const std::vector<float> x = random_features(random, exact.inputs(kBins));
    const std::vector<float> y = exact.step(x, {0}), z = rounded.step(x, {0});
    for (size_t i = 0; i < y.size(); i++)
      difference += std::pow(static_cast<double>(y[i]) - z[i], 2), size += std::pow(static_cast<double>(y[i]), 2);
  }
  const double error = std::sqrt(difference / size);
  CHECK(error > 1e-5 && error <= most, "the output changes by %g", error);
}

void shapes() {
  CHECK(!ChunkShape(numbers(4, 8, WeightFormat::fp32)).stacks.empty(), "a shape");
  const auto refused = [](auto change) {
    std::vector<int64_t> n = numbers(4, 8, WeightFormat::fp32);
    change(n);
    return ChunkShape(n).stacks.empty();
  };
  CHECK(refused([](auto& n) { n.pop_back(); }), "half a stack");
  CHECK(refused([](auto& n) { n.resize(8); }), "no stack");
  CHECK(refused([](auto& n) { n[0] = 5; }), "an odd chunk");
  CHECK(refused([](auto& n) { n[1] = 7; }), "a context that a factor does not divide");
  CHECK(refused([](auto& n) { n[1] = -2; }), "a negative context");
  CHECK(refused([](auto& n) { n[7] = 4; }), "another format");
  CHECK(refused([](auto& n) { n[15] = 4; }), "an even number of taps");
  CHECK(refused([](auto& n) { n[8] = 0; }), "no channels");
}

// ---------------------------------------------------------------- a layer alone, with upstream's states

constexpr cpu::ZipformerSizes kOdd{21, 1, 1, 3, 4, 18, 3, 7, {20, 70, 6}, 17};

// The inputs or outputs: x or y first, then the states.
using Tensors = std::vector<std::vector<float>>;

Tensors run(Packed& layer, const Tensors& in, const std::vector<uint8_t>& masked, int64_t streams, int64_t threads) {
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
  cpu::layer_step({.plan = plan,
                   .weights = reinterpret_cast<const char*>(layer.weights.data()),
                   .vectors = layer.vectors,
                   .streams = streams,
                   .scratch = scratch,
                   .workers = {threads, run_threads},
                   .masked = masked.empty() ? nullptr : masked.data()},
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

void streams_of_a_layer(int64_t frames, int64_t left, bool with_mask) {
  constexpr int64_t kStreams = 3;
  Packed layer(ChunkPlan(kOdd, frames, left));
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

TEST_CASE("zipformer_chunk") {
  shapes();
  rounding(WeightFormat::bf16, 4e-3);
  rounding(WeightFormat::fp16, 5e-4);
  rounding(WeightFormat::int8, 2e-2);
  for (const WeightFormat format : {WeightFormat::fp32, WeightFormat::bf16, WeightFormat::int8, WeightFormat::fp16}) {
    for (const auto& [chunk, left] : {std::pair{2, 2}, std::pair{4, 8}, std::pair{8, 0}, std::pair{6, 24}})
      streams(chunk, left, format);
    moves(format);
    features(format);
  }
}

TEST_CASE("zipformer_layer_step") {
  for (const bool masked : {false, true}) {
    streams_of_a_layer(4, 6, masked);
    streams_of_a_layer(1, 5, masked);
    streams_of_a_layer(9, 4, masked);
    streams_of_a_layer(3, 0, masked);
    streams_of_a_layer(8, 32, masked);
  }
}

}  // namespace fastasr::test
