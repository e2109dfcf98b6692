// SPDX-License-Identifier: Apache-2.0
#include "cpu/streaming/zipformer_chunk.h"

#include <algorithm>
#include <vector>

#include "bindings/packed_weights.h"

namespace fastasr::bindings::zipformer_chunk {
namespace {

using cpu::ChunkPlan;
using cpu::ChunkShape;

ChunkPlan plan_of(const std::vector<int64_t>& numbers) {
  const ChunkShape shape(numbers);
  check(!shape.stacks.empty(), "zipformer_chunk", "the numbers describe no encoder that this step serves");
  return ChunkPlan(shape);
}

// Returns the floats of weights, of vectors, of a stream's states, and of the scratch memory of `streams` streams, and
// how many products and tables packing takes.
std::vector<int64_t> zipformer_chunk_sizes(std::vector<int64_t> numbers, int64_t streams) {
  const ChunkPlan plan = plan_of(numbers);
  return {(plan.weight_bytes + 3) / 4,
          plan.vector_floats,
          plan.state_floats,
          plan.scratch_floats(streams),
          static_cast<int64_t>(plan.products.size()),
          static_cast<int64_t>(plan.tables.size())};
}

// products holds weights and biases in turn; tables: see cpu::ChunkPlan. Returns weights and vectors.
std::vector<Tensor> zipformer_chunk_pack(std::vector<int64_t> numbers, std::vector<Tensor> products,
                                         std::vector<Tensor> tables) {
  const ChunkPlan plan = plan_of(numbers);
  const auto count = static_cast<int64_t>(plan.products.size());
  check(static_cast<int64_t>(products.size()) == 2 * count && tables.size() == plan.tables.size(),
        "zipformer_chunk_pack", "expected ", 2 * count, " weights and biases and ", plan.tables.size(), " tables, got ",
        products.size(), " and ", tables.size());
  for (size_t i = 0; i < products.size(); i++) {
    const cpu::ChunkProduct& p = plan.products[i / 2];
    check_floats(products[i], i % 2 ? p.outputs : p.outputs * p.inputs, i % 2 ? "a bias" : "a weight");
  }
  for (size_t i = 0; i < tables.size(); i++)
    check_floats(tables[i], plan.tables[i].rows * plan.tables[i].columns, "a table");
  const Tensor weights = on_huge_pages(products[0], (plan.weight_bytes + 3) / 4);
  const Tensor vectors = on_huge_pages(products[0], plan.vector_floats);
  auto* packed = reinterpret_cast<char*>(mutable_data<float>(weights));
  auto* values = mutable_data<float>(vectors);
  std::fill(values, values + plan.vector_floats, 0.0f);
  parallel_range(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      cpu::chunk_pack_product(plan, i, data<float>(products[static_cast<size_t>(2 * i)]),
                              data<float>(products[static_cast<size_t>(2 * i + 1)]), packed, values);
  });
  for (size_t i = 0; i < tables.size(); i++) cpu::chunk_pack_table(plan.tables[i], data<float>(tables[i]), values);
  return {weights, vectors};
}

// states (slots, floats), counters (slots, 2) of int64; slots: those of the streams, in the order of features.
Tensor zipformer_chunk_step(std::vector<int64_t> numbers, Tensor weights, Tensor vectors, Tensor states,
                            Tensor counters, Tensor scratch, Tensor features, std::vector<int64_t> slots,
                            int64_t threads) {
  const ChunkPlan plan = plan_of(numbers);
  const auto streams = static_cast<int64_t>(slots.size());
  check_floats(weights, (plan.weight_bytes + 3) / 4, "weights");
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

// Copies a stream's states to `tensors`, or from them; see cpu::chunk_export.
void zipformer_chunk_states(std::vector<int64_t> numbers, Tensor states, Tensor counters, int64_t slot,
                            std::vector<Tensor> tensors, bool restore) {
  const ChunkPlan plan = plan_of(numbers);
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
  for (const ChunkPlan::Stack& s : plan.stacks)
    for (int64_t i = 0; i < s.shape.layers; i++) {
      take(s.left * s.shape.heads * s.shape.query);
      take(s.left * s.shape.hidden);
      for (int j = 0; j < 2; j++) take(s.left * s.shape.heads * s.shape.value);
      for (int j = 0; j < 2; j++) take(s.shape.dim * s.pad);
    }
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

FASTASR_OPERATORS({"zipformer_chunk_sizes(int[] numbers, int streams) -> int[]", Boxed<zipformer_chunk_sizes>::call},
                  {"zipformer_chunk_pack(int[] numbers, Tensor[] products, Tensor[] tables) -> Tensor[]",
                   Boxed<zipformer_chunk_pack>::call},
                  {"zipformer_chunk_step(int[] numbers, Tensor weights, Tensor vectors, Tensor(a!) states, "
                   "Tensor(b!) counters, Tensor(c!) scratch, Tensor features, int[] slots, int threads) -> Tensor",
                   Boxed<zipformer_chunk_step>::call},
                  {"zipformer_chunk_states(int[] numbers, Tensor(a!) states, Tensor(b!) counters, int slot, "
                   "Tensor[] tensors, bool restore) -> ()",
                   Boxed<zipformer_chunk_states>::call})

// It takes no tensor that would tell the dispatcher that it runs on the CPU.
STABLE_TORCH_LIBRARY_IMPL(fastasr_cpu, CompositeExplicitAutograd, m) {
  m.impl("zipformer_chunk_sizes", Boxed<zipformer_chunk_sizes>::call);
}

}  // namespace fastasr::bindings::zipformer_chunk
