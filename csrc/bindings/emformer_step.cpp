// SPDX-License-Identifier: Apache-2.0
#include "cpu/streaming/emformer_step.h"

#include "bindings/packed_weights.h"
#include "bindings/scratch.h"
#include "cpu/math/activation.h"

namespace fastasr::bindings::emformer_step {
namespace {

using cpu::EmformerLayout;

// numbers: dim, heads, inner, activation, whether memory goes through tanh.
EmformerLayout layout_of(const std::vector<int64_t>& n, const std::vector<double>& eps) {
  check(n.size() == 5 && eps.size() == 3 && n[0] > 0 && n[1] > 0 && n[2] > 0 && n[0] % n[1] == 0 && n[3] >= 0 &&
            n[3] < cpu::kActivations,
        "emformer_layer", "the numbers describe no layer");
  return EmformerLayout({n[0], n[1], n[2], n[3], n[4] != 0, {eps[0], eps[1], eps[2]}});
}

// weights and biases in the order of cpu::EmformerProduct, norms (weight and bias of each) in the order of
// EmformerNorm.
Tensor emformer_layer_pack(std::vector<int64_t> numbers, std::vector<double> eps, std::vector<Tensor> weights,
                           std::vector<Tensor> biases, std::vector<Tensor> norms) {
  const EmformerLayout l = layout_of(numbers, eps);
  check(weights.size() == cpu::kEmformerProducts && biases.size() == cpu::kEmformerProducts &&
            norms.size() == 2 * cpu::kEmformerNorms,
        "emformer_layer_pack", "expected 5 weights, 5 biases and 6 tensors of norms");
  for (size_t i = 0; i < weights.size(); i++)
    check_floats(weights[i], l.outputs[i] * l.inputs[i], "a weight"), check_floats(biases[i], l.outputs[i], "a bias");
  for (const Tensor& t : norms) check_floats(t, l.shape.dim, "a norm's parameter");
  const Tensor packed = on_huge_pages(weights[0], l.total);
  auto* const arena = mutable_data<float>(packed);
  parallel_range(cpu::kEmformerProducts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      cpu::emformer_pack_product(l, static_cast<cpu::EmformerProduct>(i), data<float>(weights[static_cast<size_t>(i)]),
                                 data<float>(biases[static_cast<size_t>(i)]), arena);
  });
  for (size_t i = 0; i < cpu::kEmformerNorms; i++)
    cpu::emformer_pack_norm(l, static_cast<cpu::EmformerNorm>(i), data<float>(norms[2 * i]),
                            data<float>(norms[2 * i + 1]), arena);
  return packed;
}

cpu::Sequence<const float> sequence(const Tensor& t, int64_t rows, int64_t streams, int64_t dim, const char* name) {
  check(t.is_cpu() && dtype_of(t) == ScalarType::Float && has_sizes(t, {rows, streams, dim}) &&
            (dim == 1 || t.stride(2) == 1),
        "emformer_layer_step", name, " is not (", rows, ", ", streams, ", ", dim, ") with dense channels");
  return {data<float>(t), t.stride(0), t.stride(1)};
}

const int64_t* integers(const Tensor& t, int64_t count, const char* name) {
  check(t.is_cpu() && dtype_of(t) == ScalarType::Long && t.is_contiguous() && t.numel() == count, "emformer_layer_step",
        name);
  return data<int64_t>(t);
}

// Rows [begin, end) of t (rows, streams, dim), contiguous.
Tensor rows_of(const Tensor& t, int64_t begin, int64_t end) {
  const int64_t sizes[3] = {end - begin, t.size(1), t.size(2)}, strides[3] = {t.stride(0), t.stride(1), 1};
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 3, sizes, strides, begin * t.stride(0), &view));
  return Tensor(view);
}

