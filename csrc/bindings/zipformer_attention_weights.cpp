// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/zipformer_attention_weights.h"

#include "bindings/attention_problem.h"
#include "bindings/attention_work.h"
#include "bindings/layer_parts.h"
#include "bindings/packed.h"
#include "bindings/scratch.h"
#include "bindings/written/zipformer_attention_weights.h"
#include "cpu/attention/attention_tiles.h"

namespace fastasr::bindings::zipformer_attention_weights {
namespace {

// Rows of W start at multiples of this many elements.
constexpr int64_t kRowPadding = 16;

// Checks W or its gradient: (heads, batch, frames, keys), keys side by side.
void check_weights(const Tensor& w, const AttentionProblem& a, const Tensor& x, const char* op, const char* name) {
  check(dtype_of(w) == dtype_of(x) && has_sizes(w, {a.heads, a.batch, a.frames, a.keys()}) &&
            (w.stride(3) == 1 || a.keys() <= 1 || w.numel() == 0),
        op, name);
}

// Makes a new W. Its memory comes from the pool and goes back to it with the tensor.
Tensor new_weights(const AttentionProblem& a, const Tensor& x) {
  const int64_t stride = (a.keys() + kRowPadding - 1) / kRowPadding * kRowPadding;
  return new_strided(x, {a.heads, a.batch, a.frames, a.keys()},
                     {a.batch * a.frames * stride, a.frames * stride, stride, 1});
}

}  // namespace

Tensor zipformer_attention_weights_forward(const ZipformerAttentionWeightsForward& call) {
  const auto& [x, pos, cached_key] = std::tie(call.x, call.pos, call.cached_key);
  const std::vector<cpu::Recording> recordings = recordings_of(call);
  const AttentionProblem a = problem_of(call, recordings);
  Tensor weights = new_weights(a, x);
  if (weights.numel() == 0) return weights;
  std::vector<cpu::KeyRange> ranges(static_cast<size_t>(a.batch));
  attention_key_ranges(a, ranges.data());
  with_kernels<cpu::AttentionWeightsKernels>(x, call.kName, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const WorkspaceLayout<C> layout(a, false);
    const Scratch<C> workspace(layout.total);
    C* const w = workspace.data();
    pack<T>(a, x, pos, cached_key, layout, w, false);
    const T* xp = data<T>(x);
    T* wp = mutable_data<T>(weights);
    // A task has four strips: its W fits in the second cache together with the packed keys.
    const int64_t rows = 4 * cpu::attention_rows(sizeof(C) == 8), tasks = (a.frames + rows - 1) / rows;
    const int64_t work = pairs_work(std::min(rows, a.frames), a.keys(), a.query_dim + a.pos_dim);
    parallel_tasks(a.heads * a.batch * tasks, work, [&](int64_t begin, int64_t end) {
      const Scratch<C> scratch(a.forward_scratch());
      for (int64_t i = begin; i < end; i++) {
        const int64_t pair = i / tasks, first = i % tasks * rows;
        kernel.forward(a, ranges.data(), xp, w + layout.kt + pair * a.keys_transposed_size(),
                       positions_of(a, w + layout.rt, pair), pair, first, std::min(first + rows, a.frames),
                       wp + pair * weights.stride(1), weights.stride(2), scratch.data());
      }
    });
  });
  return weights;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> zipformer_attention_weights_backward(const ZipformerAttentionWeightsBackward& call) {
  const auto& [x, pos, cached_key, weights, grad] =
      std::tie(call.x, call.pos, call.cached_key, call.weights, call.grad_weights);
  const std::vector<cpu::Recording> recordings = recordings_of(call);
  AttentionProblem a = problem_of(call, recordings);
  a.penalty = call.score_penalty, a.limit = call.score_limit;
  Tensor dx = new_like(x);
  Tensor dpos = new_like(pos, x);
  Tensor dcached = new_like(cached_key, x);
  if (grad.numel() == 0) {
    torch::stable::zero_(dx), torch::stable::zero_(dpos), torch::stable::zero_(dcached);
    return {dx, dpos, dcached};
  }
  std::vector<cpu::KeyRange> ranges(static_cast<size_t>(a.batch));
  attention_key_ranges(a, ranges.data());
  with_kernels<cpu::AttentionWeightsKernels>(x, call.kName, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const WorkspaceLayout<C> layout(a, true);
    const int64_t pairs = a.heads * a.batch;
    const QueryParts parts(a, pairs, a.key_rows_size() + a.positions_size());
    const int64_t tasks = pairs * parts.count;
    const int64_t dk_at = layout.total, drt_at = dk_at + tasks * a.key_rows_size();
    const Scratch<C> workspace(drt_at + (a.pos_batch ? tasks * a.positions_size() : 0));
    C* const w = workspace.data();
    pack<T>(a, x, pos, cached_key, layout, w, true);
    const T *xp = data<T>(x), *wp = data<T>(weights), *gp = data<T>(grad);
    T *dxp = mutable_data<T>(dx), *dcp = cached_key.has_value() ? mutable_data<T>(dcached) : nullptr;
    const int64_t work = pairs_work(std::min(parts.rows, a.frames), a.keys(), 2 * (a.query_dim + a.pos_dim));
    parallel_tasks(tasks, work, [&](int64_t begin, int64_t end) {
      const Scratch<C> scratch(a.backward_scratch());
      for (int64_t i = begin; i < end; i++) {
        const int64_t pair = i / parts.count, first = i % parts.count * parts.rows, h = pair / a.batch,
                      b = pair % a.batch;
        kernel.backward(a, ranges.data(), xp, wp + h * weights.stride(0) + b * weights.stride(1), weights.stride(2),
                        gp + h * grad.stride(0) + b * grad.stride(1), grad.stride(2),
                        w + layout.kt + pair * a.keys_transposed_size(), w + layout.key_rows + pair * a.key_rows_size(),
                        positions_of(a, w + layout.rt, pair), pair, first, std::min(first + parts.rows, a.frames), dxp,
                        w + dk_at + i * a.key_rows_size(), a.pos_batch ? w + drt_at + i * a.positions_size() : nullptr,
                        scratch.data());
      }
    });
    parallel_tasks(pairs, work, [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; pair++)
        kernel.store_keys(a, w + dk_at + pair * parts.count * a.key_rows_size(), parts.count, pair, dxp, dcp);
    });
    if (a.pos_batch) {
      T* dpp = mutable_data<T>(dpos);
      parallel_tasks(a.heads * a.pos_batch, work, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; k++)
          kernel.store_positions(a, w + drt_at, parts.count, k / a.pos_batch, k % a.pos_batch, dpp);
      });
    }
  });
  return {dx, dpos, dcached};
}

