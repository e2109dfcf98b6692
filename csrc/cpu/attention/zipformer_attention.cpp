// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/zipformer_attention.h"

#include <cstring>

#include "cpu/attention/attention_strips.h"
#include "cpu/math/elementary.h"

namespace fastasr::cpu {
namespace {

constexpr int64_t kMostStrips = kAttentionQueries / 4;

template <typename C>
struct StripState {
  Strip strip;
  Window window;
  bool done;
  C *q, *p;
  RunningSoftmax<C> softmax;
};

template <typename C>
struct Block {
  const AttentionProblem& a;
  const KeyRange& range;
  const C *kt, *rt, *values;
  int64_t depth;
  C *scores, *part;
};

// Adds the keys [begin, end) to one strip.
template <typename C>
void step(const Block<C>& b, StripState<C>& state, int64_t begin, int64_t end) {
  const AttentionTiles<C>& tiles = kernels<AttentionTiles<C>>();
  const AttentionProblem& a = b.a;
  const Strip& t = state.strip;
  const int64_t n = end - begin;
  const C* shifted = b.rt ? b.rt + kAttentionMargin + a.center() - t.begin + begin : nullptr;
  tiles.scores(state.q, b.kt + begin, a.padded_keys(), a.query_dim, state.p, shifted, a.padded_offsets(),
               a.pos_batch ? a.pos_dim : 0, 0, n, b.scores, kKeyBlock, nullptr, 0);
  for (int m = 0; m < t.stored; m++) {
    mask_scores(a, t, m, b.range, begin, end, b.scores + m * kKeyBlock);
  }
  state.softmax.add(b.scores, t.stored, n, b.values + begin * b.depth, b.depth, b.part);
}

template <typename C>
void walk(const Block<C>& b, StripState<C>* states, int count) {
  int64_t first = b.a.padded_keys(), last = 0;
  for (int k = 0; k < count; k++) {
    if (states[k].done) continue;
    first = std::min(first, states[k].window.begin), last = std::max(last, states[k].window.end);
    states[k].softmax.reset(states[k].strip.rows, b.depth);
  }
  for (int64_t j = first; j < last; j += kKeyBlock)
    for (int k = 0; k < count; k++) {
      const int64_t begin = std::max(j, states[k].window.begin), end = std::min(j + kKeyBlock, states[k].window.end);
      if (!states[k].done && begin < end) step(b, states[k], begin, end);
    }
}

// The weights of one strip, by row, times `sum`: exponentials, or 1 and 0 for equal weights.
template <typename C>
struct StripWeights {
  C *q, *p;   // working memory, by channel
  C* rows;    // padded_keys apart
  C* scores;  // of all keys before the masks, likewise; null without a penalty
  C sum[kAttentionRows];
  bool seen[kAttentionRows];  // false: hidden keys have some weight

