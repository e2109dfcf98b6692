// SPDX-License-Identifier: Apache-2.0
#include "cpu/decoding/greedy_search.h"

#include "tests/check.h"

// Values are compared with a loop over one sequence in tests/models/test_label_looping.py. These tests check what is
// read and written, and that a sequence's bits depend on nothing but the sequence.
namespace fastasr::test {
namespace {

using cpu::GreedyLayout;
using cpu::GreedyShape;
using cpu::WeightFormat;

struct Transducer {
  GreedyLayout layout;
  Buffer<float> arena, embedding;

  explicit Transducer(const GreedyShape& s) : layout(s), arena(layout.bytes / 4), embedding(s.tokens * s.embedding, 0) {
    Random random(7);
    for (int64_t i = 0; i < embedding.size(); i++) embedding[i] = static_cast<float>(random.normal());
    auto* const bytes = reinterpret_cast<char*>(&arena[0]);
    for (int64_t i = 0; i < s.layers; i++) {
      const int64_t inputs = layout.product[i].inputs - s.hidden;
      Buffer<float> w_ih(4 * s.hidden * inputs, 0, random, 0.3), w_hh(4 * s.hidden * s.hidden, 0, random, 0.3);
      Buffer<float> b_ih(4 * s.hidden, 0, random), b_hh(4 * s.hidden, 0, random);
      cpu::greedy_pack_lstm(layout, i, w_ih, w_hh, b_ih, b_hh, bytes);
      const float* const norm[4] = {w_ih, b_ih, w_hh, b_hh};  // any numbers, as many as it takes
      if (s.gate_norm) cpu::greedy_pack_gate_norm(layout, i, norm, bytes);
    }
    for (const bool head : {false, true}) {
      const GreedyLayout::Product& p = head ? layout.head() : layout.projector();
      Buffer<float> weight(p.outputs * p.inputs, 0, random, 0.5), bias(p.outputs, 0, random);
      cpu::greedy_pack_linear(layout, head, weight, bias, bytes);
    }
    Buffer<float> convolution(s.embedding * s.group * s.context, 0, random), weight(s.joint, 0, random),
        bias(s.joint, 0, random);
    cpu::greedy_pack_vectors(layout, convolution, weight, bias, bytes);
  }
};

struct Found {
  std::vector<int64_t> tokens, moves, steps;
  std::vector<float> scores;
};

// Searches sequences [first, first + batch) of `all` with these lengths.
Found search(Transducer& t, const std::vector<float>& all, int64_t frames, const std::vector<int64_t>& lengths,
             int64_t first, int64_t batch, bool together, int64_t threads) {
  const GreedyShape& s = t.layout.shape;
  constexpr int64_t kMost = 50;
  Buffer<float> encoded(batch * frames * s.joint), state(batch * t.layout.state_floats);
  Buffer<int64_t> counters(batch * t.layout.counter_fields), tokens(batch * kMost), moves(batch * kMost), steps(batch);
  Buffer<float> scores(batch * kMost);
  for (int64_t i = 0; i < encoded.size(); i++) encoded[i] = all[static_cast<size_t>(first * frames * s.joint + i)];
  for (int64_t i = 0; i < state.size(); i++) state[i] = 0;
  for (int64_t i = 0; i < counters.size(); i++) counters[i] = 0;
  for (int64_t n = 0; n < batch; n++) counters[n * t.layout.counter_fields + cpu::kGreedyPending] = 1;
  const int64_t durations[] = {0, 1, 2};
  cpu::GreedyBatch b{t.layout,
                     reinterpret_cast<const char*>(&t.arena[0]),
                     t.embedding,
                     {encoded, s.joint, frames * s.joint},
                     batch,
                     frames,
                     lengths.data() + first,
                     durations,
                     0,
                     s.tokens - 1,
                     3,
                     0.5f,
                     together,
                     state,
                     counters,
                     kMost,
                     tokens,
                     moves,
                     scores,
                     steps,
                     nullptr,
                     {threads, run_threads}};
  const auto& kernel = cpu::kernels<cpu::GreedyKernels>();
  Buffer<float> scratch(kernel.scratch_floats(b));
  b.scratch = scratch;
  kernel.run(b);
  Found found;
  for (int64_t n = 0; n < batch; n++) {
    found.steps.push_back(steps[n]);
    for (int64_t i = 0; i < steps[n]; i++) {
      found.tokens.push_back(tokens[n * kMost + i]);
      found.moves.push_back(moves[n * kMost + i]);
      found.scores.push_back(scores[n * kMost + i]);
    }
  }
  return found;
}

void companions(const GreedyShape& s) {
  INFO("layers ", s.layers, " durations ", s.durations, " format ", static_cast<int64_t>(s.format));
  Transducer t(s);
  constexpr int64_t kBatch = 35, kFrames = 7;  // more rows than a product takes
  Random random(3);
  std::vector<float> encoded(static_cast<size_t>(kBatch * kFrames * s.joint));
  for (float& f : encoded) f = static_cast<float>(random.normal());
  std::vector<int64_t> lengths;
  for (int64_t n = 0; n < kBatch; n++) lengths.push_back(n % (kFrames + 1));
  const Found all = search(t, encoded, kFrames, lengths, 0, kBatch, false, 1);
  const Found split = search(t, encoded, kFrames, lengths, 0, kBatch, false, 3);
  CHECK(all.tokens == split.tokens && all.moves == split.moves && all.steps == split.steps, "threads");
  CHECK(std::memcmp(all.scores.data(), split.scores.data(), 4 * all.scores.size()) == 0, "threads");
  size_t at = 0;
  for (int64_t n = 0; n < kBatch; n++) {
    const Found one = search(t, encoded, kFrames, lengths, n, 1, false, 1);
    CHECK(one.steps[0] == all.steps[static_cast<size_t>(n)], "sequence %ld", long(n));
    for (size_t i = 0; i < one.tokens.size(); i++, at++)
      CHECK(one.tokens[i] == all.tokens[at] && one.moves[i] == all.moves[at] && one.scores[i] == all.scores[at],
            "sequence %ld", long(n));
  }
  const Found together = search(t, encoded, kFrames, lengths, 0, kBatch, true, 1);
  for (const int64_t steps : together.steps) CHECK(steps == together.steps[0] && steps > 0);
}

}  // namespace

TEST_CASE("greedy_search: a sequence depends on nothing but itself") {
  for (const WeightFormat format : {WeightFormat::fp32, WeightFormat::bf16, WeightFormat::int8, WeightFormat::fp16})
    for (const int64_t durations : {0, 3}) {
      companions({90, durations, 33, 24, 2, 37, 1, 0, static_cast<int64_t>(2), false, false, 0, 0, format});
      companions({20, durations, 9, 8, 1, 5, 1, 0, static_cast<int64_t>(3), true, true, 1e-3, 1e-5, format});
      companions({17, durations, 12, 16, 0, 0, 2, 4, static_cast<int64_t>(3), false, false, 0, 0, format});
    }
}

}  // namespace fastasr::test