// Sequences that lie one after the other as rows of x (N, 1, width), each of which sees itself. The longest has all
// rows of pos, the others its middle ones.
struct PackedProblem {
  struct One {
    AttentionProblem a;
    int64_t first, index;  // row; number among the sequences that have rows
    cpu::KeyRange range;
  };
  std::vector<One> all;  // the longest first, so that equal lengths are neighbours; without empty ones
  std::vector<int64_t> starts;

  PackedProblem(const Tensor& x, const Optional& pos, const std::vector<int64_t>& lengths, int64_t heads,
                int64_t query_dim, int64_t chunk, int64_t left_chunks, const char* op) {
    check_like(x, x, op, "x");
    check(x.dim() == 3 && x.size(1) == 1 && heads > 0 && query_dim > 0 && x.size(2) % heads == 0, op, "sizes of x");
    AttentionProblem a{};
    a.batch = 1, a.heads = heads, a.query_dim = query_dim, a.pos_dim = x.size(2) / heads - 2 * query_dim;
    a.chunk = chunk, a.left_chunks = left_chunks;
    check(a.pos_dim >= 0, op, "x has too few channels");
    starts = packed_starts(lengths, x.size(0), op);
    for (size_t i = 0; i < lengths.size(); i++) {
      a.frames = lengths[i];
      if (a.frames) all.push_back({a, starts[i], static_cast<int64_t>(all.size()), {0, a.frames, -1}});
    }
    std::stable_sort(all.begin(), all.end(), [](const One& s, const One& t) { return s.a.frames > t.a.frames; });
    if (!pos.has_value()) return;
    check_like(*pos, x, op, "pos");
    check(has_sizes(*pos, {1, longest().offsets(), heads * a.pos_dim}), op, "sizes of pos");
    for (One& one : all) one.a.pos_batch = a.pos_dim > 0 ? 1 : 0;
  }