  // Computes them, and returns the keys that may have weight or, with a penalty, a gradient of the score.
  template <typename T>
  Window compute(const AttentionProblem& a, const ValueShape& v, const KeyRange& range, const Strip& t, const T* x,
                 const C* kt, const C* rt) {
    const AttentionTiles<C>& tiles = kernels<AttentionTiles<C>>();
    const AttentionRows<T>& row_kernels = kernels<AttentionRows<T>>();
    const int64_t padded = a.padded_keys();
    load_queries(a, t, x, q, p);
    const Window all = strip_reached(a, t);
    Window w = scores ? all : strip_window(a, t, range);  // the penalty reaches masked scores too
    for (;;) {
      const size_t bytes = sizeof(C) * static_cast<size_t>(w.end - w.begin);
      tiles.scores(q, kt, padded, a.query_dim, p, rt ? rt + kAttentionMargin + a.center() - t.begin : nullptr,
                   a.padded_offsets(), a.pos_batch ? a.pos_dim : 0, w.begin, w.end, rows, padded, nullptr, 0);
      bool narrow = true;
      for (int m = 0; m < t.stored; m++) {
        C* row = rows + m * padded + w.begin;
        if (sees_nothing(a, t.begin + m)) {
          std::memset(row, 0, bytes);
          sum[m] = 1, seen[m] = true;
          continue;
        }
        if (scores) std::memcpy(scores + m * padded + w.begin, row, bytes);
        mask_scores(a, t, m, range, w.begin, w.end, row);
        const C top = row_kernels.maximum(row, w.end - w.begin);
        sum[m] = row_kernels.exponentials(row, w.end - w.begin, top);
        seen[m] = top > kNarrowAbove<C> && sum[m] == sum[m];
        narrow = narrow && seen[m];
      }
      if (narrow || (w.begin == all.begin && w.end == all.end)) break;
      w = all;
    }
    for (int m = 0; v.equal && m < t.stored; m++)
      if (!sees_nothing(a, t.begin + m))
        sum[m] = std::max(C(1), row_kernels.equalised(rows + m * padded + w.begin, sum[m], w.end - w.begin));
    return w;
  }
};

// Computes rows of y with equal weights. Each row needs all of its weights before the first product.
template <typename T, typename C = compute_t<T>>
void forward_equal(const AttentionProblem& a, const ValueShape& v, const KeyRange& range, const T* x, const C* kt,
                   const C* rt, const C* values, int64_t pair, int64_t begin, int64_t end, T* y, C* scratch) {
  const AttentionTiles<C>& tiles = kernels<AttentionTiles<C>>();
  const AttentionRows<T>& row_kernels = kernels<AttentionRows<T>>();
  const int64_t depth = v.padded_dim(), padded = a.padded_keys();
  const auto weigh = depth % kAttentionPad ? tiles.narrow : tiles.queries;
  C *rows = scratch, *total = rows + kAttentionRows * padded, *part = total + kAttentionRows * depth;
  C* q = part + kAttentionRows * depth;
  StripWeights<C> weights{q, q + kAttentionRows * a.query_dim, rows, nullptr, {}, {}};
  for_each_strip<C>(a, pair, begin, end, [&](const Strip& t) {
    const Window w = weights.compute(a, v, range, t, x, kt, rt);
    for (int m = t.stored; m < t.rows; m++)
      std::memset(rows + m * padded + w.begin, 0, sizeof(C) * static_cast<size_t>(w.end - w.begin));
    std::memset(total, 0, sizeof(C) * static_cast<size_t>(t.rows * depth));
    for (int64_t j = w.begin; j < w.end; j += kValueBlock) {
      weigh(rows, padded, values, depth, j, std::min(j + kValueBlock, w.end), part);
      row_kernels.add(total, part, t.rows * depth);
    }
    for (int m = 0; m < t.stored; m++)
      row_kernels.divided(total + m * depth, weights.sum[m],
                          y + ((t.begin + m) * a.batch + t.sequence) * v.heads * v.dim + t.head * v.dim, v.dim);
  });
}

template <typename T, typename C = compute_t<T>>
void forward(const AttentionProblem& a, const ValueShape& v, const KeyRange* ranges, const T* x, const C* kt,
             const C* rt, const C* values, int64_t pair, int64_t begin, int64_t end, T* y, C* scratch) {
  if (v.equal) return forward_equal(a, v, ranges[pair % a.batch], x, kt, rt, values, pair, begin, end, y, scratch);
  const AttentionRows<T>& row_kernels = kernels<AttentionRows<T>>();
  const int64_t depth = v.padded_dim(), h = pair / a.batch, sequence = pair % a.batch;
  const Block<C> block = {a, ranges[sequence], kt, rt, values, depth, scratch, scratch + kAttentionRows * kKeyBlock};
  StripState<C> states[kMostStrips];
  int count = 0;
  C* memory = block.part + kAttentionRows * depth;
  for_each_strip<C>(a, pair, begin, end, [&](const Strip& t) {
    StripState<C>& state = states[count++];
    state.strip = t, state.window = strip_window(a, t, block.range);
    state.done = state.window.begin == state.window.end;
    state.softmax.total = memory, memory += t.rows * depth;
    state.q = memory, memory += a.query_dim * t.rows;
    state.p = memory, memory = state.p + a.padded_pos_dim() * t.rows;
    load_queries(a, t, x, state.q, state.p);
  });
  walk(block, states, count);
  bool again = false;  // hidden keys have some weight here, so all of them are needed
  for (int k = 0; k < count; k++) {
    StripState<C>& state = states[k];
    const Window all = strip_reached(a, state.strip);
    state.done = state.window.begin == all.begin && state.window.end == all.end;
    if (!state.done) {
      state.done = true;
      for (int m = 0; m < state.strip.stored; m++)
        state.done = state.done && (state.softmax.top[m] > kNarrowAbove<C> || sees_nothing(a, state.strip.begin + m));
      if (!state.done) state.window = all, again = true;
    }
  }
  if (again) walk(block, states, count);
  const int64_t width = v.heads * v.dim;
  for (int k = 0; k < count; k++)
    for (int m = 0; m < states[k].strip.stored; m++) {
      const int64_t frame = states[k].strip.begin + m;
      T* row = y + (frame * a.batch + sequence) * width + h * v.dim;
      if (sees_nothing(a, frame))
        std::memset(static_cast<void*>(row), 0, sizeof(T) * static_cast<size_t>(v.dim));
      else
        row_kernels.divided(states[k].softmax.total + m * depth, states[k].softmax.sum[m], row, v.dim);
    }
}

template <typename T, typename C = compute_t<T>>
void pack_values(const AttentionProblem& a, const ValueShape& v, const T* values, int64_t pair, C* packed) {
  const int64_t h = pair / a.batch, b = pair % a.batch, depth = v.padded_dim();
  std::memset(packed, 0, sizeof(C) * static_cast<size_t>(attention_values_size(a, v)));
  for (int64_t j = 0; j < a.keys(); j++) {
    const T* row = values + ((j * a.batch + b) * v.heads + h) * v.dim;
    for (int64_t d = 0; d < v.dim; d++) packed[j * depth + d] = load(row[d]);
  }
}

template <typename T, typename C = compute_t<T>>
void transpose_values(const AttentionProblem& a, const ValueShape& v, const T* values, int64_t pair, C* transposed) {
  const int64_t h = pair / a.batch, b = pair % a.batch, padded = a.padded_keys();
  for (int64_t j0 = 0; j0 < padded; j0 += 16)
    for (int64_t j = j0; j < j0 + 16; j++) {
      const T* row = j < a.keys() ? values + ((j * a.batch + b) * v.heads + h) * v.dim : nullptr;
      for (int64_t d = 0; d < v.dim; d++) transposed[d * padded + j] = row ? load(row[d]) : C(0);
    }
}

// Memory of one strip of the backward pass.
template <typename C>
struct BackwardStrip {
  StripGradients<C> gradients;
  StripWeights<C> weights;
  C *columns, *rows;  // of the gradient: (dim, strip rows) and (strip rows, padded dim), those by 1 / sum
  C* ds;              // rows ds_stride apart
  int64_t depth, ds_stride;

