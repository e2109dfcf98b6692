// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/rel_attention.h"

#include <limits>

#include "bindings/attention_problem.h"
#include "bindings/attention_work.h"
#include "bindings/written/rel_attention.h"

namespace fastasr::bindings::rel_attention {
namespace {

using cpu::RelAttention;
using cpu::RelAttentionGradients;
using cpu::RelAttentionOperands;
using cpu::RelAttentionSums;

template <typename T>
RelAttentionOperands<T> operands(const auto& a) {
  const auto given = [](const Optional& t) { return data_or_null<T>(t); };
  return {data<T>(a.q),    data<T>(a.k),         data<T>(a.v),         given(a.pos),     given(a.bias_u),
          given(a.bias_v), given(a.offset_bias), given(a.offset_gate), given(a.key_bias)};
}

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Makes the gradients of the operands; those of absent ones have no elements.
Nine new_results(const auto& a) {
  const auto given = [&](const Optional& t) { return new_like(t, a.q); };
  return {new_like(a.q),   new_like(a.k),        new_like(a.v),        given(a.pos),     given(a.bias_u),
          given(a.bias_v), given(a.offset_bias), given(a.offset_gate), given(a.key_bias)};
}

void zero(Tensor t) { torch::stable::zero_(t); }

void clear(const Nine& results) {
  std::apply([](const auto&... t) { (zero(t), ...); }, results);
}

template <typename T>
RelAttentionGradients<T> pointers(const Nine& results) {
  return std::apply([](const auto&... t) { return RelAttentionGradients<T>{mutable_or_null<T>(t)...}; }, results);
}

// Returns the problem that checked arguments describe.
RelAttention problem(const auto& a) {
  RelAttention r{};
  AttentionProblem& p = r.problem;
  p.batch = a.B, p.frames = a.T, p.heads = a.H, p.query_dim = p.pos_dim = a.D, p.left = a.K - a.T;
  p.chunk = p.left_chunks = -1, r.value_dim = a.E, r.all_frames = a.T, r.all_keys = a.K;
  p.padding = data_or_null<uint8_t>(a.key_padding_mask);
  p.mask = data_or_null<uint8_t>(a.attn_mask);
  p.mask_per_sequence = a.attn_mask && a.attn_mask->dim() == 3;
  check(a.pos.has_value() || !a.bias_v.has_value(), a.kName, "bias_v without pos");
  const auto [before, behind] = a.pos_span;
  const bool spanned = before >= 0 && behind >= 0;
  check(spanned ? a.pos.has_value() : before == -1 && behind == -1, a.kName, "pos_span");
  if (a.pos) {
    check(spanned ? a.R - 1 - before == behind : a.R == p.offsets(), a.kName, "pos has another number of rows");
    r.pos_heads = a.pos->size(1);
    r.span = {a.K - 1, a.T - 1};
    if (spanned) {
      r.span = {std::min(before, r.span.left), std::min(behind, r.span.right)};
      r.span.first = before - r.span.left;
    }
  }
  check(a.offset_bias.has_value() || !a.offset_gate.has_value(), a.kName, "offset_gate without offset_bias");
  r.has_offset_bias = a.offset_bias.has_value();
  if (a.key_bias) r.key_bias_batch = a.key_bias->size(0), r.key_bias_heads = a.key_bias->size(1);
  const auto [left, right] = a.context;
  check(left >= -1 && right >= -1, a.kName, "context");
  const int64_t most = std::max<int64_t>(1, a.K);  // keeps sums from overflowing
  r.context = {std::min(left, most), std::min(right, most), std::min(a.chunk_size, most)};
  check(!a.starts || (a.K == a.T && a.chunk_size == 1), a.kName, "starts with a cache or chunks");
  r.soft_cap = a.soft_cap;
  check(a.dropout_p == 0 || a.dropout_seed.has_value(), a.kName, "dropout_seed");
  if (a.dropout_p > 0)
    r.dropout = {static_cast<uint64_t>(*data<int64_t>(*a.dropout_seed)), static_cast<int32_t>(a.dropout_p * 0x1p31),
                 1 / (1 - a.dropout_p)};
  return r;
}

// The sequences of a call, or the recordings in them, the longest first.
struct Parts {
  std::vector<RelAttention> all;
  int64_t frames = 0;  // of all