  const AttentionProblem& longest() const { return all[0].a; }
  int64_t count() const { return static_cast<int64_t>(all.size()); }
  const One& operator[](int64_t i) const { return all[static_cast<size_t>(i)]; }
  // Rows of R between its first one and that of a sequence.
  int64_t shift(const AttentionProblem& a) const { return longest().frames - a.frames; }
};

}  // namespace

// Returns W (heads, 1, T, T) of each sequence that has rows.
std::vector<Tensor> zipformer_attention_weights_packed_forward(const Tensor& x, const Optional& pos,
                                                               std::vector<int64_t> lengths, int64_t heads,
                                                               int64_t query_dim, int64_t chunk, int64_t left_chunks) {
  const char* op = "zipformer_attention_weights_packed_forward";
  const PackedProblem problem(x, pos, lengths, heads, query_dim, chunk, left_chunks, op);
  const int64_t count = problem.count();
  std::vector<Tensor> weights(static_cast<size_t>(count), x);
  for (const auto& one : problem.all) weights[static_cast<size_t>(one.index)] = new_weights(one.a, x);
  with_kernels<cpu::AttentionWeightsKernels>(x, op, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const AttentionProblem& longest = problem.longest();
    const T *xp = data<T>(x), *pp = longest.pos_batch ? data<T>(*pos) : nullptr;
    const int64_t channels = longest.query_dim + longest.pos_dim;
    parallel_packed(heads * count, problem.starts, heads, channels, [&](int64_t begin, int64_t end) {
      const Scratch<C> kt(longest.keys_transposed_size()), rt(longest.positions_size() + 1);
      const Scratch<C> scratch(longest.forward_scratch());
      int64_t packed = 0;  // frames of the sequence whose positions are packed
      for (int64_t i = begin; i < end; i++) {
        const auto& [a, first, index, range] = problem[i % count];
        const int64_t head = i / count;
        const Tensor& w = weights[static_cast<size_t>(index)];
        if (pp && (i % count == 0 || a.frames != packed)) {
          kernel.pack_positions(a, pp + problem.shift(a) * heads * a.pos_dim, head, 0, rt.data());
          packed = a.frames;
        }
        const T* own = xp + first * a.width();
        kernel.pack_keys(a, own, nullptr, head, kt.data(), nullptr);
        kernel.forward(a, &range, own, kt.data(), pp ? rt.data() : nullptr, head, 0, a.frames,
                       mutable_data<T>(w) + head * w.stride(0), w.stride(2), scratch.data());
      }
    });
  });
  return weights;
}

namespace {

// Computes sum = a + b for rows of `count` numbers.
template <typename T>
void add_rows(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t rows, int64_t count, T* sum) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < count; j++)
      cpu::store(&sum[i * count + j], cpu::load(a[i * a_stride + j]) + cpu::load(b[i * b_stride + j]));
}