  BackwardStrip(const AttentionProblem& a, const ValueShape& v, C* memory)
      : gradients(a, memory), depth(v.padded_dim()), ds_stride(a.padded_keys() + 2 * kAttentionMargin) {
    const int64_t strip = kAttentionRows * a.padded_keys();
    weights.q = memory + StripGradients<C>::size(a);
    weights.p = weights.q + a.query_dim * kAttentionRows;
    columns = weights.p + a.padded_pos_dim() * kAttentionRows;
    rows = columns + v.dim * kAttentionRows;
    weights.rows = memory + before(a, v);
    ds = weights.rows + strip + kAttentionMargin;
    weights.scores = a.penalty != 0 ? weights.rows + 2 * strip + 2 * kAttentionRows * kAttentionMargin : nullptr;
  }
  static int64_t before(const AttentionProblem& a, const ValueShape& v) {
    const int64_t channels = a.query_dim + a.padded_pos_dim() + v.dim + v.padded_dim();
    return StripGradients<C>::size(a) + round_up(channels * kAttentionRows, 16);
  }
  static int64_t size(const AttentionProblem& a, const ValueShape& v) {
    return before(a, v) + kAttentionRows * ((a.penalty != 0 ? 3 : 2) * a.padded_keys() + 2 * kAttentionMargin);
  }
};

template <typename T, typename C = compute_t<T>>
void backward_strip(const AttentionProblem& a, const ValueShape& v, const KeyRange& range, const Strip& t,
                    const T* grad, const T* x, const C* kt, const C* key_rows, const C* rt, const C* vt, T* dx, C* dk,
                    C* drt, C* dv, BackwardStrip<C>& s) {
  const AttentionTiles<C>& tiles = kernels<AttentionTiles<C>>();
  const AttentionRows<T>& row_kernels = kernels<AttentionRows<T>>();
  const int64_t padded = a.padded_keys(), keys = a.keys();
  const Window w = s.weights.compute(a, v, range, t, x, kt, rt);
  C* const weights = s.weights.rows;
  const C* const sum = s.weights.sum;
  const int64_t end = std::min(w.end, keys), width = v.heads * v.dim;
  for (int m = 0; m < t.rows; m++) {
    const T* g = grad + (t.frame(a, m) * a.batch + t.sequence) * width + t.head * v.dim;
    const bool stored = m < t.stored;
    for (int64_t d = 0; d < v.dim; d++) s.columns[d * t.rows + m] = load(g[d]);
    for (int64_t d = 0; d < s.depth; d++) s.rows[m * s.depth + d] = stored && d < v.dim ? load(g[d]) / sum[m] : C(0);
    if (!stored) std::memset(weights + m * padded + w.begin, 0, sizeof(C) * static_cast<size_t>(w.end - w.begin));
  }
  if (s.depth % kAttentionPad)
    tiles.narrow_keys(weights, padded, t.rows, s.rows, s.depth, w.begin, w.end, dv);
  else
    tiles.keys(weights, padded, t.rows, s.rows, s.depth, w.begin, w.end, dv, nullptr, nullptr, 0);
  if (!v.equal)
    tiles.scores(s.columns, vt, padded, v.dim, nullptr, nullptr, 0, 0, w.begin, w.end, s.ds, s.ds_stride, nullptr, 0);
  for (int m = 0; m < t.rows; m++) {
    C* row = s.ds + m * s.ds_stride;
    if (m >= t.stored) {
      std::memset(row - kAttentionMargin, 0, sizeof(C) * static_cast<size_t>(s.ds_stride));
      continue;
    }
    if (v.equal)
      std::memset(row + w.begin, 0, sizeof(C) * static_cast<size_t>(w.end - w.begin));
    else
      row_kernels.attention_gradient(weights + m * padded + w.begin, sum[m], row + w.begin, w.end - w.begin);
    if (!s.weights.seen[m]) fill_hidden(a, t, m, range, w.begin, w.end, row + w.begin, C(0));
    if (s.weights.scores && !sees_nothing(a, t.begin + m)) {
      const Window own = reached(a, t.begin + m);
      row_kernels.penalty(s.weights.scores + m * padded + own.begin, row + own.begin, own.end - own.begin,
                          static_cast<C>(a.penalty), static_cast<C>(a.limit));
    }
    std::memset(row + w.begin - kAttentionMargin, 0, sizeof(C) * kAttentionMargin);
    std::memset(row + end, 0, sizeof(C) * static_cast<size_t>(w.end + kAttentionMargin - end));
  }
  strip_gradients(a, t, w, x, key_rows, rt, s.ds, s.ds_stride, s.gradients, NextRows{}, dx, dk, drt);
}

template <typename T, typename C = compute_t<T>>
void store_values(const AttentionProblem& a, const ValueShape& v, const C* dv, int64_t parts, int64_t pair, T* dvalue) {
  const int64_t h = pair / a.batch, b = pair % a.batch, depth = v.padded_dim(), size = attention_values_size(a, v);
  for (int64_t j = 0; j < a.keys(); j++) {
    T* row = dvalue + ((j * a.batch + b) * v.heads + h) * v.dim;
    for (int64_t d = 0; d < v.dim; d++) {
      C total = dv[j * depth + d];
      for (int64_t part = 1; part < parts; part++) total += dv[part * size + j * depth + d];
      store(&row[d], total);
    }
  }
}

template <typename T, typename C = compute_t<T>>
void backward(const AttentionProblem& a, const ValueShape& v, const KeyRange* ranges, const T* grad, const T* x,
              const C* keys_transposed, const C* key_rows, const C* positions, const C* values_transposed, int64_t pair,
              int64_t begin, int64_t end, T* dx, C* dk, C* drt, C* dv, C* scratch) {
  std::memset(dk, 0, sizeof(C) * static_cast<size_t>(a.key_rows_size()));
  std::memset(dv, 0, sizeof(C) * static_cast<size_t>(attention_values_size(a, v)));
  if (a.pos_batch) std::memset(drt, 0, sizeof(C) * static_cast<size_t>(a.positions_size()));
  BackwardStrip<C> strip(a, v, scratch);
  for_each_strip<C>(a, pair, begin, end, [&](const Strip& t) {
    backward_strip(a, v, ranges[t.sequence], t, grad, x, keys_transposed, key_rows, positions, values_transposed, dx,
                   dk, drt, dv, strip);
  });
}

}  // namespace

int64_t ValueShape::padded_dim() const { return round_up(dim, kAttentionPad / 2); }

int64_t attention_values_size(const AttentionProblem& a, const ValueShape& v) {
  return a.padded_keys() * v.padded_dim();
}

int64_t attention_values_scratch(const AttentionProblem& a, const ValueShape& v) {
  if (v.equal) return kAttentionRows * (a.padded_keys() + 2 * v.padded_dim() + a.query_dim + a.padded_pos_dim());
  return kAttentionRows * (kKeyBlock + v.padded_dim()) +
         (kAttentionQueries + kAttentionRows) * (v.padded_dim() + a.query_dim + a.padded_pos_dim());
}

int64_t attention_values_transposed_size(const AttentionProblem& a, const ValueShape& v) {
  return v.dim * a.padded_keys();
}

int64_t attention_values_backward_scratch(const AttentionProblem& a, const ValueShape& v) {
  return BackwardStrip<float>::size(a, v);
}

FASTASR_KERNELS(ZipformerAttentionKernels, .pack_values = pack_values<T>, .forward = forward<T>,
                .transpose_values = transpose_values<T>, .backward = backward<T>, .store_values = store_values<T>)

}  // namespace fastasr::cpu
