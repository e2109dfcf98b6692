// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/zipformer_attention.h"

#include "bindings/attention_problem.h"
#include "bindings/attention_work.h"
#include "bindings/written/zipformer_attention.h"

namespace fastasr::bindings::zipformer_attention {
namespace {

// Says whether a number is not 0, and `otherwise` without one.
bool decided(const Optional& number, bool otherwise, const char* op) {
  if (!number) return otherwise;
  if (dtype_of(*number) == ScalarType::Bool) return *data<uint8_t>(*number) != 0;
  bool found = false;
  with_kernel_type(dtype_of(*number), op, [&]<typename T>() { found = cpu::load(*data<T>(*number)) != 0; });
  return found;
}

cpu::ValueShape value_shape(const auto& a) {
  check(a.value_heads <= a.num_heads && a.E % a.value_heads == 0, a.kName, "value_heads");
  return {a.value_heads, a.E / a.value_heads, decided(a.equal, false, a.kName)};
}

// Returns y, and in place of what Triton's kernels keep two tensors without elements: a strip of the backward pass has
// whole rows, so their sums come with them.
std::tuple<Tensor, Tensor, Tensor> zipformer_attention_forward(const ZipformerAttentionForward& call) {
  const auto& [x, pos, value, cached_key] = std::tie(call.x, call.pos, call.value, call.cached_key);
  const std::vector<cpu::Recording> recordings = recordings_of(call);
  const AttentionProblem a = problem_of(call, recordings);
  const cpu::ValueShape v = value_shape(call);
  Tensor y = new_contiguous(x, {a.frames, a.batch, call.E});
  const std::tuple<Tensor, Tensor, Tensor> found{y, new_contiguous(x, {0}, compute_type(dtype_of(x))),
                                                 new_contiguous(x, {0})};
  if (y.numel() == 0) return found;
  std::vector<cpu::KeyRange> ranges(static_cast<size_t>(a.batch));
  attention_key_ranges(a, ranges.data());
  with_kernels<cpu::ZipformerAttentionKernels>(x, call.kName, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const WorkspaceLayout<C> layout(a, false);
    const int64_t pairs = v.heads * a.batch, values_at = layout.total;
    const Scratch<C> workspace(values_at + pairs * attention_values_size(a, v));
    C* const w = workspace.data();
    pack<T>(a, x, pos, cached_key, layout, w, false);
    parallel_tasks(pairs, attention_values_size(a, v), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        kernel.pack_values(a, v, data<T>(value), i, w + values_at + i * attention_values_size(a, v));
    });
    const T* xp = data<T>(x);
    T* yp = mutable_data<T>(y);
    const int64_t rows = cpu::kAttentionQueries, tasks = (a.frames + rows - 1) / rows;
    const int64_t channels = a.query_dim + a.pos_dim + v.dim;
    parallel_tasks(
        pairs * tasks, pairs_work(std::min(rows, a.frames), a.keys(), channels), [&](int64_t begin, int64_t end) {
          const Scratch<C> scratch(attention_values_scratch(a, v));
          for (int64_t i = begin; i < end; i++) {
            const int64_t pair = i / tasks, first = i % tasks * rows;
            kernel.forward(a, v, ranges.data(), xp, w + layout.kt + pair * a.keys_transposed_size(),
                           positions_of(a, w + layout.rt, pair), w + values_at + pair * attention_values_size(a, v),
                           pair, first, std::min(first + rows, a.frames), yp, scratch.data());
          }
        });
  });
  return found;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> zipformer_attention_backward(const ZipformerAttentionBackward& call) {
  const auto& [x, pos, value, cached_key, grad] = std::tie(call.x, call.pos, call.value, call.cached_key, call.grad_y);
  const std::vector<cpu::Recording> recordings = recordings_of(call);
  AttentionProblem a = problem_of(call, recordings);
  if (decided(call.act, true, call.kName)) a.penalty = call.score_penalty, a.limit = call.score_limit;
  const cpu::ValueShape v = value_shape(call);
  Tensor dx = new_like(x), dvalue = new_like(value);
  Tensor dpos = new_like(pos, x);
  Tensor dcached = new_like(cached_key, x);
  const bool any = grad.numel() > 0;
  if (!any || v.heads < a.heads || a.pos_batch == 0)  // no head with values writes these parts
    torch::stable::zero_(dx), torch::stable::zero_(dpos), torch::stable::zero_(dcached);
  if (!any) {
    torch::stable::zero_(dvalue);
    return {dx, dpos, dvalue, dcached};
  }
  std::vector<cpu::KeyRange> ranges(static_cast<size_t>(a.batch));
  attention_key_ranges(a, ranges.data());
  with_kernels<cpu::ZipformerAttentionKernels>(x, call.kName, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const auto& shared = cpu::kernels<cpu::AttentionWeightsKernels<T>>();
    const WorkspaceLayout<C> layout(a, true);
    const int64_t pairs = v.heads * a.batch, dk_size = a.key_rows_size(), dv_size = attention_values_size(a, v);
    const int64_t drt_size = a.pos_batch ? a.positions_size() : 0, vt_size = attention_values_transposed_size(a, v);
    const QueryParts parts(a, pairs, dk_size + dv_size + drt_size);
    const int64_t tasks = pairs * parts.count, vt_at = layout.total, dk_at = vt_at + pairs * vt_size;
    const int64_t drt_at = dk_at + tasks * dk_size, dv_at = drt_at + tasks * drt_size;
    const Scratch<C> workspace(dv_at + tasks * dv_size);
    C* const w = workspace.data();
    pack<T>(a, x, pos, cached_key, layout, w, true);
    const T *xp = data<T>(x), *gp = data<T>(grad), *vp = data<T>(value);
    T *dxp = mutable_data<T>(dx), *dvp = mutable_data<T>(dvalue);
    T* dcp = cached_key.has_value() ? mutable_data<T>(dcached) : nullptr;
    parallel_tasks(pairs, vt_size, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) kernel.transpose_values(a, v, vp, i, w + vt_at + i * vt_size);
    });
    const int64_t work = pairs_work(std::min(parts.rows, a.frames), a.keys(), 3 * (a.query_dim + a.pos_dim + v.dim));
    parallel_tasks(tasks, work, [&](int64_t begin, int64_t end) {
      const Scratch<C> scratch(attention_values_backward_scratch(a, v));
      for (int64_t i = begin; i < end; i++) {
        const int64_t pair = i / parts.count, first = i % parts.count * parts.rows;
        kernel.backward(a, v, ranges.data(), gp, xp, w + layout.kt + pair * a.keys_transposed_size(),
                        w + layout.key_rows + pair * dk_size, positions_of(a, w + layout.rt, pair),
                        w + vt_at + pair * vt_size, pair, first, std::min(first + parts.rows, a.frames), dxp,
                        w + dk_at + i * dk_size, w + drt_at + i * drt_size, w + dv_at + i * dv_size, scratch.data());
      }
    });
    parallel_tasks(pairs, work, [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; pair++) {
        shared.store_keys(a, w + dk_at + pair * parts.count * dk_size, parts.count, pair, dxp, dcp);
        kernel.store_values(a, v, w + dv_at + pair * parts.count * dv_size, parts.count, pair, dvp);
      }
    });
    if (a.pos_batch) {
      T* dpp = mutable_data<T>(dpos);
      parallel_tasks(v.heads * a.pos_batch, work, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; k++)
          shared.store_positions(a, w + drt_at, parts.count, k / a.pos_batch, k % a.pos_batch, dpp);
      });
    }
  });
  return {dx, dpos, dvalue, dcached};
}

}  // namespace

FASTASR_OPERATORS(written<zipformer_attention_forward>, written<zipformer_attention_backward>)

}  // namespace fastasr::bindings::zipformer_attention
