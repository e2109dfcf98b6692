// SPDX-License-Identifier: Apache-2.0
#include "cpu/streaming/zipformer_chunk.h"

#include <algorithm>
#include <thread>

#include "cpu/streaming/zipformer_chunk_rows.h"
#include "tests/check.h"

// The whole chunk's values are compared with the model's own code in tests/streaming. These tests check the pieces,
// what is read and written, and that a stream's bits depend on nothing but the stream.
namespace fastasr::test {
namespace {

using cpu::ChunkCounters;
using cpu::ChunkPlan;
using cpu::ChunkShape;
using cpu::kChunkLanes;
using cpu::WeightFormat;

void run_threads(int64_t parts, void (*part)(const void*, int64_t), const void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < parts; i++) threads.emplace_back(part, context, i);
  for (std::thread& t : threads) t.join();
}

// Nothing is a multiple of a vector; the widest stack is neither the first nor the last.
std::vector<int64_t> numbers(int64_t chunk, int64_t left, WeightFormat weights) {
  std::vector<int64_t> n = {chunk, left, 14, 3, 5, 6, 11, static_cast<int64_t>(weights)};
  constexpr int64_t kStacks[3][12] = {{10, 1, 1, 2, 5, 3, 2, 5, 12, 9, 7, 8},
                                      {21, 2, 2, 3, 4, 18, 3, 7, 20, 70, 6, 17},
                                      {18, 1, 1, 1, 7, 6, 1, 3, 5, 4, 3, 13}};
  for (const auto& stack : kStacks) n.insert(n.end(), std::begin(stack), std::end(stack));
  return n;
}

// Holds a model with random weights and the states of some streams of it.
struct Engine {
  ChunkPlan plan;
  int64_t slots;
  Buffer<float> weights, vectors, states;
  std::vector<ChunkCounters> counters;

  Engine(int64_t chunk, int64_t left, WeightFormat format, int64_t slots_)
      : plan(ChunkShape(numbers(chunk, left, format))),
        slots(slots_),
        weights((plan.weight_bytes + 3) / 4),
        vectors(plan.vector_floats),
        states(slots * plan.state_floats),
        counters(static_cast<size_t>(slots), ChunkCounters{0, 0}) {
    Random random(5);
    std::fill(vectors.data(), vectors.data() + vectors.size(), 0.0f);
    std::fill(states.data(), states.data() + states.size(), 0.0f);
    for (size_t i = 0; i < plan.products.size(); i++) {
      const cpu::ChunkProduct& p = plan.products[i];
      Buffer<float> w(p.outputs * p.inputs), bias(p.outputs);
      w.fill(random, 1 / std::sqrt(static_cast<double>(p.inputs)));
      bias.fill(random, 0.3);
      cpu::chunk_pack_product(plan, static_cast<int64_t>(i), w.data(), i % 5 ? bias.data() : nullptr,
                              reinterpret_cast<char*>(weights.data()), vectors.data());
    }
    for (const cpu::ChunkTable& t : plan.tables) {
      Buffer<float> values(t.rows * t.columns);
      values.fill(random, 0.3, 0.4);
      cpu::chunk_pack_table(t, values.data(), vectors.data());
    }
    CHECK(weights.intact() && vectors.intact(), "packing wrote outside");
  }

  void reset(int64_t slot) {
    std::fill(state(slot), state(slot) + plan.state_floats, 0.0f);
    counters[static_cast<size_t>(slot)] = {0, 0};
  }
  float* state(int64_t slot) { return states.data() + slot * plan.state_floats; }
  int64_t inputs(int64_t bins) const { return plan.shape.input_frames() * bins; }
  int64_t outputs() const { return plan.shape.chunk / 2 * plan.shape.output_dim(); }

