// SPDX-License-Identifier: Apache-2.0
#include "cpu/streaming/zipformer_layer_step.h"

#include <vector>

#include "bindings/packed_weights.h"
#include "bindings/pooled.h"

namespace fastasr::bindings::zipformer_layer_step {
namespace {

using cpu::ChunkPlan;

// numbers holds the 12 of cpu::ChunkStack, whose factor and layers are 1.
ChunkPlan plan_of(const std::vector<int64_t>& numbers, int64_t frames, int64_t left) {
  check(numbers.size() == 12 && frames > 0 && left >= 0, "zipformer_layer", "the numbers describe no layer");
  const int64_t* s = numbers.data();
  check(*std::min_element(s, s + 12) >= 1 && s[1] == 1 && s[2] == 1 && s[7] % 2 == 1, "zipformer_layer",
        "the numbers describe no layer");
  return {cpu::ChunkStack{s[0], 1, 1, s[3], s[4], s[5], s[6], s[7], {s[8], s[9], s[10]}, s[11]}, frames, left};
}

// Packs the matrices into panels; they do not depend on the size of a chunk.
Tensor zipformer_layer_weights(std::vector<int64_t> numbers, std::vector<Tensor> weights) {
  const ChunkPlan plan = plan_of(numbers, 1, 0);
  const auto count = static_cast<int64_t>(plan.products.size());
  check(static_cast<int64_t>(weights.size()) == count, "zipformer_layer_weights", "expected ", count, " weights, got ",
        weights.size());
  for (size_t i = 0; i < weights.size(); i++)
    check_floats(weights[i], plan.products[i].outputs * plan.products[i].inputs, "a weight");
  const Tensor packed = on_huge_pages(weights[0], (plan.weight_bytes + 3) / 4);
  auto* const to = reinterpret_cast<char*>(mutable_data<float>(packed));
  parallel_range(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      cpu::chunk_pack_product(plan, i, data<float>(weights[static_cast<size_t>(i)]), nullptr, to, nullptr);
  });
  return packed;
}

// Packs everything else that does not change from chunk to chunk of one size.
Tensor zipformer_layer_vectors(std::vector<int64_t> numbers, int64_t frames, int64_t left, std::vector<Tensor> biases,
                               std::vector<Tensor> tables) {
  const ChunkPlan plan = plan_of(numbers, frames, left);
  check(biases.size() == plan.products.size() && tables.size() == plan.tables.size(), "zipformer_layer_vectors",
        "expected ", plan.products.size(), " biases and ", plan.tables.size(), " tables, got ", biases.size(), " and ",
        tables.size());
  const Tensor vectors = new_contiguous(biases[0], {plan.vector_floats});
  auto* const to = mutable_data<float>(vectors);
  std::fill(to, to + plan.vector_floats, 0.0f);
  for (size_t i = 0; i < biases.size(); i++) {
    check_floats(biases[i], plan.products[i].outputs, "a bias");
    cpu::chunk_pack_product(plan, static_cast<int64_t>(i), nullptr, data<float>(biases[i]), nullptr, to);
  }
  for (size_t i = 0; i < tables.size(); i++) {
    check_floats(tables[i], plan.tables[i].rows * plan.tables[i].columns, "a table");
    cpu::chunk_pack_table(plan.tables[i], data<float>(tables[i]), to);
  }
  return vectors;
}

// Takes x (frames, streams, dim), the six states as cpu::layer_step has them, and masked (streams, left + frames) or
// none. Returns y and the six states after it.
std::vector<Tensor> zipformer_layer_step(std::vector<int64_t> numbers, int64_t left, Tensor weights, Tensor vectors,
                                         Tensor x, std::vector<Tensor> states, std::optional<Tensor> masked,
                                         int64_t threads) {
  check(x.dim() == 3, "zipformer_layer_step", "x");
  const int64_t frames = x.size(0), streams = x.size(1);
  const ChunkPlan plan = plan_of(numbers, frames, left);
  check_floats(x, frames * streams * plan.stacks[0].shape.dim, "x");
  check_floats(weights, (plan.weight_bytes + 3) / 4, "weights");
  check_floats(vectors, plan.vector_floats, "vectors");
  check(static_cast<int64_t>(states.size()) == cpu::kLayerStates, "zipformer_layer_step", "states");
  if (masked)
    check(masked->is_cpu() && dtype_of(*masked) == ScalarType::Bool && masked->is_contiguous() &&
              masked->numel() == streams * (left + frames),
          "zipformer_layer_step", "masked");
  std::vector<Tensor> out{new_contiguous(x)};
  const float* before[cpu::kLayerStates];
  float* after[cpu::kLayerStates];
  for (int64_t i = 0; i < cpu::kLayerStates; i++) {
    const Tensor& state = states[static_cast<size_t>(i)];
    check_floats(state, cpu::layer_state_floats(plan, i, streams), "a state");
    out.push_back(new_contiguous(state));
    before[i] = data<float>(state), after[i] = mutable_data<float>(out.back());
  }
  const Scratch<float> scratch(cpu::layer_scratch_floats(plan, streams));
  cpu::layer_step({plan,
                   reinterpret_cast<const char*>(data<float>(weights)),
                   data<float>(vectors),
                   data_or_null<uint8_t>(masked),
                   streams,
                   scratch.data(),
                   {threads, run_parts}},
                  data<float>(x), before, mutable_data<float>(out[0]), after);
  return out;
}

}  // namespace

FASTASR_OPERATORS({"zipformer_layer_weights(int[] numbers, Tensor[] weights) -> Tensor",
                   Boxed<zipformer_layer_weights>::call},
                  {"zipformer_layer_vectors(int[] numbers, int frames, int left, Tensor[] biases, Tensor[] tables)"
                   " -> Tensor",
                   Boxed<zipformer_layer_vectors>::call},
                  {"zipformer_layer_step(int[] numbers, int left, Tensor weights, Tensor vectors, Tensor x, "
                   "Tensor[] states, Tensor? masked, int threads) -> Tensor[]",
                   Boxed<zipformer_layer_step>::call})

}  // namespace fastasr::bindings::zipformer_layer_step
