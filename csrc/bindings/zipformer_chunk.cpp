// SPDX-License-Identifier: Apache-2.0
#include "cpu/streaming/zipformer_chunk.h"

#include "bindings/packed_weights.h"
#include "bindings/scratch.h"

namespace fastasr::bindings::zipformer_chunk {
namespace {

using cpu::ChunkPlan;
using cpu::ChunkShape;

int64_t weight_floats(const ChunkPlan& plan) { return (plan.weight_bytes + 3) / 4; }

ChunkPlan plan_of(const std::vector<int64_t>& sizes) {
  const ChunkShape shape(sizes);
  check(!shape.stacks.empty(), "zipformer_chunk", "the sizes describe no encoder that this step serves");
  return ChunkPlan(shape);
}

// Returns the plan of one layer.
ChunkPlan plan_of(const std::vector<int64_t>& sizes, int64_t frames, int64_t left) {
  const std::vector<cpu::ZipformerSizes> layer = cpu::read_stacks(sizes, 0);
  check(layer.size() == 1 && layer[0].factor == 1 && layer[0].layers == 1 && frames > 0 && left >= 0, "zipformer_layer",
        "the sizes describe no layer");
  return {layer[0], frames, left};
}

// Returns the names of an encoder's sizes, of a stack's and of a layer's products, in their order.
std::string zipformer_chunk_names() {
  std::string names;
  const auto add = [&](const char* name, const auto&...) { names += name, names += ' '; };
  ChunkShape().each_size(add);
  names += '|';
  cpu::ZipformerSizes sizes{};
  sizes.each_size(add);
  names += '|';
  cpu::ZipformerProducts<int>().each_product(sizes, add);
  return names;
}

// Returns the floats of weights, of vectors, of a stream's states, and of the scratch memory of `streams` streams.
std::vector<int64_t> zipformer_chunk_floats(std::vector<int64_t> sizes, int64_t streams) {
  const ChunkPlan plan = plan_of(sizes);
  return {weight_floats(plan), plan.vector_floats, plan.state_floats, plan.scratch_floats(streams)};
}

// Packs weights and biases of the plan's products; either list may be empty, and its target is then null.
void pack_products(const ChunkPlan& plan, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                   float* packed, float* vectors) {
  const size_t count = plan.products.size();
  for (const auto* list : {&weights, &biases})
    check(list->empty() || list->size() == count, "zipformer_chunk", "expected ", count,
          list == &weights ? " weights, got " : " biases, got ", list->size());
  for (size_t i = 0; i < weights.size(); i++)
    check_floats(weights[i], plan.products[i].outputs * plan.products[i].inputs, "a weight");
  for (size_t i = 0; i < biases.size(); i++) check_floats(biases[i], plan.products[i].outputs, "a bias");
  parallel_range(static_cast<int64_t>(count), 1, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); i++)
      cpu::chunk_pack_product(plan, static_cast<int64_t>(i), packed ? data<float>(weights[i]) : nullptr,
                              vectors ? data<float>(biases[i]) : nullptr, reinterpret_cast<char*>(packed), vectors);
  });
}

// Packs an encoder, or with `frames` a layer for chunks of so many. The order of products and tables: see
// cpu::ChunkPlan. Returns weights and vectors; without one of the lists a layer lacks what is made of it: its weights
// do not depend on the size of a chunk.
std::vector<Tensor> zipformer_chunk_pack(std::vector<int64_t> sizes, int64_t frames, int64_t left,
                                         std::vector<Tensor> weights, std::vector<Tensor> biases,
                                         std::vector<Tensor> tables) {
  const char* op = "zipformer_chunk_pack";
  const ChunkPlan plan = frames ? plan_of(sizes, frames, left) : plan_of(sizes);
  check(frames ? weights.empty() != biases.empty() : !weights.empty() && !biases.empty(), op, "no products");
  std::vector<Tensor> packed;
  float *words = nullptr, *vectors = nullptr;
  if (!weights.empty()) {
    packed.push_back(on_huge_pages(weights[0], weight_floats(plan)));
    words = mutable_data<float>(packed.back());
  }
  if (!biases.empty()) {
    packed.push_back(frames ? new_contiguous(biases[0], {plan.vector_floats})
                            : on_huge_pages(biases[0], plan.vector_floats));
    vectors = mutable_data<float>(packed.back());
    std::fill(vectors, vectors + plan.vector_floats, 0.0f);
    check(tables.size() == plan.tables.size(), op, "expected ", plan.tables.size(), " tables, got ", tables.size());
    for (size_t i = 0; i < tables.size(); i++) {
      check_floats(tables[i], plan.tables[i].rows * plan.tables[i].columns, "a table");
      cpu::chunk_pack_table(plan.tables[i], data<float>(tables[i]), vectors);
    }
  }
  pack_products(plan, weights, biases, words, vectors);
  return packed;
}

