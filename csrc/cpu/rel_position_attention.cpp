// SPDX-License-Identifier: Apache-2.0
#include "cpu/rel_position_attention.h"

#include <cstring>

#include "cpu/attention_strips.h"
#include "cpu/elementary.h"

namespace fastasr::cpu {
namespace {

// Scores of a strip (16 KB), keys (64 KB) and values of a block stay in the first and second cache.
constexpr int64_t kKeyBlock = 512;
constexpr int64_t kValueBlock = 64;  // keys that are added in one chain: the rounding error grows with it
constexpr int64_t kMostStrips = kAttentionQueries / 4;

template <typename C>
struct StripState {
  Strip strip;
  Window window;
  bool done;
  C *q, *p, *total;
  C top[kAttentionRows], sum[kAttentionRows];

  void reset(int64_t depth) {
    std::memset(total, 0, sizeof(C) * static_cast<size_t>(strip.rows * depth));
    for (int m = 0; m < strip.rows; m++) top[m] = std::numeric_limits<C>::lowest(), sum[m] = 0;
  }
};

template <typename C>
struct Block {
  const AttentionProblem& a;
  const KeyRange& range;
  const C *kt, *rt, *values;
  int64_t depth;
  C *scores, *part;
};

// One strip with the keys [begin, end).
template <typename C>
void step(const Block<C>& b, StripState<C>& state, int64_t begin, int64_t end) {
  const AttentionTiles<C>& tiles = attention_tiles<C>();
  const AttentionProblem& a = b.a;
  const Strip& t = state.strip;
  const int64_t n = end - begin;
  const C* shifted = b.rt ? b.rt + kAttentionMargin + a.frames - 1 - t.begin + begin : nullptr;
  tiles.scores(state.q, b.kt + begin, a.padded_keys(), a.query_dim, state.p, shifted, a.padded_offsets(),
               a.pos_batch ? a.pos_dim : 0, 0, n, b.scores, kKeyBlock, nullptr, 0);
  C scale[kAttentionRows] = {};
  for (int m = 0; m < t.stored; m++) {
    C* row = b.scores + m * kKeyBlock;
    fill_hidden(a, t, m, b.range, begin, end, row, static_cast<C>(kMasked));
    for (int64_t j = a.keys(); j < end; j++) row[j - begin] = -kInfinity<C>;  // behind the last key: weight 0
    const C top = std::max(state.top[m], row_maximum(row, n));
    scale[m] = exp_or_zero(state.top[m] - top);
    state.sum[m] = state.sum[m] * scale[m] + row_exponentials(row, n, top);
    state.top[m] = top;
  }
  const auto weigh = b.depth % kAttentionPad ? tiles.narrow : tiles.queries;
  for (int64_t j = 0; j < n; j += kValueBlock) {
    weigh(b.scores, kKeyBlock, b.values + begin * b.depth, b.depth, j, std::min(j + kValueBlock, n), b.part);
    for (int m = 0; m < t.stored; m++)
      row_rescaled(state.total + m * b.depth, b.part + m * b.depth, b.depth, j == 0 ? scale[m] : C(1));
  }
}

template <typename C>
void walk(const Block<C>& b, StripState<C>* states, int count) {
  int64_t first = b.a.padded_keys(), last = 0;
  for (int k = 0; k < count; k++) {
    if (states[k].done) continue;
    first = std::min(first, states[k].window.begin), last = std::max(last, states[k].window.end);
    states[k].reset(b.depth);
  }
  for (int64_t j = first; j < last; j += kKeyBlock)
    for (int k = 0; k < count; k++) {
      const int64_t begin = std::max(j, states[k].window.begin), end = std::min(j + kKeyBlock, states[k].window.end);
      if (!states[k].done && begin < end) step(b, states[k], begin, end);
    }
}

template <typename T, typename C = compute_t<T>>
void forward(const AttentionProblem& a, const ValueShape& v, const KeyRange* ranges, const T* x, const C* kt,
             const C* rt, const C* values, int64_t hb, int64_t begin, int64_t end, T* y, C* scratch) {
  const int64_t depth = v.padded_dim(), h = hb / a.batch, sequence = hb % a.batch;
  const Block<C> block = {a, ranges[sequence], kt, rt, values, depth, scratch, scratch + kAttentionRows * kKeyBlock};
  StripState<C> states[kMostStrips];
  int count = 0;
  C* memory = block.part + kAttentionRows * depth;
  for_each_strip<C>(a, hb, begin, end, [&](const Strip& t) {
    StripState<C>& state = states[count++];
    state.strip = t, state.window = strip_window(a, t, block.range), state.done = false;
    state.total = memory, memory += t.rows * depth;
    state.q = memory, memory += a.query_dim * t.rows;
    state.p = memory, memory = state.p + a.padded_pos_dim() * t.rows;
    load_queries(a, t, x, state.q, state.p);
  });
  walk(block, states, count);
  bool again = false;  // where hidden keys have some weight, all of them are needed
  for (int k = 0; k < count; k++) {
    StripState<C>& state = states[k];
    const Window all = {0, a.padded_keys()};
    state.done = state.window.begin == all.begin && state.window.end == all.end;
    if (!state.done) {
      state.done = true;
      for (int m = 0; m < state.strip.stored; m++) state.done = state.done && state.top[m] > kNarrowAbove<C>;
      if (!state.done) state.window = all, again = true;
    }
  }
  if (again) walk(block, states, count);
  const int64_t width = v.heads * v.dim;
  for (int k = 0; k < count; k++)
    for (int m = 0; m < states[k].strip.stored; m++)
      row_divided(states[k].total + m * depth, states[k].sum[m],
                  y + ((states[k].strip.begin + m) * a.batch + sequence) * width + h * v.dim, v.dim);
}

template <typename T, typename C = compute_t<T>>
void pack_values(const AttentionProblem& a, const ValueShape& v, const T* values, int64_t hb, C* packed) {
  const int64_t h = hb / a.batch, b = hb % a.batch, depth = v.padded_dim();
  std::memset(packed, 0, sizeof(C) * static_cast<size_t>(attention_values_size(a, v)));
  for (int64_t j = 0; j < a.keys(); j++) {
    const T* row = values + ((j * a.batch + b) * v.heads + h) * v.dim;
    for (int64_t d = 0; d < v.dim; d++) packed[j * depth + d] = load(row[d]);
  }
}

}  // namespace

int64_t ValueShape::padded_dim() const { return round_up(dim, kAttentionPad / 2); }

int64_t attention_values_size(const AttentionProblem& a, const ValueShape& v) {
  return a.padded_keys() * v.padded_dim();
}

int64_t attention_values_scratch(const AttentionProblem& a, const ValueShape& v) {
  return kAttentionRows * (kKeyBlock + v.padded_dim()) +
         (kAttentionQueries + kAttentionRows) * (v.padded_dim() + a.query_dim + a.padded_pos_dim());
}

#define FASTASR_DEFINE(T)                                                                                    \
  void attention_pack_values(const AttentionProblem& a, const ValueShape& v, const T* values, int64_t hb,    \
                             compute_t<T>* packed) {                                                         \
    pack_values(a, v, values, hb, packed);                                                                   \
  }                                                                                                          \
  void attention_forward(const AttentionProblem& a, const ValueShape& v, const KeyRange* ranges, const T* x, \
                         const compute_t<T>* keys_transposed, const compute_t<T>* positions,                 \
                         const compute_t<T>* packed_values, int64_t hb, int64_t begin, int64_t end, T* y,    \
                         compute_t<T>* scratch) {                                                            \
    forward(a, v, ranges, x, keys_transposed, positions, packed_values, hb, begin, end, y, scratch);         \
  }
FASTASR_DEFINE(float)
FASTASR_DEFINE(double)
FASTASR_DEFINE(bfloat16)
FASTASR_DEFINE(float16)

}  // namespace fastasr::cpu