// Returns dx and dpos, which has no elements without positions. `first` holds a second gradient of the first head's
// weights, (1, 1, T, T) of each sequence, or nothing.
std::tuple<Tensor, Tensor> zipformer_attention_weights_packed_backward(
    std::vector<Tensor> grads, std::vector<Tensor> first_head, std::vector<Tensor> weights, const Tensor& x,
    const Optional& pos, std::vector<int64_t> lengths, int64_t heads, int64_t query_dim, int64_t chunk,
    int64_t left_chunks, double penalty, double limit) {
  const char* op = "zipformer_attention_weights_packed_backward";
  PackedProblem problem(x, pos, lengths, heads, query_dim, chunk, left_chunks, op);
  const int64_t count = problem.count();
  check(static_cast<int64_t>(grads.size()) == count && static_cast<int64_t>(weights.size()) == count &&
            (first_head.empty() || static_cast<int64_t>(first_head.size()) == count),
        op, "weights of other sequences");
  for (auto& one : problem.all) {
    one.a.penalty = penalty, one.a.limit = limit;
    check_weights(weights[static_cast<size_t>(one.index)], one.a, x, op, "weights");
    check_weights(grads[static_cast<size_t>(one.index)], one.a, x, op, "grad");
    if (first_head.empty()) continue;
    AttentionProblem head = one.a;
    head.heads = 1;
    check_weights(first_head[static_cast<size_t>(one.index)], head, x, op, "gradient of the first head");
  }
  Tensor dx = new_like(x), dpos = new_like(pos, x);
  with_kernels<cpu::AttentionWeightsKernels>(x, op, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const AttentionProblem& longest = problem.longest();
    const T *xp = data<T>(x), *pp = longest.pos_batch ? data<T>(*pos) : nullptr;
    T* dxp = mutable_data<T>(dx);
    // Parts of the sequences have sums of dR of their own. Their number depends on the shape.
    const int64_t parts = std::clamp<int64_t>((32 + heads - 1) / heads, 1, count), tasks = heads * parts;
    const int64_t offsets = longest.offsets(), size = longest.pos_dim * offsets;
    const Scratch<double> sums(std::max<int64_t>(1, tasks * size));  // (heads, parts, pos_dim, offsets)
    const int64_t channels = 2 * (longest.query_dim + longest.pos_dim);
    parallel_packed(tasks, problem.starts, heads, channels, [&](int64_t begin, int64_t end) {
      const Scratch<C> kt(longest.keys_transposed_size()), rows(longest.key_rows_size()), dk(longest.key_rows_size());
      const Scratch<C> rt(longest.positions_size() + 1), drt(longest.positions_size() + 1);
      const Scratch<C> scratch(longest.backward_scratch());
      const Scratch<T> sum_of_first(first_head.empty() ? 1 : longest.frames * longest.frames);
      for (int64_t i = begin; i < end; i++) {
        const int64_t head = i / parts;
        double* const sum = sums.data() + i * size;
        std::fill_n(sum, size, 0.0);
        int64_t packed = 0;
        for (int64_t s = i % parts; s < count; s += parts) {
          const auto& [a, first, index, range] = problem[s];
          const Tensor &w = weights[static_cast<size_t>(index)], &g = grads[static_cast<size_t>(index)];
          if (pp && a.frames != packed) {
            kernel.pack_positions(a, pp + problem.shift(a) * heads * a.pos_dim, head, 0, rt.data());
            packed = a.frames;
          }
          const T* own = xp + first * a.width();
          T* const to = dxp + first * a.width();
          const T* gp = data<T>(g) + head * g.stride(0);
          int64_t g_stride = g.stride(2);
          if (head == 0 && !first_head.empty()) {
            const Tensor& more = first_head[static_cast<size_t>(index)];
            add_rows(gp, g_stride, data<T>(more), more.stride(2), a.frames, a.frames, sum_of_first.data());
            gp = sum_of_first.data(), g_stride = a.frames;
          }
          kernel.pack_keys(a, own, nullptr, head, kt.data(), rows.data());
          kernel.backward(a, &range, own, data<T>(w) + head * w.stride(0), w.stride(2), gp, g_stride, kt.data(),
                          rows.data(), pp ? rt.data() : nullptr, head, 0, a.frames, to, dk.data(),
                          pp ? drt.data() : nullptr, scratch.data());
          kernel.store_keys(a, dk.data(), 1, head, to, nullptr);
          if (!pp) continue;
          for (int64_t d = 0; d < a.pos_dim; d++) {
            const C* from = drt.data() + d * a.padded_offsets() + cpu::kAttentionMargin;
            double* const at = sum + d * offsets + problem.shift(a);
            for (int64_t r = 0; r < a.offsets(); r++) at[r] += static_cast<double>(from[r]);
          }
        }
      }
    });
    if (!pos.has_value()) return;
    T* dpp = mutable_data<T>(dpos);
    for (int64_t k = 0; k < heads * longest.pos_dim; k++)
      for (int64_t r = 0; r < offsets; r++) {
        const int64_t head = k / longest.pos_dim, d = k % longest.pos_dim;
        double sum = 0;
        for (int64_t part = 0; part < parts; part++) sum += sums.data()[(head * parts + part) * size + d * offsets + r];
        cpu::store(&dpp[r * heads * longest.pos_dim + k], static_cast<C>(sum));
      }
  });
  return {dx, dpos};
}

}  // namespace

FASTASR_OPERATORS(written<zipformer_attention_weights_forward>, written<zipformer_attention_weights_backward>)

FASTASR_UNDECLARED(
    "fastasr/models/zipformer/packed_weights.py calls it in a node of autograd, for plain tensors outside autocast and "
    "tracing",
    FASTASR_TYPED(zipformer_attention_weights_packed_forward),
    FASTASR_TYPED(zipformer_attention_weights_packed_backward))

}  // namespace fastasr::bindings::zipformer_attention_weights
