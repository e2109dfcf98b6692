// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/rel_attention.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "bindings/attention_problem.h"
#include "bindings/attention_work.h"
#include "bindings/packed.h"
#include "bindings/written/rel_attention.h"

namespace fastasr::bindings::rel_attention {
namespace {

using cpu::RelAttention;
using cpu::RelAttentionGradients;
using cpu::RelAttentionOperands;
using cpu::RelAttentionSums;

template <typename T>
RelAttentionOperands<T> operands(const auto& a) {
  return {data<T>(a.q),
          data<T>(a.k),
          data<T>(a.v),
          data_or_null<T>(a.pos),
          data_or_null<T>(a.bias_u),
          data_or_null<T>(a.bias_v),
          data_or_null<T>(a.offset_bias),
          data_or_null<T>(a.offset_gate),
          data_or_null<T>(a.key_bias)};
}

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

void zero(Tensor t) { torch::stable::zero_(t); }

// The gradients of the operands; those of absent ones have no elements.
struct RelAttentionResults {
  Tensor q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias;

  explicit RelAttentionResults(const auto& a)
      : q(new_like(a.q)),
        k(new_like(a.k)),
        v(new_like(a.v)),
        pos(like(a.q, a.pos)),
        bias_u(like(a.q, a.bias_u)),
        bias_v(like(a.q, a.bias_v)),
        offset_bias(like(a.q, a.offset_bias)),
        offset_gate(like(a.q, a.offset_gate)),
        key_bias(like(a.q, a.key_bias)) {}
  static Tensor like(const Tensor& q, const Optional& x) {
    return x.has_value() ? new_like(*x) : new_without_elements(q);
  }