  Parts(const auto& a, const RelAttention& r) {
    std::vector<int64_t> bounds = {0, a.T};
    if (a.starts) bounds.assign(data<int64_t>(*a.starts), data<int64_t>(*a.starts) + a.N);
    for (int64_t& bound : bounds) bound = std::clamp<int64_t>(bound, 0, a.T);
    std::sort(bounds.begin(), bounds.end());
    for (int64_t b = 0; b < a.B; b++)
      for (size_t i = 1; i < bounds.size(); i++)
        if (bounds[i - 1] < bounds[i]) all.push_back(r.part(b, bounds[i - 1], bounds[i] - bounds[i - 1]));
    for (const RelAttention& part : all) frames += part.problem.frames;
    if (!a.starts) return;
    std::stable_sort(all.begin(), all.end(),
                     [](const RelAttention& x, const RelAttention& y) { return x.problem.frames > y.problem.frames; });
  }

  const RelAttention& operator[](int64_t i) const { return all[static_cast<size_t>(i)]; }
  int64_t count() const { return static_cast<int64_t>(all.size()); }
  // Returns the work of all for one head; `channels` as in pairs_work.
  int64_t work(int64_t channels) const {
    int64_t sum = 0;
    for (const RelAttention& part : all) sum += pairs_work(part.problem.frames, part.problem.keys(), channels);
    return sum;
  }
};

// The channels of the products of a pair: two for scores and one with the values; the gradients take eight in all. Half
// of those with queries are of positions.
int64_t forward_channels(const RelAttention& r) { return r.problem.query_dim + r.position_channels() + r.value_dim; }
int64_t backward_channels(const RelAttention& r) {
  return 3 * (r.problem.query_dim + r.position_channels()) + 2 * r.value_dim;
}

// Returns y, the log-sum-exp of the queries, and a tensor without elements in place of what Triton's kernels keep of y.
std::tuple<Tensor, Tensor, Tensor> rel_attention_forward(const RelAttentionForward& call) {
  const RelAttention r = problem(call);
  const AttentionProblem& a = r.problem;
  Tensor y = new_contiguous(call.v, {a.batch, a.frames, a.heads, r.value_dim});
  Tensor lse = new_contiguous(call.q, {a.batch, a.heads, a.frames}, compute_type(dtype_of(call.q)));
  const std::tuple<Tensor, Tensor, Tensor> found{y, lse, new_contiguous(call.q, {0})};
  if (y.numel() == 0) return found;
  const Parts parts(call, r);
  with_kernels<cpu::RelAttentionKernels>(call.q, call.kName, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const RelAttentionOperands<T> t = operands<T>(call);
    T* const yp = mutable_data<T>(y);
    C* const lp = mutable_data<C>(lse);
    if (parts.frames < a.batch * a.frames) {  // The other frames see nothing.
      zero(y);
      std::fill_n(lp, lse.numel(), std::numeric_limits<C>::infinity());
    }
    if (parts.count() == 0) return;
    const RelAttention& longest = parts[0];
    const int64_t kt_size = longest.keys_transposed_size(), v_size = longest.values_size();
    if constexpr (std::is_same_v<T, float>) {
      if (longest.has_few_queries()) {
        parallel_tasks(a.heads * a.batch, kt_size + v_size, [&](int64_t begin, int64_t end) {
          const Scratch<float> scratch(longest.few_queries_scratch());
          for (int64_t i = begin; i < end; i++)
            cpu::rel_attention_few_queries(parts[i % a.batch], t, i / a.batch, yp, lp, scratch.data());
        });
        return;
      }
    }
    std::vector<std::pair<int64_t, int64_t>> blocks;  // of queries: their part and the first of them
    for (int64_t i = 0; i < parts.count(); i++)
      for (int64_t j = 0; j < parts[i].problem.frames; j += cpu::kRelAttentionQueries) blocks.emplace_back(i, j);
    const int64_t count = static_cast<int64_t>(blocks.size()), rt_size = r.positions_transposed_size();
    // Short inputs run on one thread: waking a second one costs more than it saves. A thread packs what it reads.
    parallel_tasks(a.heads * count, parts.work(forward_channels(r)) / count / 4, [&](int64_t begin, int64_t end) {
      const Scratch<C> workspace(kt_size + v_size + rt_size), scratch(longest.forward_scratch());
      C *const kt = workspace.data(), *const values = kt + kt_size, *const rt = values + v_size;
      for (int64_t i = begin; i < end; i++) {
        const auto [number, first] = blocks[static_cast<size_t>(i % count)];
        const RelAttention& part = parts[number];
        const int64_t head = i / count, last = std::min(first + cpu::kRelAttentionQueries, part.problem.frames);
        if (i == begin || (i % count == 0 && r.tables() > 1))
          kernel.pack_positions(r, t, r.table_of(head), rt, static_cast<C*>(nullptr));
        if (i == begin || first == 0) kernel.pack_keys(part, t, head, kt, values);
        kernel.forward(part, t, kt, values, rt, head, first, last, yp, lp, scratch.data());
      }
    });
  });
  return found;
}

// The softmax is computed again with the scores: its sums are exact, and it does not depend on y.
Nine rel_attention_backward(const RelAttentionBackward& call) {
  const RelAttention r = problem(call);
  const AttentionProblem& a = r.problem;
  const Tensor& grad = call.grad_y;
  const Nine results = new_results(call);
  if (call.pos && r.span.rows() < call.R) zero(std::get<3>(results));
  const Parts parts(call, r);
  const int64_t count = grad.numel() ? parts.count() : 0;
  if (!count || parts.frames < a.batch * a.frames) clear(results);
  if (!count) return results;
  with_kernels<cpu::RelAttentionKernels>(call.q, call.kName, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const RelAttentionOperands<T> t = operands<T>(call);
    // Groups of parts have sums of their own: enough of them for many threads. Their number depends on the shape.
    const int64_t wanted = std::clamp<int64_t>((32 + a.heads - 1) / a.heads, 1, count);
    const int64_t each = (count + wanted - 1) / wanted, groups = (count + each - 1) / each, tasks = a.heads * groups;
    // Recordings differ in length: a group takes long and short ones.
    const auto member = [&](int64_t group, int64_t i) { return call.starts ? group + i * groups : group * each + i; };
    const int64_t rt_size = r.positions_transposed_size(), r_size = r.positions_size(), width = r.biases_size();
    const int64_t o_size = r.offsets_size(), c_size = r.key_sums_size();
    const Scratch<C> workspace(tasks * r_size);
    const Scratch<double> biases(tasks * (width + o_size) + a.heads * a.batch * c_size);
    double *const offsets = biases.data() + tasks * width, *const by_key = offsets + tasks * o_size;
    C* const sums = workspace.data();
    std::fill_n(by_key, a.heads * a.batch * c_size, 0.0);
    const T* gp = data<T>(grad);
    const RelAttentionGradients<T> gradients = pointers<T>(results);
    parallel_tasks(tasks, parts.work(backward_channels(r)) / groups, [&](int64_t begin, int64_t end) {
      const int64_t scratch_size = parts[0].backward_scratch();
      const Scratch<C> scratch(scratch_size + rt_size + r_size);  // one buffer: large ones lie in large pages
      C *const rt = scratch.data() + scratch_size, *const rows = rt + rt_size;
      for (int64_t i = begin; i < end; i++) {
        const int64_t h = i / groups, group = i % groups;
        if (i == begin || (group == 0 && r.tables() > 1)) kernel.pack_positions(r, t, r.table_of(h), rt, rows);
        RelAttentionSums<C> own{sums + i * r_size, biases.data() + i * width, offsets + i * o_size};
        std::fill_n(own.positions, r_size, C(0));
        std::fill_n(own.biases, width, 0.0);
        std::fill_n(own.offsets, o_size, 0.0);
        for (int64_t k = 0; k < each && member(group, k) < count; k++) {
          const RelAttention& part = parts[member(group, k)];
          own.keys = by_key + (h * a.batch + part.sequence) * c_size;
          kernel.backward(part, gp, t, rt, rows, h, gradients, own, scratch.data());
        }
      }
    });
    parallel_tasks(a.heads, groups * (r_size + o_size), [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; h++) {
        const int64_t first = h * groups;
        kernel.store_sums(r, {sums + first * r_size, biases.data() + first * width, offsets + first * o_size}, groups,
                          h, gradients);
      }
    });
    if (call.key_bias) kernel.store_key_bias(r, by_key, gradients.key_bias);
  });
  return results;
}

}  // namespace

FASTASR_OPERATORS(written<rel_attention_forward>, written<rel_attention_backward>)

}  // namespace fastasr::bindings::rel_attention