// Takes utterance (S, B, D), right_context (R, B, D), mems (1, B, D), which is ignored without memory; states (M, B,
// D), (L, B, D) twice and (1, B) int32; lengths (B,) or none, history (2,) and kept (L,) as in cpu::EmformerSegment.
// Returns the encoded utterance and right context, the next layer's mems and the four states after it.
std::vector<Tensor> emformer_layer_step(std::vector<int64_t> numbers, std::vector<double> eps, const Tensor& packed,
                                        const Tensor& utterance, const Tensor& right_context, const Tensor& mems,
                                        std::vector<Tensor> states, const Optional& lengths, const Tensor& history,
                                        const Tensor& kept, int64_t threads) {
  const EmformerLayout l = layout_of(numbers, eps);
  const int64_t dim = l.shape.dim;
  check_floats(packed, l.total, "packed");
  check(utterance.dim() == 3 && right_context.dim() == 3 && utterance.size(0) > 0 && threads > 0 &&
            states.size() == 4 && states[0].dim() == 3 && states[1].dim() == 3,
        "emformer_layer_step", "utterance, right_context or states");
  const int64_t frames = utterance.size(0), streams = utterance.size(1), right = right_context.size(0);
  const int64_t memory = states[0].size(0), left = states[1].size(0);
  check_floats(states[0], memory * streams * dim, "memory");
  check_floats(states[1], left * streams * dim, "keys"), check_floats(states[2], left * streams * dim, "values");
  const Tensor& past = states[3];
  check(past.is_cpu() && dtype_of(past) == ScalarType::Int && past.is_contiguous(), "emformer_layer_step",
        "frames so far");
  const int64_t* rows_kept = integers(kept, left, "kept");
  for (int64_t i = 0; i < left; i++)
    check(rows_kept[i] >= 0 && rows_kept[i] < left + frames, "emformer_layer_step", "kept");

  const Tensor y = new_contiguous(utterance, {right + frames, streams, dim});
  const Tensor next_mems = new_contiguous(utterance, {int64_t{memory ? 1 : 0}, streams, dim});
  const Tensor next_past = new_contiguous(past);
  for (int64_t i = 0; i < past.numel(); i++)
    mutable_data<int32_t>(next_past)[i] = data<int32_t>(past)[i] + static_cast<int32_t>(frames);
  std::vector<Tensor> out{rows_of(y, right, right + frames), rows_of(y, 0, right), next_mems};
  for (size_t i = 0; i < 3; i++) out.push_back(new_contiguous(utterance, {states[i].size(0), streams, dim}));
  out.push_back(next_past);

  cpu::EmformerSegment segment{.layout = l};
  segment.arena = data<float>(packed), segment.streams = streams, segment.frames = frames, segment.right = right;
  segment.left = left, segment.memory = memory;
  segment.utterance = sequence(utterance, frames, streams, dim, "utterance");
  segment.right_context = sequence(right_context, right, streams, dim, "right_context");
  segment.old_memory = data<float>(states[0]), segment.old_key = data<float>(states[1]);
  segment.old_value = data<float>(states[2]);
  segment.lengths = lengths ? integers(*lengths, streams, "lengths") : nullptr;
  segment.history = integers(history, 2, "history"), segment.kept = rows_kept;
  segment.y = mutable_data<float>(y), segment.next_mems = mutable_data<float>(next_mems);
  segment.new_memory = mutable_data<float>(out[3]), segment.new_key = mutable_data<float>(out[4]);
  segment.new_value = mutable_data<float>(out[5]), segment.workers = {threads, run_parts};
  if (memory) segment.mems = sequence(mems, 1, streams, dim, "mems");
  const auto& kernel = cpu::kernels<cpu::EmformerKernels>();
  const Scratch<float> scratch(kernel.scratch_floats(segment));
  segment.scratch = scratch.data();
  kernel.step(segment);
  return out;
}

}  // namespace

FASTASR_UNDECLARED(
    "fastasr/models/emformer/packed_step.py calls it without gradients, with tensors of a layer that it checked",
    FASTASR_TYPED(emformer_layer_pack), FASTASR_TYPED(emformer_layer_step))

}  // namespace fastasr::bindings::emformer_step