  Nine all() const { return {q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias}; }
  void clear() const {
    for (const Tensor& t : {q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias}) zero(t);
  }
  template <typename T>
  RelAttentionGradients<T> gradients() const {
    const auto pointer = [](const Tensor& t) { return t.numel() ? mutable_data<T>(t) : nullptr; };
    return {pointer(q),      pointer(k),           pointer(v),           pointer(pos),     pointer(bias_u),
            pointer(bias_v), pointer(offset_bias), pointer(offset_gate), pointer(key_bias)};
  }
};

cpu::WeightsDropout dropout_of(double p, uint64_t seed) {
  return {seed, static_cast<int32_t>(p * 0x1p31), 1 / (1 - p)};
}

// Returns the problem that checked arguments describe.
RelAttention problem(const auto& a, const std::vector<cpu::Recording>& recordings) {
  RelAttention r{};
  AttentionProblem& p = r.problem;
  p.batch = a.B, p.frames = a.T, p.heads = a.H, p.query_dim = p.pos_dim = a.D, p.left = a.K - a.T;
  p.chunk = p.left_chunks = -1, r.value_dim = a.E;
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
  r.context = {std::min(left, most), std::min(right, most), std::min(a.chunk_size, most),
               recordings.empty() ? nullptr : recordings.data()};
  check(!a.starts || (a.K == a.T && a.chunk_size == 1), a.kName, "starts with a cache or chunks");
  r.soft_cap = a.soft_cap;
  check(a.dropout_p == 0 || a.dropout_seed.has_value(), a.kName, "dropout_seed");
  if (a.dropout_p > 0) r.dropout = dropout_of(a.dropout_p, static_cast<uint64_t>(*data<int64_t>(*a.dropout_seed)));
  return r;
}

// The channels of the products of a pair: two for scores and one with the values; the gradients take eight in all. Half
// of those with queries are of positions.
int64_t forward_channels(const RelAttention& r) { return r.problem.query_dim + r.position_channels() + r.value_dim; }
int64_t backward_channels(const RelAttention& r) {
  return 3 * (r.problem.query_dim + r.position_channels()) + 2 * r.value_dim;
}

Tensor new_log_sum_exp(const Tensor& q, const AttentionProblem& a) {
  return new_contiguous(q, {a.batch, a.heads, a.frames}, compute_type(dtype_of(q)));
}

// Runs f(begin, end) over the tasks of one of the two regions of the forward pass. Short inputs run on one thread:
// waking a second one costs more than it saves, and its packed operands would lie in its own caches.
void parallel_steps(int64_t tasks, int64_t work, RangeFunction f) { parallel_tasks(tasks, work / 4, f); }

std::tuple<Tensor, Tensor> rel_attention_forward(const RelAttentionForward& call) {
  const std::vector<cpu::Recording> recordings = recordings_of(call);
  const RelAttention r = problem(call, recordings);
  const AttentionProblem& a = r.problem;
  Tensor y = new_contiguous(call.v, {a.batch, a.frames, a.heads, r.value_dim}), lse = new_log_sum_exp(call.q, a);
  if (y.numel() == 0) return {y, lse};
  std::vector<cpu::KeyRange> ranges(static_cast<size_t>(a.batch));
  attention_key_ranges(a, ranges.data());
  with_kernel_type(dtype_of(call.q), call.kName, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    const auto& kernel = cpu::kernels<cpu::RelAttentionKernels<T>>();
    const RelAttentionOperands<T> t = operands<T>(call);
    const int64_t pairs = a.heads * a.batch, kt_size = r.keys_transposed_size(), v_size = r.values_size();
    const int64_t rt_size = r.positions_transposed_size(), tables = r.tables();
    if constexpr (std::is_same_v<T, float>) {
      if (r.has_few_queries()) {
        parallel_tasks(pairs, kt_size + v_size, [&](int64_t begin, int64_t end) {
          const Scratch<float> scratch(r.few_queries_scratch());
          for (int64_t pair = begin; pair < end; pair++)
            cpu::rel_attention_few_queries(r, ranges.data(), t, pair, mutable_data<float>(y), mutable_data<float>(lse),
                                           scratch.data());
        });
        return;
      }
    }
    const Scratch<C> workspace(pairs * (kt_size + v_size) + tables * rt_size);
    C *const kt = workspace.data(), *const values = kt + pairs * kt_size, *const rt = values + pairs * v_size;
    parallel_steps(tables + pairs, (kt_size + v_size) / 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t pair = i - tables;
        if (pair < 0)
          kernel.pack_positions(r, t, i, rt + i * rt_size, static_cast<C*>(nullptr));
        else
          kernel.pack_keys(r, t, pair, kt + pair * kt_size, values + pair * v_size);
      }
    });
    T* yp = mutable_data<T>(y);
    C* lp = mutable_data<C>(lse);
    const int64_t rows = cpu::kRelAttentionQueries, tasks = (a.frames + rows - 1) / rows;
    const int64_t work = pairs_work(std::min(rows, a.frames), a.keys(), forward_channels(r));
    parallel_steps(pairs * tasks, work, [&](int64_t begin, int64_t end) {
      const Scratch<C> scratch(r.forward_scratch());
      for (int64_t i = begin; i < end; i++) {
        const int64_t pair = i / tasks, first = i % tasks * rows;
        kernel.forward(r, ranges.data(), t, kt + pair * kt_size, values + pair * v_size,
                       rt + r.table_of(pair / a.batch) * rt_size, pair, first, std::min(first + rows, a.frames), yp, lp,
                       scratch.data());
      }
    });
  });
  return {y, lse};
}