  // Runs a step on features and returns the result, a row for each of `of`. The scratch memory's contents do not
  // matter.
  std::vector<float> step(const std::vector<float>& features, const std::vector<int64_t>& of, int64_t bins = 14,
                          int64_t threads = 1) {
    const auto n = static_cast<int64_t>(of.size());
    Buffer<float> in(n * inputs(bins)), out(n * outputs()), scratch(plan.scratch_floats(n));
    std::copy(features.begin(), features.end(), in.data());
    std::fill(scratch.data(), scratch.data() + scratch.size(), std::numeric_limits<float>::quiet_NaN());
    cpu::kernels<cpu::ChunkKernels>().step({plan,
                                            reinterpret_cast<const char*>(weights.data()),
                                            vectors.data(),
                                            states.data(),
                                            counters.data(),
                                            of.data(),
                                            n,
                                            bins,
                                            scratch.data(),
                                            {threads, run_threads}},
                                           in.data(), out.data());
    CHECK(in.intact() && out.intact() && scratch.intact() && states.intact() && vectors.intact() && weights.intact(),
          "wrote outside");
    return {out.data(), out.data() + out.size()};
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
    for (int64_t i = 0; i < s.shape.layers; i++)
      for (const int64_t n :
           {s.left * s.shape.heads * s.shape.query, s.left * s.shape.hidden, s.left * s.shape.heads * s.shape.value,
            s.left * s.shape.heads * s.shape.value, s.shape.dim * s.pad, s.shape.dim * s.pad})
        tensors.emplace_back(static_cast<size_t>(n));
  tensors.emplace_back(static_cast<size_t>(e.plan.shape.maps[2] * cpu::kFrontPast * e.plan.shape.width3()));
  std::vector<float*> to;
  for (std::vector<float>& t : tensors) to.push_back(t.data());
  for (int step = 0; step < 9; step++) {
    e.step(random_features(random, e.inputs(14)), {0});
    cpu::chunk_export(e.plan, e.state(0), e.counters[0], to.data());
    cpu::chunk_import(e.plan, to.data(), e.state(1), &e.counters[1]);
    e.counters[1].processed = e.counters[0].processed;
    CHECK(e.states.intact(), "wrote outside");
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
  CHECK(refused([](auto& n) { n[7] = 3; }), "another format");
  CHECK(refused([](auto& n) { n[15] = 4; }), "an even number of taps");
  CHECK(refused([](auto& n) { n[8] = 0; }), "no channels");
}

// ---------------------------------------------------------------- the pieces, against long double

bool near(float got, long double expected, long double size, long double ulps) {
  return std::fabs(got - expected) <= size * ulps * 0x1p-24L + 1e-30L;
}

void attention(int64_t frames, int64_t keys) {
  constexpr int64_t kQuery = 5, kPos = 3, kStride = 11, kColumns = 13;
  const int64_t padded = cpu::round_up(keys, kChunkLanes), capacity = padded + 5;
  const int64_t stride = padded + frames + kChunkLanes;
  Random random(static_cast<uint64_t>(frames * 100 + keys));
  Buffer<float> q(frames * kStride), p(frames * kStride), k(kQuery * capacity), positions(kPos * stride);
  Buffer<float> scores(frames * padded), values(keys * kChunkLanes), out(frames * kColumns);
  for (Buffer<float>* t : {&q, &p, &k, &positions, &values}) t->fill(random);
  cpu::kernels<cpu::ChunkRows>().scores({q.data(), p.data(), kStride, frames, keys, kQuery, kPos, k.data(), capacity,
                                         positions.data(), stride, scores.data()});
  CHECK(scores.intact(), "wrote outside");
  for (int64_t i = 0; i < frames; i++)
    for (int64_t j = 0; j < keys; j++) {
      long double sum = 0, size = 0;
      const auto term = [&](long double v) { sum += v, size += std::fabs(v); };
      for (int64_t d = 0; d < kQuery; d++) term(static_cast<long double>(q[i * kStride + d]) * k[d * capacity + j]);
      for (int64_t d = 0; d < kPos; d++)
        term(static_cast<long double>(p[i * kStride + d]) * positions[d * stride + frames - 1 - i + j]);
      CHECK(near(scores[i * padded + j], sum, size, kQuery + kPos), "score %ld, %ld", long(i), long(j));
    }
  for (const int64_t unseen : {int64_t{0}, keys / 2}) {
    Buffer<float> w(frames * padded);
    std::copy(scores.data(), scores.data() + scores.size(), w.data());
    cpu::kernels<cpu::ChunkRows>().softmax(w.data(), padded, frames, unseen, nullptr, keys);
    cpu::kernels<cpu::ChunkRows>().weighted(w.data(), padded, frames, keys, values.data(), kChunkLanes, out.data(),
                                            kColumns, kColumns);
    CHECK(w.intact() && out.intact(), "wrote outside");
    for (int64_t i = 0; i < frames; i++) {
      long double total = 0, most = -1e30L;
      for (int64_t j = unseen; j < keys; j++) most = std::max<long double>(most, scores[i * padded + j]);
      for (int64_t j = unseen; j < keys; j++) total += std::exp(scores[i * padded + j] - most);
      for (int64_t j = 0; j < keys; j++) {
        const long double e = j < unseen ? 0 : std::exp(scores[i * padded + j] - most) / total;
        CHECK(near(w[i * padded + j], e, e, 16 + 4 * std::fabs(most - scores[i * padded + j])), "weight %ld, %ld",
              long(i), long(j));
      }
      for (int64_t c = 0; c < kColumns; c++) {
        long double sum = 0, size = 0;
        for (int64_t j = 0; j < keys; j++) {
          const long double v = static_cast<long double>(w[i * padded + j]) * values[j * kChunkLanes + c];
          sum += v, size += std::fabs(v);
        }
        CHECK(near(out[i * kColumns + c], sum, size, static_cast<long double>(keys)), "value %ld, %ld", long(i),
              long(c));
      }
    }
  }
}

void convolution(int64_t frames, int64_t pad, int64_t columns) {
  constexpr int64_t kStride = 19, kTable = 18, kOut = 17;
  const int64_t taps = 2 * pad + 1;
  Random random(static_cast<uint64_t>(frames * 100 + pad));
  Buffer<float> u((pad + frames) * kStride), causal((pad + 1) * kTable), chunkwise(taps * kTable),
      scale(frames * kTable), bias(kTable), other(kTable), out(frames * kOut);
  for (Buffer<float>* t : {&u, &causal, &chunkwise, &scale, &bias, &other}) t->fill(random);
  cpu::kernels<cpu::ChunkRows>().convolution({u.data(), kStride, frames, pad, causal.data(), bias.data(),
                                              chunkwise.data(), other.data(), scale.data(), kTable, out.data(), kOut,
                                              columns});
  CHECK(out.intact(), "wrote outside");
  for (int64_t t = 0; t < frames; t++)
    for (int64_t c = 0; c < columns; c++) {
      long double past = bias[c], around = other[c], size = std::fabs(past) + std::fabs(around);
      for (int64_t j = 0; j <= pad; j++) {
        const long double v = static_cast<long double>(causal[j * kTable + c]) * u[(t + j) * kStride + c];
        past += v, size += std::fabs(v);
      }
      for (int64_t j = 0; j < taps; j++) {
        if (t + j < pad || t + j >= pad + frames) continue;
        const long double v = static_cast<long double>(chunkwise[j * kTable + c]) * u[(t + j) * kStride + c];
        around += v, size += std::fabs(v * scale[t * kTable + c]);
      }
      size *= 1 + std::fabs(scale[t * kTable + c]);
      CHECK(near(out[t * kOut + c], past + around * scale[t * kTable + c], size, static_cast<long double>(taps)),
            "convolution %ld, %ld", long(t), long(c));
    }
}

void resampling(int64_t factor) {
  constexpr int64_t kRows = 3, kStride = 21, kWidth = 19;
  Random random(static_cast<uint64_t>(factor));
  Buffer<float> x(kRows * factor * kStride), weight(factor), scale(kStride), y(kRows * kStride), z(x.size());
  for (Buffer<float>* t : {&x, &weight, &scale}) t->fill(random);
  std::copy(x.data(), x.data() + x.size(), z.data());
  cpu::kernels<cpu::ChunkRows>().downsample(x.data(), kStride, weight.data(), factor, y.data(), kRows, kStride,
                                            kStride);
  cpu::kernels<cpu::ChunkRows>().combine(z.data(), y.data(), scale.data(), factor, kRows * factor, kStride);
  CHECK(y.intact() && z.intact(), "wrote outside");
  for (int64_t t = 0; t < kRows; t++)
    for (int64_t c = 0; c < kWidth; c++) {
      long double sum = 0, size = 0;
      for (int64_t i = 0; i < factor; i++) {
        const long double v = static_cast<long double>(weight[i]) * x[(t * factor + i) * kStride + c];
        sum += v, size += std::fabs(v);
      }
      CHECK(near(y[t * kStride + c], sum, size, static_cast<long double>(factor)), "downsampled %ld, %ld", long(t),
            long(c));
      for (int64_t i = 0; i < factor; i++) {
        const long double a = x[(t * factor + i) * kStride + c], b = y[t * kStride + c];
        CHECK(near(z[(t * factor + i) * kStride + c], a + (b - a) * scale[c],
                   std::fabs(a) + (std::fabs(a) + std::fabs(b)) * std::fabs(scale[c]), 3),
              "combined %ld, %ld", long(t), long(c));
      }
    }
}

}  // namespace

TEST_CASE("zipformer_chunk") {
  shapes();
  for (const int64_t frames : {1, 2, 3, 4, 7, 8})
    for (const int64_t keys : {frames, frames + 5, int64_t{16}, int64_t{40}}) attention(frames, keys);
  for (const int64_t frames : {1, 2, 5, 16})
    for (const int64_t pad : {1, 3, 7}) convolution(frames, pad, frames == 5 ? 16 : 11);
  for (const int64_t factor : {1, 2, 4}) resampling(factor);
  for (const WeightFormat format : {WeightFormat::fp32, WeightFormat::bf16, WeightFormat::int8}) {
    for (const auto& [chunk, left] : {std::pair{2, 2}, std::pair{4, 8}, std::pair{8, 0}, std::pair{6, 24}})
      streams(chunk, left, format);
    moves(format);
    features(format);
  }
}

}  // namespace fastasr::test
