// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/attention/attention_rows.h"
#include "cpu/attention/attention_tiles.h"
#include "cpu/attention/zipformer_attention_weights.h"
#include "cpu/math/elementary.h"

// The attention kernels share this: strips of queries, which keys they work on, and which keys are hidden from them.
namespace fastasr::cpu {

inline constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Masked scores have exactly this value, as upstream's have. Keys outside the window of a row may be left out while
// e^(-1000 - max) is 0 in every type that is computed in float; double is never narrowed so far (its e^-745 is not 0).
inline constexpr double kMasked = -1000;
template <typename C>
inline constexpr C kNarrowAbove = sizeof(C) == 4 ? C(-890) : C(-250);
template <typename C>
inline constexpr C kInfinity = std::numeric_limits<C>::infinity();

struct Window {
  int64_t begin, end;
};

// Returns the keys that may have weight for row i: those of its recording that R reaches.
inline Window reached(const AttentionProblem& a, int64_t i) {
  if (!a.recordings) return {0, a.keys()};
  const Recording& r = a.recordings[i];
  return {std::max(r.begin, i - a.center()), std::min(r.end, i + a.center() + 1)};
}

inline bool sees_nothing(const AttentionProblem& a, int64_t i) {
  return a.recordings && a.recordings[i].begin == a.recordings[i].end;
}

// Returns the keys that the chunk window of row i lets through.
inline Window chunk_window(const AttentionProblem& a, int64_t i) {
  const Window w = reached(a, i);
  if (a.chunk <= 0) return w;
  const Recording r = a.recordings ? a.recordings[i] : Recording{0, a.frames};
  const int64_t chunk = (i - r.begin) / a.chunk, length = r.end - r.begin;
  const int64_t last = chunk < length / a.chunk ? (chunk + 1) * a.chunk : length;
  int64_t first = -a.left;
  if (a.left_chunks >= 0 && a.left_chunks < chunk + a.left / a.chunk + 1)
    first = std::max(first, (chunk - a.left_chunks) * a.chunk);
  return {std::max(w.begin, r.begin + first + a.left), std::min(w.end, r.begin + last + a.left)};
}

// The rows of one strip. Beyond the last frame, rows repeat it and are not stored.
struct Strip {
  int64_t head, sequence, begin;
  int rows;    // rows of the tile
  int stored;  // the rows that have a frame
  int64_t frame(const AttentionProblem& a, int m) const { return std::min(begin + m, a.frames - 1); }
};

template <typename T, typename C>
void load_queries(const AttentionProblem& a, const Strip& t, const T* x, C* q, C* p) {
  for (int m = 0; m < t.rows; m++) {
    const T* row = x + (t.frame(a, m) * a.batch + t.sequence) * a.width();
    const T* position = row + 2 * a.heads * a.query_dim + t.head * a.pos_dim;
    row += t.head * a.query_dim;
    for (int64_t d = 0; d < a.query_dim; d++) q[d * t.rows + m] = load(row[d]);
    if (a.pos_batch)
      for (int64_t d = 0; d < a.pos_dim; d++) p[d * t.rows + m] = load(position[d]);
  }
}

inline const uint8_t* mask_row(const AttentionProblem& a, int64_t sequence, int64_t frame) {
  const int64_t row = (a.mask_per_sequence ? sequence * a.frames : 0) + frame;
  return a.mask ? a.mask + row * (a.mask_keys ? a.mask_keys : a.keys()) : nullptr;
}

// Sets s[j - j0] = value for the keys [j0, j1) that the chunk window, padding or mask hides from row m.
template <typename C>
void fill_hidden(const AttentionProblem& a, const Strip& t, int m, const KeyRange& range, int64_t j0, int64_t j1, C* s,
                 C value) {
  const AttentionRows<C>& row_kernels = kernels<AttentionRows<C>>();
  const int64_t frame = t.frame(a, m), keys = std::min(j1, a.keys());
  const Window w = chunk_window(a, frame);
  for (int64_t j = j0; j < std::min(w.begin, keys); j++) s[j - j0] = value;
  for (int64_t j = std::max(j0, w.end); j < keys; j++) s[j - j0] = value;
  if (range.masked >= 0) row_kernels.fill_where(a.padding + t.sequence * a.keys() + j0, s, keys - j0, value);
  if (const uint8_t* row = mask_row(a, t.sequence, frame)) row_kernels.fill_where(row + j0, s, keys - j0, value);
}

// Makes row m's scores of the keys [j0, j1) -1000 where they are masked, and -inf behind the last key and in other
// recordings: weight 0.
template <typename C>
void mask_scores(const AttentionProblem& a, const Strip& t, int m, const KeyRange& range, int64_t j0, int64_t j1,
                 C* s) {
  fill_hidden(a, t, m, range, j0, j1, s, static_cast<C>(kMasked));
  const Window w = reached(a, t.frame(a, m));
  for (int64_t j = j0; j < std::min(w.begin, j1); j++) s[j - j0] = -kInfinity<C>;
  for (int64_t j = std::max(j0, w.end); j < j1; j++) s[j - j0] = -kInfinity<C>;
}

// Returns the smallest window of whole tiles around those of a strip's rows; none without any.
template <typename F>
Window whole_tiles(const AttentionProblem& a, const Strip& t, const F& of_row) {
  Window w = {a.keys(), 0};
  for (int m = 0; m < t.stored; m++) {
    if (sees_nothing(a, t.begin + m)) continue;
    const Window one = of_row(a, t.begin + m);
    w.begin = std::min(w.begin, one.begin);
    w.end = std::max(w.end, one.end);
  }
  if (w.begin >= w.end) return {0, 0};
  return {w.begin / kAttentionPad * kAttentionPad, round_up(w.end, kAttentionPad)};
}

// Returns the keys that may have weight for a row of a strip.
inline Window strip_reached(const AttentionProblem& a, const Strip& t) {
  return a.recordings ? whole_tiles(a, t, reached) : Window{0, a.padded_keys()};
}

// Returns the keys of a strip that are worked on: those that some row sees, in whole tiles.
inline Window strip_window(const AttentionProblem& a, const Strip& t, const KeyRange& range) {
  const Window w = whole_tiles(a, t, [&](const AttentionProblem& p, int64_t i) {
    const Window one = chunk_window(p, i);
    return Window{std::max(one.begin, range.begin), std::min(one.end, range.end)};
  });
  return w.begin < w.end ? w : strip_reached(a, t);  // no key is seen: every key has the same weight
}

// In a forward pass without weights, the scores of a strip (16 KB) and keys (64 KB) and values of a block stay in the
// first and second cache.
inline constexpr int64_t kKeyBlock = 512;
inline constexpr int64_t kValueBlock = 64;  // keys that are added in one chain: the rounding error grows with it

struct AsTheyAre {
  template <typename C>
  void operator()(int, C*) const {}
};

// A softmax over keys that come block by block: for each row, total = sum_j e^(s[j] - top) v[j] and the sum of those
// weights.
template <typename C>
struct RunningSoftmax {
  C* total;  // rows of `depth`
  C top[kAttentionRows], sum[kAttentionRows];