// The softmax is computed again with the scores: its sums are exact, and it does not depend on y.
Nine rel_attention_backward(const RelAttentionBackward& call) {
  const std::vector<cpu::Recording> recordings = recordings_of(call);
  const RelAttention r = problem(call, recordings);
  const AttentionProblem& a = r.problem;
  const Tensor& grad = call.grad_y;
  const RelAttentionResults results(call);
  if (call.pos && r.span.rows() < call.R) zero(results.pos);
  if (grad.numel() == 0) {
    results.clear();
    return results.all();
  }
  std::vector<cpu::KeyRange> ranges(static_cast<size_t>(a.batch));
  attention_key_ranges(a, ranges.data());
  with_kernel_type(dtype_of(call.q), call.kName, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    const auto& kernel = cpu::kernels<cpu::RelAttentionKernels<T>>();
    const RelAttentionOperands<T> t = operands<T>(call);
    // Splits the batch into parts with sums of their own, enough of them for many threads. Their number depends on the
    // shape.
    const int64_t wanted = std::clamp<int64_t>((32 + a.heads - 1) / a.heads, 1, a.batch);
    const int64_t each = (a.batch + wanted - 1) / wanted, parts = (a.batch + each - 1) / each, tasks = a.heads * parts;
    const int64_t rt_size = r.positions_transposed_size(), r_size = r.positions_size(), width = r.biases_size();
    const int64_t o_size = r.offsets_size(), tables = r.tables();
    const Scratch<C> workspace(tables * (rt_size + r_size) + tasks * r_size);
    const int64_t c_size = r.key_sums_size();
    const Scratch<double> biases(tasks * (width + o_size) + a.heads * a.batch * c_size);
    double *const offsets = biases.data() + tasks * width, *const by_key = offsets + tasks * o_size;
    C *const rt = workspace.data(), *const rows = rt + tables * rt_size, *const sums = rows + tables * r_size;
    parallel_tasks(tables, rt_size + r_size, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; h++) kernel.pack_positions(r, t, h, rt + h * rt_size, rows + h * r_size);
    });
    const T* gp = data<T>(grad);
    const RelAttentionGradients<T> gradients = results.gradients<T>();
    parallel_tasks(tasks, each * pairs_work(a.frames, a.keys(), backward_channels(r)), [&](int64_t begin, int64_t end) {
      const Scratch<C> scratch(r.backward_scratch());
      for (int64_t i = begin; i < end; i++) {
        const int64_t h = i / parts, first = i % parts * each, table = r.table_of(h);
        RelAttentionSums<C> own{sums + i * r_size, biases.data() + i * width, offsets + i * o_size};
        std::fill_n(own.positions, r_size, C(0));
        std::fill_n(own.biases, width, 0.0);
        std::fill_n(own.offsets, o_size, 0.0);
        for (int64_t pair = h * a.batch + first; pair < h * a.batch + std::min(first + each, a.batch); pair++) {
          own.keys = by_key + pair * c_size;
          std::fill_n(own.keys, c_size, 0.0);
          kernel.backward(r, ranges.data(), gp, t, rt + table * rt_size, rows + table * r_size, pair, gradients, own,
                          scratch.data());
        }
      }
    });
    parallel_tasks(a.heads, parts * (r_size + o_size), [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; h++) {
        const int64_t first = h * parts;
        kernel.store_sums(r, {sums + first * r_size, biases.data() + first * width, offsets + first * o_size}, parts, h,
                          gradients);
      }
    });
    if (call.key_bias) kernel.store_key_bias(r, by_key, gradients.key_bias);
  });
  return results.all();
}

// Sequences that lie one after the other as rows (N, heads, dim) of q, k and v, each of which sees itself. The longest
// has all rows of pos, the others its middle ones.
template <typename T>
struct PackedSequences {
  struct One {
    RelAttention r;
    RelAttentionOperands<T> t;
    int64_t first;  // row
    cpu::KeyRange range;
  };
  std::vector<One> all;  // in the order of longest_first
  std::vector<int64_t> starts;