// states (slots, floats), counters (slots, 2) of int64; slots: one per stream, in the order of features.
Tensor zipformer_chunk_step(std::vector<int64_t> sizes, const Tensor& weights, const Tensor& vectors, Tensor states,
                            Tensor counters, Tensor scratch, const Tensor& features, std::vector<int64_t> slots,
                            int64_t threads) {
  const ChunkPlan plan = plan_of(sizes);
  const auto streams = static_cast<int64_t>(slots.size());
  check_floats(weights, weight_floats(plan), "weights");
  check_floats(vectors, plan.vector_floats, "vectors");
  check(states.dim() == 2, "zipformer_chunk_step", "states");
  check_floats(states, states.size(0) * plan.state_floats, "states");
  check(counters.is_cpu() && dtype_of(counters) == ScalarType::Long && counters.is_contiguous() &&
            counters.numel() == 2 * states.size(0),
        "zipformer_chunk_step", "counters");
  for (size_t i = 0; i < slots.size(); i++)
    check(slots[i] >= 0 && slots[i] < states.size(0) &&
              std::find(slots.begin(), slots.begin() + static_cast<int64_t>(i), slots[i]) ==
                  slots.begin() + static_cast<int64_t>(i),
          "zipformer_chunk_step", "slots");
  check(scratch.is_cpu() && scratch.is_contiguous() && dtype_of(scratch) == ScalarType::Float &&
            scratch.numel() >= plan.scratch_floats(streams),
        "zipformer_chunk_step", "scratch");
  check(features.dim() == 3, "zipformer_chunk_step", "features");
  const int64_t bins = features.size(2);
  check(bins <= plan.shape.bins && ChunkShape::width3_of(bins) == plan.shape.width3(), "zipformer_chunk_step",
        "the front end does not take ", bins, " features");
  check_floats(features, streams * plan.shape.input_frames() * bins, "features");
  const int64_t dim = plan.shape.output_dim(), frames = plan.shape.chunk / 2;
  Tensor out = new_contiguous(features, {streams, frames, dim});
  static_assert(sizeof(cpu::ChunkCounters) == 16);
  if (streams > 0)
    cpu::kernels<cpu::ChunkKernels>().step({plan,
                                            reinterpret_cast<const char*>(data<float>(weights)),
                                            data<float>(vectors),
                                            mutable_data<float>(states),
                                            reinterpret_cast<cpu::ChunkCounters*>(mutable_data<int64_t>(counters)),
                                            slots.data(),
                                            streams,
                                            bins,
                                            mutable_data<float>(scratch),
                                            {threads, run_parts}},
                                           data<float>(features), mutable_data<float>(out));
  return out;
}

// Takes x (frames, streams, dim), the six states as cpu::kLayerStates has them, and masked (streams, left + frames) or
// none. Returns y and the six states after it.
std::vector<Tensor> zipformer_layer_step(std::vector<int64_t> sizes, int64_t left, const Tensor& weights,
                                         const Tensor& vectors, const Tensor& x, std::vector<Tensor> states,
                                         const Optional& masked, int64_t threads) {
  check(x.dim() == 3, "zipformer_layer_step", "x");
  const int64_t frames = x.size(0), streams = x.size(1);
  const ChunkPlan plan = plan_of(sizes, frames, left);
  check_floats(x, frames * streams * plan.stacks[0].shape.dim, "x");
  check_floats(weights, weight_floats(plan), "weights");
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
    check_floats(state, cpu::layer_state_floats(plan.stacks[0], i, streams), "a state");
    out.push_back(new_contiguous(state));
    before[i] = data<float>(state), after[i] = mutable_data<float>(out.back());
  }
  const Scratch<float> scratch(cpu::layer_scratch_floats(plan, streams));
  cpu::layer_step({.plan = plan,
                   .weights = reinterpret_cast<const char*>(data<float>(weights)),
                   .vectors = data<float>(vectors),
                   .streams = streams,
                   .scratch = scratch.data(),
                   .workers = {threads, run_parts},
                   .masked = data_or_null<uint8_t>(masked)},
                  data<float>(x), before, mutable_data<float>(out[0]), after);
  return out;
}

// Copies a stream's states to `tensors`, or from them; see cpu::chunk_export.
void zipformer_chunk_states(std::vector<int64_t> sizes, Tensor states, Tensor counters, int64_t slot,
                            std::vector<Tensor> tensors, bool restore) {
  const ChunkPlan plan = plan_of(sizes);
  check(states.dim() == 2 && slot >= 0 && slot < states.size(0), "zipformer_chunk_states", "slot");
  check_floats(states, states.size(0) * plan.state_floats, "states");
  check(dtype_of(counters) == ScalarType::Long && counters.numel() == 2 * states.size(0), "zipformer_chunk_states",
        "counters");
  std::vector<float*> to;
  size_t at = 0;
  const auto take = [&](int64_t numel) {
    check(at < tensors.size(), "zipformer_chunk_states", "expected more than ", tensors.size(), " tensors");
    check_floats(tensors[at], numel, "a state");
    to.push_back(mutable_data<float>(tensors[at++]));
  };
  for (const ChunkPlan::Stack& stack : plan.stacks)
    for (int64_t i = 0; i < stack.shape.layers * cpu::kLayerStates; i++)
      take(cpu::layer_state_floats(stack, i % cpu::kLayerStates, 1));
  take(plan.shape.maps[2] * cpu::kFrontPast * plan.shape.width3());
  check(at == tensors.size(), "zipformer_chunk_states", "expected ", at, " tensors, got ", tensors.size());
  float* const state = mutable_data<float>(states) + slot * plan.state_floats;
  auto* const count = reinterpret_cast<cpu::ChunkCounters*>(mutable_data<int64_t>(counters)) + slot;
  if (restore)
    cpu::chunk_import(plan, to.data(), state, count);
  else
    cpu::chunk_export(plan, state, *count, to.data());
}

}  // namespace

FASTASR_UNDECLARED(
    "the streaming engine and native_layer.py call it without gradients, with weights that it packed itself",
    FASTASR_TYPED(zipformer_chunk_pack), FASTASR_TYPED(zipformer_chunk_step), FASTASR_TYPED(zipformer_chunk_states),
    FASTASR_TYPED(zipformer_layer_step))

// They take no tensor, so the dispatcher cannot tell that they run on the CPU.
FASTASR_OPERATORS_ON(fastasr_cpu, CompositeExplicitAutograd, FASTASR_TYPED(zipformer_chunk_names),
                     FASTASR_TYPED(zipformer_chunk_floats))

}  // namespace fastasr::bindings::zipformer_chunk
