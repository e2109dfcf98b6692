// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/zipformer_attention_weights.h"

#include <tuple>
#include <vector>

#include "bindings/attention_problem.h"

namespace fastasr {
namespace {

// Rows of W start at multiples of this many elements.
constexpr int64_t kRowPadding = 16;

// Checks W or its gradient: (heads, batch, frames, keys), keys side by side.
void check_weights(const Tensor& w, const AttentionProblem& a, const Tensor& x, const char* op, const char* name) {
  check(w.scalar_type() == x.scalar_type() && has_sizes(w, {a.heads, a.batch, a.frames, a.keys()}) &&
            (w.stride(3) == 1 || a.keys() <= 1 || w.numel() == 0),
        op, name);
}

// Makes a new W. Its memory comes from the pool and goes back to it with the tensor.
Tensor new_weights(const AttentionProblem& a, const Tensor& x) {
  const int64_t stride = (a.keys() + kRowPadding - 1) / kRowPadding * kRowPadding;
  const int64_t sizes[4] = {a.heads, a.batch, a.frames, a.keys()};
  const int64_t strides[4] = {a.batch * a.frames * stride, a.frames * stride, stride, 1};
  const size_t bytes = static_cast<size_t>(a.heads * strides[0]) * x.element_size();
  if (bytes < (size_t{1} << 20)) return new_strided(x, 4, sizes, strides);
  void* memory = cpu::acquire_buffer(bytes);
  check(memory, "zipformer_attention_weights", "no memory for ", bytes, " bytes");
  return torch::stable::from_blob(memory, {sizes, 4}, {strides, 4}, x.device(), x.scalar_type(),
                                  [](void* p) { cpu::release_buffer(p); });
}

Tensor zipformer_attention_weights_forward(const Tensor& x, const Optional& pos, const Optional& cached_key,
                                           const Optional& padding, const Optional& mask, int64_t heads,
                                           int64_t query_dim, int64_t chunk, int64_t left_chunks) {
  const char* op = "zipformer_attention_weights_forward";
  const AttentionProblem a =
      checked_problem(x, pos, cached_key, padding, mask, heads, query_dim, chunk, left_chunks, op);
  Tensor weights = new_weights(a, x);
  if (weights.numel() == 0) return weights;
  std::vector<cpu::KeyRange> ranges(static_cast<size_t>(a.batch));
  attention_key_ranges(a, ranges.data());
  with_kernel_type(x.scalar_type(), op, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    const auto& kernel = cpu::kernels<cpu::AttentionWeightsKernels<T>>();
    const Packed<C> packed(a, false);
    const Scratch<C> workspace(packed.total);
    C* const w = workspace.data();
    pack<T>(a, x, pos, cached_key, packed, w, false);
    const T* xp = data<T>(x);
    T* wp = mutable_data<T>(weights);
    // A task has four strips: its W fits in the second cache together with the packed keys.
    const int64_t rows = 4 * cpu::attention_rows(sizeof(C) == 8), tasks = (a.frames + rows - 1) / rows;
    const int64_t grain = std::max<int64_t>(1, kGrain / (rows * a.keys()));
    parallel_range(a.heads * a.batch * tasks, grain, [&](int64_t begin, int64_t end) {
      const Scratch<C> scratch(a.forward_scratch());
      for (int64_t i = begin; i < end; i++) {
        const int64_t hb = i / tasks, first = i % tasks * rows;
        kernel.forward(a, ranges.data(), xp, w + packed.kt + hb * a.keys_transposed_size(),
                       positions_of(a, w + packed.rt, hb), hb, first, std::min(first + rows, a.frames),
                       wp + hb * weights.stride(1), weights.stride(2), scratch.data());
      }
    });
  });
  return weights;
}

std::tuple<Tensor, Tensor, Tensor> zipformer_attention_weights_backward(
    const Tensor& grad, const Tensor& weights, const Tensor& x, const Optional& pos, const Optional& cached_key,
    const Optional& padding, const Optional& mask, int64_t heads, int64_t query_dim, int64_t chunk, int64_t left_chunks,
    double penalty, double limit) {
  const char* op = "zipformer_attention_weights_backward";
  AttentionProblem a = checked_problem(x, pos, cached_key, padding, mask, heads, query_dim, chunk, left_chunks, op);
  a.penalty = penalty, a.limit = limit;
  check_weights(weights, a, x, op, "weights");
  check_weights(grad, a, x, op, "grad");
  Tensor dx = new_like(x);
  Tensor dpos = pos.has_value() ? new_like(*pos) : new_without_elements(x);
  Tensor dcached = cached_key.has_value() ? new_like(*cached_key) : new_without_elements(x);
  if (grad.numel() == 0) {
    torch::stable::zero_(dx), torch::stable::zero_(dpos), torch::stable::zero_(dcached);
    return {dx, dpos, dcached};
  }
  std::vector<cpu::KeyRange> ranges(static_cast<size_t>(a.batch));
  attention_key_ranges(a, ranges.data());
  with_kernel_type(x.scalar_type(), op, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    const auto& kernel = cpu::kernels<cpu::AttentionWeightsKernels<T>>();
    const Packed<C> packed(a, true);
    const int64_t pairs = a.heads * a.batch;
    const QueryParts parts(a, pairs, a.key_rows_size() + a.positions_size());
    const int64_t tasks = pairs * parts.count;
    const int64_t dk_at = packed.total, drt_at = dk_at + tasks * a.key_rows_size();
    const Scratch<C> workspace(drt_at + (a.pos_batch ? tasks * a.positions_size() : 0));
    C* const w = workspace.data();
    pack<T>(a, x, pos, cached_key, packed, w, true);
    const T *xp = data<T>(x), *wp = data<T>(weights), *gp = data<T>(grad);
    T *dxp = mutable_data<T>(dx), *dcp = cached_key.has_value() ? mutable_data<T>(dcached) : nullptr;
    const int64_t grain = std::max<int64_t>(1, kGrain / (parts.rows * a.keys()));
    parallel_range(tasks, grain, [&](int64_t begin, int64_t end) {
      const Scratch<C> scratch(a.backward_scratch());
      for (int64_t i = begin; i < end; i++) {
        const int64_t hb = i / parts.count, first = i % parts.count * parts.rows, h = hb / a.batch, b = hb % a.batch;
        kernel.backward(a, ranges.data(), xp, wp + h * weights.stride(0) + b * weights.stride(1), weights.stride(2),
                        gp + h * grad.stride(0) + b * grad.stride(1), grad.stride(2),
                        w + packed.kt + hb * a.keys_transposed_size(), w + packed.key_rows + hb * a.key_rows_size(),
                        positions_of(a, w + packed.rt, hb), hb, first, std::min(first + parts.rows, a.frames), dxp,
                        w + dk_at + i * a.key_rows_size(), a.pos_batch ? w + drt_at + i * a.positions_size() : nullptr,
                        scratch.data());
      }
    });
    parallel_range(pairs, grain, [&](int64_t begin, int64_t end) {
      for (int64_t hb = begin; hb < end; hb++)
        kernel.store_keys(a, w + dk_at + hb * parts.count * a.key_rows_size(), parts.count, hb, dxp, dcp);
    });
    if (a.pos_batch) {
      T* dpp = mutable_data<T>(dpos);
      parallel_range(a.heads * a.pos_batch, grain, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; k++)
          kernel.store_positions(a, w + drt_at, parts.count, k / a.pos_batch, k % a.pos_batch, dpp);
      });
    }
  });
  return {dx, dpos, dcached};
}

}  // namespace

FASTASR_OPERATORS({"zipformer_attention_weights_forward(Tensor x, Tensor? pos, Tensor? cached_key, "
                   "Tensor? key_padding_mask, Tensor? attn_mask, int num_heads, int query_head_dim, int chunk_size, "
                   "int left_context_chunks) -> Tensor",
                   TORCH_BOX(&zipformer_attention_weights_forward)},
                  {"zipformer_attention_weights_backward(Tensor grad, Tensor weights, Tensor x, Tensor? pos, "
                   "Tensor? cached_key, Tensor? key_padding_mask, Tensor? attn_mask, int num_heads, "
                   "int query_head_dim, int chunk_size, int left_context_chunks, float score_penalty, "
                   "float score_limit) -> (Tensor, Tensor, Tensor)",
                   TORCH_BOX(&zipformer_attention_weights_backward)})

}  // namespace fastasr