  PackedSequences(const RelAttentionForward& t, const std::vector<int64_t>& lengths, const char* op) {
    check(t.q.dim() == 3 && t.v.dim() == 3 && t.q.size(1) > 0 && t.q.size(2) > 0 && t.v.size(2) > 0, op,
          "sizes of q or v");
    const int64_t rows = t.q.size(0), heads = t.q.size(1), dim = t.q.size(2), value_dim = t.v.size(2);
    const auto check_sizes = [&](const Tensor& x, std::initializer_list<int64_t> sizes, const char* name) {
      check_like(x, t.q, op, name);
      check(x.is_contiguous() && has_sizes(x, sizes), op, "sizes or strides of ", name);
    };
    starts = packed_starts(lengths, rows, op);
    const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
    check_sizes(t.q, {rows, heads, dim}, "q");
    check_sizes(t.k, {rows, heads, dim}, "k");
    check_sizes(t.v, {rows, heads, value_dim}, "v");
    check(t.pos.has_value() && t.bias_u.has_value() && t.bias_v.has_value(), op, "pos, bias_u or bias_v");
    check_sizes(*t.pos, {2 * longest - 1, heads, dim}, "pos");
    check_sizes(*t.bias_u, {heads, dim}, "bias_u");
    check_sizes(*t.bias_v, {heads, dim}, "bias_v");
    check(t.dropout_p >= 0 && t.dropout_p < 1, op, "dropout_p");
    const int64_t* seeds = nullptr;
    if (t.dropout_p > 0) {
      check(t.dropout_seed && is_dense(*t.dropout_seed, ScalarType::Long, {static_cast<int64_t>(lengths.size())}), op,
            "dropout_seeds");
      seeds = data<int64_t>(*t.dropout_seed);
    }
    const RelAttentionOperands<T> all_rows = operands<T>(t);
    for (const size_t i : longest_first(lengths)) {
      const int64_t first = starts[i];
      One one{{}, all_rows, first, {0, lengths[i], -1}};
      AttentionProblem& a = one.r.problem;
      a.batch = 1, a.frames = lengths[i], a.heads = heads, a.query_dim = a.pos_dim = dim;
      a.chunk = a.left_chunks = -1, one.r.value_dim = value_dim;
      one.r.pos_heads = heads, one.r.span = {lengths[i] - 1, lengths[i] - 1};
      one.t.q += first * heads * dim, one.t.k += first * heads * dim, one.t.v += first * heads * value_dim;
      one.t.pos += (longest - lengths[i]) * heads * dim;
      if (seeds) one.r.dropout = dropout_of(t.dropout_p, static_cast<uint64_t>(seeds[i]));
      all.push_back(one);
    }
  }

  int64_t count() const { return static_cast<int64_t>(all.size()); }
  const One& operator[](int64_t i) const { return all[static_cast<size_t>(i)]; }
};

// The arguments of packed sequences, which the struct's own checks do not fit.
RelAttentionForward packed_call(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& pos,
                                const Optional& bias_u, const Optional& bias_v, const Optional& dropout_seeds,
                                double dropout_p) {
  static const Optional none;
  return {q, k, v, pos, bias_u, bias_v, none, none, none, none, none, none, dropout_seeds, dropout_p, {-1, -1}, 1, 0};
}

