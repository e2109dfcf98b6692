// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/zipformer_attention_weights.h"

#include <algorithm>
#include <cstring>

#include "cpu/attention/attention_strips.h"

namespace fastasr::cpu {
namespace {

// Returns the first of the keys [begin, end) that a row of a mask hides, or -1.
int64_t first_hidden(const uint8_t* row, int64_t begin, int64_t end) {
  const void* found = begin < end ? std::memchr(row + begin, 1, static_cast<size_t>(end - begin)) : nullptr;
  return found ? static_cast<const uint8_t*>(found) - row : -1;
}

// Returns a key of its recording that the masks hide from this row, or -1. All hidden keys of a row have the same
// weight.
int64_t hidden_key(const AttentionProblem& a, const KeyRange& range, const Window& window, int64_t sequence,
                   int64_t frame) {
  const Window all = reached(a, frame);
  if (window.begin > all.begin) return all.begin;
  if (window.end < all.end) return all.end - 1;
  if (range.masked >= 0) {
    const int64_t key = first_hidden(a.padding + sequence * a.keys(), std::max(all.begin, range.masked), all.end);
    if (key >= 0) return key;
  }
  return a.mask ? first_hidden(mask_row(a, sequence, frame), all.begin, all.end) : -1;
}

template <typename T, typename C = compute_t<T>>
void forward_strip(const AttentionProblem& a, const KeyRange& range, const T* x, const C* kt, const C* rt,
                   const Strip& t, T* weights, int64_t stride, C* scratch) {
  const AttentionTiles<C>& tiles = kernels<AttentionTiles<C>>();
  const AttentionRows<T>& row_kernels = kernels<AttentionRows<T>>();
  const int64_t padded = a.padded_keys(), keys = a.keys();
  C *q = scratch, *p = q + a.query_dim * t.rows,
    *s = scratch + round_up((a.query_dim + a.padded_pos_dim()) * t.rows, 16);
  load_queries(a, t, x, q, p);
  const C* shifted = rt ? rt + kAttentionMargin + a.center() - t.begin : nullptr;
  T* out = weights + t.begin * stride;
  const bool whole = t.stored == t.rows && stride >= padded - 16;
  Window w = strip_window(a, t, range);
  const Window all = strip_reached(a, t);
  C top[kAttentionRows];
  for (;;) {
    tiles.scores(q, kt, padded, a.query_dim, p, shifted, a.padded_offsets(), a.pos_batch ? a.pos_dim : 0, w.begin,
                 w.end, s, padded, whole ? reinterpret_cast<const char*>(out) : nullptr,
                 static_cast<int64_t>(sizeof(T)) * t.rows);
    bool narrow = true;
    for (int m = 0; m < t.stored; m++) {
      C* row = s + m * padded;
      mask_scores(a, t, m, range, w.begin, w.end, row + w.begin);
      top[m] = row_kernels.maximum(row + w.begin, w.end - w.begin);
      narrow = narrow && (top[m] > kNarrowAbove<C> || sees_nothing(a, t.begin + m));
    }
    if (narrow || (w.begin == all.begin && w.end == all.end)) break;
    w = all;  // hidden keys have some weight, so all are needed
  }
  for (int m = 0; m < t.stored; m++) {
    C* row = s + m * padded;
    T* o = out + m * stride;
    if (sees_nothing(a, t.begin + m)) {
      std::memset(static_cast<void*>(o), 0, sizeof(T) * static_cast<size_t>(keys));
      continue;
    }
    const C sum = row_kernels.exponentials(row + w.begin, w.end - w.begin, top[m]);
    const int64_t end = std::min(w.end, keys);
    if (sum != sum) {  // a NaN or infinite score spoils the whole row, hidden keys too
      const Window own = reached(a, t.begin + m);
      for (int64_t j = 0; j < keys; j++) store(&o[j], own.begin <= j && j < own.end ? sum : C(0));
      continue;
    }
    std::memset(static_cast<void*>(o), 0, sizeof(T) * static_cast<size_t>(w.begin));
    row_kernels.divided(row + w.begin, sum, o + w.begin, end - w.begin);
    std::memset(static_cast<void*>(o + end), 0, sizeof(T) * static_cast<size_t>(keys - end));
  }
}

template <typename T, typename C = compute_t<T>>
void backward_strip(const AttentionProblem& a, const KeyRange& range, const T* x, const T* weights,
                    int64_t weights_stride, const T* grad, int64_t grad_stride, const C* kt, const C* key_rows,
                    const C* rt, const Strip& t, T* dx, C* dk, C* drt, C* scratch) {
  const AttentionTiles<C>& tiles = kernels<AttentionTiles<C>>();
  const AttentionRows<T>& row_kernels = kernels<AttentionRows<T>>();
  const int64_t padded = a.padded_keys(), keys = a.keys(), stride = padded + 2 * kAttentionMargin;
  const StripGradients<C> memory(a, scratch);
  C* ds = scratch + StripGradients<C>::size(a) + kAttentionMargin;

  int64_t hidden[kAttentionRows];
  bool full = a.penalty != 0;  // the penalty reaches masked scores too
  for (int m = 0; m < t.stored; m++) {
    const int64_t frame = t.begin + m;
    hidden[m] = hidden_key(a, range, chunk_window(a, frame), t.sequence, frame);
    if (hidden[m] >= 0 && load(weights[frame * weights_stride + hidden[m]]) == 0) hidden[m] = -1;
    full = full || hidden[m] >= 0;
  }
  const Window w = full ? strip_reached(a, t) : strip_window(a, t, range);
  const int64_t end = std::min(w.end, keys);
  if (a.penalty != 0) {
    load_queries(a, t, x, memory.q, memory.p);
    tiles.scores(memory.q, kt, padded, a.query_dim, memory.p,
                 rt ? rt + kAttentionMargin + a.center() - t.begin : nullptr, a.padded_offsets(),
                 a.pos_batch ? a.pos_dim : 0, w.begin, w.end, ds, stride, nullptr, 0);
  }
  for (int m = 0; m < t.rows; m++) {
    C* row = ds + m * stride;
    if (m >= t.stored || sees_nothing(a, t.begin + m)) {
      std::memset(row - kAttentionMargin, 0, sizeof(C) * static_cast<size_t>(stride));
      continue;
    }
    const int64_t frame = t.begin + m;
    const T *o = weights + frame * weights_stride + w.begin, *g = grad + frame * grad_stride + w.begin;
    C* scores = a.penalty != 0 ? ds + kAttentionRows * stride : nullptr;
    const Window own = reached(a, frame);
    const int64_t count = own.end - own.begin;
    if (scores) std::memcpy(scores, row + own.begin, sizeof(C) * static_cast<size_t>(count));
    row_kernels.softmax_gradient(o, g, row + w.begin, end - w.begin);
    if (hidden[m] >= 0) fill_hidden(a, t, m, range, w.begin, w.end, row + w.begin, C(0));
    if (scores) row_kernels.penalty(scores, row + own.begin, count, static_cast<C>(a.penalty), static_cast<C>(a.limit));
    std::memset(row + w.begin - kAttentionMargin, 0, sizeof(C) * kAttentionMargin);
    std::memset(row + end, 0, sizeof(C) * static_cast<size_t>(w.end + kAttentionMargin - end));
  }
  const bool more = t.begin + 2 * t.rows <= a.frames;
  const NextRows next = {more ? reinterpret_cast<const char*>(weights + (t.begin + t.rows) * weights_stride) : nullptr,
                         more ? reinterpret_cast<const char*>(grad + (t.begin + t.rows) * grad_stride) : nullptr,
                         static_cast<int64_t>(sizeof(T)) * t.rows};
  strip_gradients(a, t, w, x, key_rows, rt, ds, stride, memory, next, dx, dk, drt);
}

template <typename T, typename C = compute_t<T>>
void pack_keys(const AttentionProblem& a, const T* x, const T* cached, int64_t pair, C* transposed, C* rows) {
  constexpr int64_t kBlock = 16;
  const int64_t h = pair / a.batch, b = pair % a.batch, padded = a.padded_keys(), dim = a.padded_dim();
  for (int64_t j0 = 0; j0 < padded; j0 += kBlock) {
    const T* key[kBlock];
    const int64_t n = std::clamp<int64_t>(a.keys() - j0, 0, kBlock);
    for (int64_t i = 0; i < n; i++) {
      const int64_t j = j0 + i;
      key[i] = j < a.left ? cached + ((j * a.batch + b) * a.heads + h) * a.query_dim
                          : x + ((j - a.left) * a.batch + b) * a.width() + (a.heads + h) * a.query_dim;
    }
    for (int64_t d = 0; d < a.query_dim; d++) {
      C* const row = transposed + d * padded + j0;
      if (n < kBlock) std::memset(row, 0, sizeof(C) * kBlock);
      for (int64_t i = 0; i < n; i++) row[i] = load(key[i][d]);
    }
    if (!rows) continue;
    for (int64_t i = 0; i < kBlock; i++) {
      C* const row = rows + (j0 + i) * dim;
      const int64_t filled = i < n ? a.query_dim : 0;
      for (int64_t d = 0; d < filled; d++) row[d] = load(key[i][d]);
      std::memset(row + filled, 0, sizeof(C) * static_cast<size_t>(dim - filled));
    }
  }
}

template <typename T, typename C = compute_t<T>>
void pack_positions(const AttentionProblem& a, const T* pos, int64_t head, int64_t sequence, C* packed) {
  const int64_t stride = a.padded_offsets();
  std::memset(packed, 0, sizeof(C) * static_cast<size_t>(a.positions_size()));
  for (int64_t r = 0; r < a.offsets(); r++) {
    const T* row = pos + ((sequence * a.offsets() + r) * a.heads + head) * a.pos_dim;
    for (int64_t d = 0; d < a.pos_dim; d++) packed[d * stride + kAttentionMargin + r] = load(row[d]);
  }
}

template <typename T, typename C = compute_t<T>>
void store_keys(const AttentionProblem& a, const C* dk, int64_t parts, int64_t pair, T* dx, T* dcached) {
  const int64_t h = pair / a.batch, b = pair % a.batch, dim = a.padded_dim(), size = a.key_rows_size();
  for (int64_t j = 0; j < a.keys(); j++) {
    T* key = j < a.left ? dcached + ((j * a.batch + b) * a.heads + h) * a.query_dim
                        : dx + ((j - a.left) * a.batch + b) * a.width() + (a.heads + h) * a.query_dim;
    for (int64_t d = 0; d < a.query_dim; d++) {
      C sum = dk[j * dim + d];
      for (int64_t part = 1; part < parts; part++) sum += dk[part * size + j * dim + d];
      store(&key[d], sum);
    }
  }
}

template <typename T, typename C = compute_t<T>>
void store_positions(const AttentionProblem& a, const C* drt, int64_t parts, int64_t head, int64_t sequence, T* dpos) {
  const int64_t stride = a.padded_offsets(), size = a.positions_size();
  const int64_t first = a.pos_batch == 1 ? 0 : sequence, last = a.pos_batch == 1 ? a.batch : sequence + 1;
  for (int64_t r = 0; r < a.offsets(); r++)
    for (int64_t d = 0; d < a.pos_dim; d++) {
      double sum = 0;
      for (int64_t b = first; b < last; b++)
        for (int64_t part = 0; part < parts; part++)
          sum += static_cast<double>(
              drt[((head * a.batch + b) * parts + part) * size + d * stride + kAttentionMargin + r]);
      store(&dpos[((sequence * a.offsets() + r) * a.heads + head) * a.pos_dim + d], static_cast<C>(sum));
    }
}

template <typename T, typename C = compute_t<T>>
void forward(const AttentionProblem& a, const KeyRange* ranges, const T* x, const C* keys_transposed,
             const C* positions, int64_t pair, int64_t begin, int64_t end, T* weights, int64_t stride, C* scratch) {
  for_each_strip<C>(a, pair, begin, end, [&](const Strip& t) {
    forward_strip(a, ranges[t.sequence], x, keys_transposed, positions, t, weights, stride, scratch);
  });
}

template <typename T, typename C = compute_t<T>>
void backward(const AttentionProblem& a, const KeyRange* ranges, const T* x, const T* weights, int64_t weights_stride,
              const T* grad, int64_t grad_stride, const C* keys_transposed, const C* key_rows, const C* positions,
              int64_t pair, int64_t begin, int64_t end, T* dx, C* dk, C* drt, C* scratch) {
  std::memset(dk, 0, sizeof(C) * static_cast<size_t>(a.key_rows_size()));
  if (a.pos_batch) std::memset(drt, 0, sizeof(C) * static_cast<size_t>(a.positions_size()));
  for_each_strip<C>(a, pair, begin, end, [&](const Strip& t) {
    backward_strip(a, ranges[t.sequence], x, weights, weights_stride, grad, grad_stride, keys_transposed, key_rows,
                   positions, t, dx, dk, drt, scratch);
  });
}

}  // namespace

int64_t AttentionProblem::padded_keys() const { return round_up(keys(), kAttentionPad); }
int64_t AttentionProblem::padded_dim() const { return round_up(query_dim, kAttentionPad); }
int64_t AttentionProblem::padded_pos_dim() const { return round_up(pos_dim, kAttentionPositions); }
int64_t AttentionProblem::padded_offsets() const {
  return round_up(offsets() + kAttentionPad + 2 * kAttentionMargin, 16);
}
int64_t AttentionProblem::forward_scratch() const {
  return round_up((query_dim + padded_pos_dim()) * kAttentionRows, 16) + 16 + kAttentionRows * padded_keys();
}
int64_t AttentionProblem::backward_scratch() const {
  return StripGradients<float>::size(*this) + (kAttentionRows + 1) * (padded_keys() + 2 * kAttentionMargin);
}

int64_t attention_rows(bool wide) {
  return wide ? kernels<AttentionTiles<double>>().rows : kernels<AttentionTiles<float>>().rows;
}

void attention_key_ranges(const AttentionProblem& a, KeyRange* ranges) {
  const int64_t keys = a.keys();
  for (int64_t b = 0; b < a.batch; b++) {
    KeyRange r = {0, keys, -1};
    if (a.padding) {
      const uint8_t* row = a.padding + b * keys;
      while (r.begin < keys && row[r.begin]) r.begin++;
      while (r.end > r.begin && row[r.end - 1]) r.end--;
      for (int64_t j = 0; j < keys && r.masked < 0; j++)
        if (row[j]) r.masked = j;
    }
    ranges[b] = r;
  }
}

FASTASR_KERNELS(AttentionWeightsKernels, .pack_keys = pack_keys<T>, .pack_positions = pack_positions<T>,
                .forward = forward<T>, .backward = backward<T>, .store_keys = store_keys<T>,
                .store_positions = store_positions<T>)

}  // namespace fastasr::cpu