  void reset(int rows, int64_t depth) {
    std::memset(total, 0, sizeof(C) * static_cast<size_t>(rows * depth));
    for (int m = 0; m < rows; m++) top[m] = std::numeric_limits<C>::lowest(), sum[m] = 0;
  }

  // Adds n <= kKeyBlock keys. Rows of scores are kKeyBlock apart, and become weights; part is working memory.
  // change(m, row) changes the weights that row m multiplies the values with, not their sum.
  template <typename F = AsTheyAre>
  void add(C* scores, int rows, int64_t n, const C* values, int64_t depth, C* part, const F& change = {}) {
    const AttentionTiles<C>& tiles = kernels<AttentionTiles<C>>();
    const AttentionRows<C>& row_kernels = kernels<AttentionRows<C>>();
    C scale[kAttentionRows];
    for (int m = 0; m < rows; m++) {
      C* row = scores + m * kKeyBlock;
      const C highest = std::max(top[m], row_kernels.maximum(row, n));
      scale[m] = exp_or_zero(top[m] - highest);
      sum[m] = sum[m] * scale[m] + row_kernels.exponentials(row, n, highest);
      change(m, row);
      top[m] = highest;
    }
    const auto weigh = depth % kAttentionPad ? tiles.narrow : tiles.queries;
    for (int64_t j = 0; j < n; j += kValueBlock) {
      weigh(scores, kKeyBlock, values, depth, j, std::min(j + kValueBlock, n), part);
      if (j == 0)
        row_kernels.rescaled(total, part, rows, depth, scale);
      else
        row_kernels.add(total, part, rows * depth);
    }
  }
};

// dq adds this many keys in one chain: the rounding error grows with it.
inline constexpr int64_t kQueryChain = 256;

// Working memory of strip_gradients.
template <typename C>
struct StripGradients {
  C *q, *p, *dq, *part, *dp;
  StripGradients(const AttentionProblem& a, C* scratch)
      : q(scratch),
        p(q + a.padded_dim() * kAttentionRows),
        dq(p + a.padded_pos_dim() * kAttentionRows),
        part(dq + a.padded_dim() * kAttentionRows),
        dp(part + a.padded_dim() * kAttentionRows) {}
  static int64_t size(const AttentionProblem& a) {
    return round_up((3 * a.padded_dim() + 2 * a.padded_pos_dim()) * kAttentionRows, 16);
  }
};

// The rows that the next strip reads: they are prefetched while this one's gradients are formed.
struct NextRows {
  const char *first, *second;
  int64_t bytes;  // per key, of all rows of a strip
};

// Takes the gradient of a strip's scores, writes dq and dp into dx, and adds to dk and drt. Rows of ds are `stride`
// apart and are 0 outside the window, for kAttentionMargin on both sides.
template <typename T, typename C>
void strip_gradients(const AttentionProblem& a, const Strip& t, const Window& w, const T* x, const C* key_rows,
                     const C* rt, const C* ds, int64_t stride, const StripGradients<C>& memory, const NextRows& next,
                     T* dx, C* dk, C* drt) {
  const AttentionTiles<C>& tiles = kernels<AttentionTiles<C>>();
  const AttentionRows<T>& row_kernels = kernels<AttentionRows<T>>();
  const int64_t dim = a.padded_dim(), pos = a.padded_pos_dim();
  const auto [q, p, dq, part, dp] = memory;
  for (int m = 0; m < t.rows; m++) {
    const T* row = x + (t.frame(a, m) * a.batch + t.sequence) * a.width();
    const T* position = row + 2 * a.heads * a.query_dim + t.head * a.pos_dim;
    row += t.head * a.query_dim;
    for (int64_t d = 0; d < dim; d++) q[m * dim + d] = d < a.query_dim ? load(row[d]) : C(0);
    for (int64_t d = 0; d < pos; d++) p[m * pos + d] = d < a.pos_dim && a.pos_batch ? load(position[d]) : C(0);
  }
  std::memset(dq, 0, sizeof(C) * static_cast<size_t>(t.rows * dim));
  for (int64_t j = w.begin; j < w.end; j += kQueryChain) {
    tiles.queries(ds, stride, key_rows, dim, j, std::min(j + kQueryChain, w.end), part);
    row_kernels.add(dq, part, t.rows * dim);
  }
  tiles.keys(ds, stride, t.rows, q, dim, w.begin, w.end, dk, next.first, next.second, next.bytes);
  if (a.pos_batch) {
    const int64_t shift = kAttentionMargin + a.center() - t.begin;
    for (int64_t e = 0; e < pos; e += kAttentionPositions) {
      tiles.positions(ds, stride, rt + e * a.padded_offsets() + shift, a.padded_offsets(), w.begin, w.end, dp + e, pos);
      tiles.offsets(ds, stride, p + e, pos, w.begin, w.end, drt + e * a.padded_offsets() + shift, a.padded_offsets());
    }
  }
  for (int m = 0; m < t.stored; m++) {
    T* row = dx + ((t.begin + m) * a.batch + t.sequence) * a.width();
    T* position = row + 2 * a.heads * a.query_dim + t.head * a.pos_dim;
    row += t.head * a.query_dim;
    for (int64_t d = 0; d < a.query_dim; d++) store(&row[d], dq[m * dim + d]);
    for (int64_t d = 0; d < a.pos_dim; d++) store(&position[d], a.pos_batch ? dp[m * pos + d] : C(0));
  }
}

template <typename C, typename F>
void for_each_strip(const AttentionProblem& a, int64_t pair, int64_t begin, int64_t end, const F& f) {
  const int rows = kernels<AttentionTiles<C>>().rows;
  for (int64_t i = begin; i < end; i += rows)
    f(Strip{pair / a.batch, pair % a.batch, i, rows, static_cast<int>(std::min<int64_t>(rows, a.frames - i))});
}

}  // namespace fastasr::cpu