Tensor rel_attention_packed_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& pos,
                                    const Optional& bias_u, const Optional& bias_v, const Optional& dropout_seeds,
                                    std::vector<int64_t> lengths, double dropout_p) {
  const char* op = "rel_attention_packed_forward";
  const RelAttentionForward tensors = packed_call(q, k, v, pos, bias_u, bias_v, dropout_seeds, dropout_p);
  Tensor y = new_contiguous(v);
  with_kernel_type(dtype_of(q), op, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    const auto& kernel = cpu::kernels<cpu::RelAttentionKernels<T>>();
    const PackedSequences<T> sequences(tensors, lengths, op);
    const RelAttention& longest = sequences[0].r;
    const int64_t heads = longest.problem.heads, count = sequences.count();
    const int64_t kt_size = longest.keys_transposed_size(), v_size = longest.values_size();
    const int64_t rt_size = longest.positions_transposed_size();
    T* yp = mutable_data<T>(y);
    parallel_packed(heads * count, sequences.starts, heads, forward_channels(longest), [&](int64_t begin, int64_t end) {
      const Scratch<C> workspace(kt_size + v_size + rt_size), scratch(longest.forward_scratch());
      const Scratch<C> lse(heads * longest.problem.frames);  // the backward pass computes it again
      C *const kt = workspace.data(), *const values = kt + kt_size, *const rt = values + v_size;
      int64_t packed = 0;  // frames of the sequence whose positions are packed
      for (int64_t i = begin; i < end; i++) {
        const auto& [r, t, first, range] = sequences[i % count];
        const int64_t head = i / count, frames = r.problem.frames;
        if (i % count == 0 || frames != packed) kernel.pack_positions(r, t, head, rt, nullptr), packed = frames;
        kernel.pack_keys(r, t, head, kt, values);
        for (int64_t from = 0; from < frames; from += cpu::kRelAttentionQueries)
          kernel.forward(r, &range, t, kt, values, rt, head, from, std::min(from + cpu::kRelAttentionQueries, frames),
                         yp + first * heads * r.value_dim, lse.data(), scratch.data());
      }
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rel_attention_packed_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Optional& pos, const Optional& bias_u,
    const Optional& bias_v, const Optional& dropout_seeds, std::vector<int64_t> lengths, double dropout_p) {
  const char* op = "rel_attention_packed_backward";
  const RelAttentionForward tensors = packed_call(q, k, v, pos, bias_u, bias_v, dropout_seeds, dropout_p);
  check_like(grad, v, op, "grad");
  check_same_size(grad, v, op, "grad");
  const RelAttentionResults results(tensors);
  with_kernel_type(dtype_of(q), op, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    const auto& kernel = cpu::kernels<cpu::RelAttentionKernels<T>>();
    const PackedSequences<T> sequences(tensors, lengths, op);
    const RelAttention& longest = sequences[0].r;
    const int64_t heads = longest.problem.heads, count = sequences.count(), dim = longest.problem.query_dim;
    // Parts of the sequences have sums of their own. Their number depends on the shape.
    const int64_t parts = std::clamp<int64_t>((32 + heads - 1) / heads, 1, count), tasks = heads * parts;
    const int64_t rt_size = longest.positions_transposed_size(), r_size = longest.positions_size(),
                  width = longest.biases_size();
    const Scratch<C> workspace(tasks * r_size);
    const Scratch<double> biases(tasks * width);
    C* const sums = workspace.data();
    const T* gp = data<T>(grad);
    const RelAttentionGradients<T> gradients = results.gradients<T>();
    parallel_packed(tasks, sequences.starts, heads, backward_channels(longest), [&](int64_t begin, int64_t end) {
      const Scratch<C> positions(rt_size + r_size), scratch(longest.backward_scratch());
      C *const rt = positions.data(), *const rows = rt + rt_size;
      for (int64_t i = begin; i < end; i++) {
        const int64_t head = i / parts;
        C* const own = sums + i * r_size;
        std::fill_n(own, r_size, C(0));
        std::fill_n(biases.data() + i * width, width, 0.0);
        int64_t packed = 0;
        for (int64_t s = i % parts; s < count; s += parts) {
          const auto& [r, t, first, range] = sequences[s];
          const int64_t frames = r.problem.frames, at = first * heads;
          if (frames != packed) kernel.pack_positions(r, t, head, rt, rows), packed = frames;
          RelAttentionGradients<T> here = gradients;
          here.q += at * dim, here.k += at * dim, here.v += at * r.value_dim;
          kernel.backward(r, &range, gp + at * r.value_dim, t, rt, rows, head, here,
                          {own + (longest.problem.frames - frames) * r.dim(), biases.data() + i * width, nullptr},
                          scratch.data());
        }
      }
    });
    parallel_tasks(heads, parts * r_size, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; h++)
        kernel.store_sums(longest, {sums + h * parts * r_size, biases.data() + h * parts * width, nullptr}, parts, h,
                          gradients);
    });
  });
  return {results.q, results.k, results.v, results.pos, results.bias_u, results.bias_v};
}

}  // namespace

FASTASR_OPERATORS(written<rel_attention_forward>, written<rel_attention_backward>)

FASTASR_UNDECLARED(
    "fastasr/models/common/packed.py calls it in a node of autograd, for plain tensors outside autocast and tracing",
    {"rel_attention_packed_forward(Tensor q, Tensor k, Tensor v, Tensor? pos, Tensor? bias_u, Tensor? bias_v, "
     "Tensor? dropout_seeds, int[] lengths, float dropout_p) -> Tensor",
     Boxed<rel_attention_packed_forward>::call},
    {"rel_attention_packed_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? pos, Tensor? bias_u, "
     "Tensor? bias_v, Tensor? dropout_seeds, int[] lengths, float dropout_p) -> (Tensor, Tensor, Tensor, Tensor, "
     "Tensor, Tensor)",
     Boxed<rel_attention_packed_backward>::call})

}  // namespace fastasr::bindings::rel_attention
