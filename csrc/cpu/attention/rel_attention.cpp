// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/rel_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/attention/attention_strips.h"
#include "cpu/gemm/gemm.h"
#include "cpu/math/elementary.h"

namespace fastasr::cpu {
namespace {

// Copies of R's first and last row before and behind the packed rows: products take whole tiles without bounds.
constexpr int64_t kPositionMargin = 96;
constexpr int64_t kBandWidth = kKeyBlock + kAttentionPad;
// In the backward pass, a block has this many queries. More of them make dk, dv and dR cheaper, until weights and dS
// leave the second cache.
constexpr int64_t kBackwardQueries = 32;
constexpr int64_t kStrips = kRelAttentionQueries / 4;

template <typename C>
C scale_of(const RelAttention& r) {
  return static_cast<C>(1 / std::sqrt(static_cast<double>(r.problem.query_dim)));
}

// Returns the row of a query in (batch, frames, heads, width).
template <typename T>
T* row_of(const RelAttention& r, T* t, int64_t width, int64_t head, int64_t frame) {
  return t + ((r.sequence * r.all_frames + r.first + frame) * r.problem.heads + head) * width;
}

// Returns the row of a key in (batch, keys, heads, width).
template <typename T>
T* key_row(const RelAttention& r, T* t, int64_t width, int64_t head, int64_t key) {
  return t + ((r.sequence * r.all_keys + r.first + key) * r.problem.heads + head) * width;
}

// Returns the place of a query in (batch, heads, frames).
int64_t place_of(const RelAttention& r, int64_t head, int64_t frame) {
  return (r.sequence * r.problem.heads + head) * r.all_frames + r.first + frame;
}

// Returns the keys that the context of the queries [first, last] lets through.
Window context_of(const RelAttention& r, int64_t first, int64_t last) {
  const AttentionProblem& a = r.problem;
  const Context& c = r.context;
  const auto chunk = [&](int64_t i) { return (i + a.left) / c.chunk * c.chunk; };
  return {c.left < 0 ? 0 : std::max<int64_t>(0, chunk(first) - c.left),
          c.right < 0 ? a.keys() : std::min(a.keys(), chunk(last) + c.chunk + c.right)};
}

// Computes out[d * stride + j] = in[j * step + d] for N rows, whose lanes are written side by side.
template <int N, typename T, typename C = compute_t<T>>
void transpose_rows(const T* __restrict in, int64_t step, int64_t width, C* __restrict out, int64_t stride) {
  for (int64_t d = 0; d < width; d++)
    for (int j = 0; j < N; j++) out[d * stride + j] = load(in[j * step + d]);
}

// Writes (width, count) by channel, `stride` apart.
template <typename T, typename C = compute_t<T>>
void transpose(const T* in, int64_t step, int64_t count, int64_t width, C* out, int64_t stride) {
  int64_t j = 0;
  for (; j + 16 <= count; j += 16) transpose_rows<16>(in + j * step, step, width, out + j, stride);
  for (; j + 4 <= count; j += 4) transpose_rows<4>(in + j * step, step, width, out + j, stride);
  for (; j < count; j++) transpose_rows<1>(in + j * step, step, width, out + j, stride);
}

// Copies rows of `width` numbers, `step` apart, to rows of `depth`.
template <typename T, typename C = compute_t<T>>
void copy_rows(const T* __restrict in, int64_t step, int64_t count, int64_t width, C* __restrict out, int64_t depth) {
  for (int64_t j = 0; j < count; j++)
    for (int64_t d = 0; d < width; d++) out[j * depth + d] = load(in[j * step + d]);
}

template <typename C>
void zero(C* at, int64_t n) {
  std::memset(at, 0, sizeof(C) * static_cast<size_t>(n));
}

// Writes (width, stride) by channel, zeros behind the last of `count` columns.
template <typename T, typename C = compute_t<T>>
void transpose_padded(const T* in, int64_t step, int64_t count, int64_t width, C* out, int64_t stride) {
  const bool few = stride <= 4 * kAttentionPad;  // one call for all costs less than one for each channel
  if (few) zero(out, width * stride);
  transpose(in, step, count, width, out, stride);
  if (few) return;
  for (int64_t d = 0; d < width; d++) zero(out + d * stride + count, stride - count);
}

// Writes `rows` rows of `depth`, zeros behind `count` rows and behind the columns of each.
template <typename T, typename C = compute_t<T>>
void copy_padded(const T* in, int64_t step, int64_t count, int64_t width, C* out, int64_t depth, int64_t rows) {
  const int64_t full = width == depth ? count : 0;
  zero(out + full * depth, (rows - full) * depth);
  copy_rows(in, step, count, width, out, depth);
}

// Computes out = (q + bias) scale, over the channels of a row.
template <typename T, typename C = compute_t<T>>
void add_bias(const T* __restrict q, const T* __restrict bias, int64_t dim, C scale, C* __restrict out) {
  if (bias)
    for (int64_t d = 0; d < dim; d++) out[d] = (load(q[d]) + load(bias[d])) * scale;
  else
    for (int64_t d = 0; d < dim; d++) out[d] = load(q[d]) * scale;
}

template <typename T>
const T* bias_of(const T* bias, int64_t head, int64_t dim) {
  return bias ? bias + head * dim : nullptr;
}

// Prepares a strip's queries with a bias, times the scale: rows of `dim()`, zeros behind their channels, and by
// channel. Rows behind the last frame are zeros.
template <typename T, typename C = compute_t<T>>
void load_biased(const RelAttention& r, const T* q, const T* bias, const Strip& s, C* rows, C* columns) {
  const AttentionProblem& a = r.problem;
  const int64_t dim = a.query_dim, depth = r.dim();
  for (int m = 0; m < s.stored; m++) {
    C* row = rows + m * depth;
    add_bias(row_of(r, q, dim, s.head, s.begin + m), bias_of(bias, s.head, dim), dim, scale_of<C>(r), row);
    zero(row + dim, depth - dim);
  }
  zero(rows + s.stored * depth, (s.rows - s.stored) * depth);
  if (s.stored < s.rows) zero(columns, dim * s.rows);
  transpose(rows, depth, s.stored, dim, columns, s.rows);
}

// Prepares a strip's queries with the biases of content and, where there are positions, of position.
template <typename T, typename C = compute_t<T>>
void load_biased(const RelAttention& r, const RelAttentionOperands<T>& t, const Strip& s, C* content_rows,
                 C* position_rows, C* content, C* position) {
  load_biased(r, t.q, t.bias_u, s, content_rows, content);
  if (r.pos_heads) load_biased(r, t.q, t.bias_v, s, position_rows, position);
}

// Returns the factor of a query's offset bias.
template <typename T, typename C = compute_t<T>>
C gate(const RelAttention& r, const RelAttentionOperands<T>& t, int64_t head, int64_t frame) {
  return t.offset_gate ? load(*row_of(r, t.offset_gate, 1, head, frame)) : C(1);
}

// Returns the offset bias behind the packed positions.
template <typename C>
C* offset_bias_of(const RelAttention& r, C* rt) {
  return rt + r.position_channels() * r.positions();
}

// Returns a row of the offset bias that begins at the offset of the key `begin`; `row` is what the table begins with.
template <typename C>
C* bias_row(const RelAttention& r, C* row, int64_t frame, int64_t begin) {
  return row + kAttentionMargin + r.all_frames - 1 - frame + begin;
}

// Returns the row of the key bias's table that a head and sequence have.
int64_t key_bias_row(const RelAttention& r, int64_t head, int64_t sequence) {
  return (r.key_bias_batch == 1 ? 0 : sequence) * r.key_bias_heads + (r.key_bias_heads == 1 ? 0 : head);
}

// Sets the scores s[j - begin] of hidden keys and of those behind the last to -inf.
template <typename C>
void hide(const RelAttention& r, const Strip& t, int m, int64_t begin, int64_t end, C* s) {
  const int64_t n = end - begin;
  fill_hidden(r.problem, t, m, r.range, begin, end, s, -kInfinity<C>);
  const Window w = context_of(r, t.begin + m, t.begin + m);  // ends with the keys
  std::fill(s, s + std::clamp<int64_t>(w.begin - begin, 0, n), -kInfinity<C>);
  std::fill(s + std::clamp<int64_t>(w.end - begin, 0, n), s + n, -kInfinity<C>);
}

int64_t round_down(int64_t n) {
  return n & -kAttentionPad;  // a multiple, of negative numbers too
}

// Adds position[m] R[j - i] to s[m][j - begin], for the keys [begin, end).
template <typename C>
void add_positions(const RelAttention& r, const Strip& t, const C* position, const C* rt, int64_t begin, int64_t end,
                   C* s, int64_t stride, C* band) {
  const AttentionTiles<C>& tiles = kernels<AttentionTiles<C>>();
  const AttentionRows<C>& row_kernels = kernels<AttentionRows<C>>();
  const int64_t lead = t.rows - 1, at = t.begin + r.problem.left, columns = r.positions(), dim = r.problem.query_dim;
  // All queries of the strip have R's first row for the keys before `first`, and its last one from `last` on.
  const int64_t first = std::clamp(round_down(at - r.span.left), begin, end);
  const int64_t last = std::clamp(round_up(at + lead + r.span.right + 1, kAttentionPad), first, end);
  const int64_t seen = std::min(last, r.problem.keys()) - first;
  if (seen > 0)
    tiles.scores(position, rt + kPositionMargin + r.span.left + first - at - lead, columns, dim, nullptr, nullptr, 0, 0,
                 0, round_up(seen + lead, kAttentionPad), band, kBandWidth, nullptr, 0);
  C before[kAttentionRows] = {}, behind[kAttentionRows] = {};
  if (first > begin || last < end)
    for (int64_t d = 0; d < dim; d++)
      for (int m = 0; m < t.rows; m++) {
        const C *row = rt + d * columns + kPositionMargin, q = position[d * t.rows + m];
        before[m] += q * row[0], behind[m] += q * row[r.span.rows() - 1];
      }
  for (int m = 0; m < t.stored; m++) {
    C* row = s + m * stride;
    row_kernels.add_number(row, first - begin, before[m]);
    if (seen > 0) row_kernels.add(row + first - begin, band + m * kBandWidth + lead - m, last - first);
    row_kernels.add_number(row + last - begin, end - last, behind[m]);
  }
}

// Computes s[m][j - begin] = content[m] k[j] + position[m] R[j - i] + g[i] b[T - 1 + j - i] + c[j] for the keys [begin,
// end), -inf where one is hidden.
template <typename T, typename C = compute_t<T>>
void scores_of(const RelAttention& r, const RelAttentionOperands<T>& operands, const Strip& t, const C* content,
               const C* position, const C* kt, const C* rt, int64_t begin, int64_t end, C* s, int64_t stride, C* band) {
  const AttentionRows<C>& row_kernels = kernels<AttentionRows<C>>();
  const AttentionProblem& a = r.problem;
  const int64_t n = end - begin;
  kernels<AttentionTiles<C>>().scores(content, kt + begin, a.padded_keys(), a.query_dim, nullptr, nullptr, 0, 0, 0, n,
                                      s, stride, nullptr, 0);
  if (r.pos_heads) add_positions(r, t, position, rt, begin, end, s, stride, band);
  const C* const bias = offset_bias_of(r, rt);
  for (int m = 0; m < t.stored; m++) {
    C* row = s + m * stride;
    if (r.has_offset_bias) {
      const int64_t i = t.begin + m;
      row_kernels.add_scaled(row, bias_row(r, bias, i, begin), n, gate(r, operands, t.head, i));
    }
    if (r.key_bias_heads) row_kernels.add(row, kt + a.query_dim * a.padded_keys() + begin, n);
    if (r.soft_cap > 0) row_kernels.soft_cap(row, n, static_cast<C>(r.soft_cap));
    hide(r, t, m, begin, end, row);
  }
}

// Says whether any key is hidden from the query. A query whose scores are all -inf though no key is hidden has NaN for
// weights; one that sees no key has zeros.
bool hides_any(const RelAttention& r, int64_t frame) {
  const AttentionProblem& a = r.problem;
  const Window w = context_of(r, frame, frame);
  if (r.range.masked >= 0 || w.begin > 0 || w.end < r.all_keys) return true;
  const uint8_t* row = mask_row(a, 0, frame);
  return row && std::memchr(row, 1, static_cast<size_t>(a.keys()));
}

// Applies dropout to n numbers of a row, the first of which belongs to the key `begin`.
template <typename C>
void drop(const RelAttention& r, int64_t head, int64_t frame, int64_t begin, int64_t n, C* row) {
  if (r.dropout.threshold == 0) return;
  kernels<AttentionRows<C>>().drop(row, n, dropout_row(r.dropout, place_of(r, head, frame)), r.first + begin,
                                   r.dropout.threshold, static_cast<C>(r.dropout.scale));
}

// Returns the keys that any of the queries [first, last] may see: padding at either end of a sequence is left out.
Window window_of(const RelAttention& r, int64_t first, int64_t last) {
  const Window w = context_of(r, first, last);
  const int64_t begin = std::max(w.begin, r.range.begin), end = std::min(w.end, r.range.end);
  if (begin >= end) return {0, 0};
  return {begin / kAttentionPad * kAttentionPad, round_up(end, kAttentionPad)};
}

// Packs the keys of one head by channel, with the key bias behind them.
template <typename T, typename C = compute_t<T>>
void transpose_keys(const RelAttention& r, const RelAttentionOperands<T>& t, int64_t head, C* out) {
  const AttentionProblem& a = r.problem;
  const int64_t n = r.key_rows(), dim = a.query_dim;
  transpose_padded(key_row(r, t.k, dim, head, 0), a.heads * dim, a.keys(), dim, out, n);
  if (r.key_bias_heads)
    copy_padded(t.key_bias + key_bias_row(r, head, r.sequence) * r.all_keys + r.first, 0, 1, a.keys(), out + dim * n, n,
                1);
}

template <typename T, typename C = compute_t<T>>
void pack_keys(const RelAttention& r, const RelAttentionOperands<T>& t, int64_t head, C* keys_transposed, C* values) {
  const AttentionProblem& a = r.problem;
  transpose_keys(r, t, head, keys_transposed);
  copy_padded(key_row(r, t.v, r.value_dim, head, 0), a.heads * r.value_dim, a.keys(), r.value_dim, values, r.values(),
              r.key_rows());
}

template <typename T, typename C = compute_t<T>>
void pack_positions(const RelAttention& r, const RelAttentionOperands<T>& t, int64_t table, C* transposed, C* rows) {
  const AttentionProblem& a = r.problem;
  if (r.has_offset_bias) {
    C* const row = offset_bias_of(r, transposed);
    zero(row, a.padded_offsets());
    for (int64_t i = 0; i < a.offsets(); i++) row[kAttentionMargin + i] = load(t.offset_bias[i * a.heads + table]);
  }
  if (!r.pos_heads) return;
  const int64_t dim = a.query_dim, depth = r.dim(), step = r.pos_heads * dim, n = r.span.rows(), end = r.positions();
  const T* in = t.pos + r.span.first * step + (r.pos_heads == 1 ? 0 : table) * dim;
  transpose(in, step, n, dim, transposed + kPositionMargin, end);
  for (int64_t d = 0; d < dim; d++) {
    C* const row = transposed + d * end;
    std::fill_n(row, kPositionMargin, row[kPositionMargin]);
    std::fill(row + kPositionMargin + n, row + end, row[kPositionMargin + n - 1]);
  }
  if (!rows) return;
  copy_padded(in, step, n, dim, rows + kPositionMargin * depth, depth, n);
  const auto copies = [&](int64_t from, int64_t to, int64_t of) {
    for (int64_t row = from; row < to; row++) std::copy_n(rows + of * depth, depth, rows + row * depth);
  };
  copies(0, kPositionMargin, kPositionMargin), copies(kPositionMargin + n, end, kPositionMargin + n - 1);
}

// --------------------------------------------------------------------------- forward
template <typename C>
struct StripState {
  Strip strip;
  Window window;
  C *content, *position;
  RunningSoftmax<C> softmax;
};

template <typename T, typename C = compute_t<T>>
void store_strip(const RelAttention& r, const Strip& strip, const RunningSoftmax<C>& softmax, T* y, C* lse) {
  const AttentionRows<T>& row_kernels = kernels<AttentionRows<T>>();
  for (int m = 0; m < strip.stored; m++) {
    const int64_t frame = strip.begin + m;
    T* out = row_of(r, y, r.value_dim, strip.head, frame);
    const bool none = softmax.sum[m] == 0 && hides_any(r, frame);  // the query sees no key
    if (none)
      std::memset(static_cast<void*>(out), 0, sizeof(T) * static_cast<size_t>(r.value_dim));
    else
      row_kernels.divided(softmax.total + m * r.values(), softmax.sum[m], out, r.value_dim);
    lse[place_of(r, strip.head, frame)] = none ? kInfinity<C> : softmax.top[m] + std::log(softmax.sum[m]);
  }
}

template <typename T, typename C = compute_t<T>>
void forward(const RelAttention& r, const RelAttentionOperands<T>& t, const C* kt, const C* v, const C* rt,
             int64_t head, int64_t begin, int64_t end, T* y, C* lse, C* scratch) {
  const AttentionProblem& a = r.problem;
  const int64_t depth = r.values();
  const Window window = window_of(r, begin, end - 1);
  C *scores = scratch, *band = scores + kAttentionRows * kKeyBlock, *part = band + kAttentionRows * kBandWidth;
  C *rows = part + kAttentionRows * depth, *memory = rows + 2 * kAttentionRows * r.dim();
  StripState<C> states[kStrips];
  int count = 0;
  for_each_strip<C>(a, head, begin, end, [&](const Strip& strip) {
    StripState<C>& s = states[count++];
    s.strip = strip;
    s.window = window_of(r, strip.begin, strip.begin + strip.stored - 1);
    s.softmax.total = memory, memory += strip.rows * depth;
    s.content = memory, memory += strip.rows * a.query_dim;
    s.position = memory, memory += strip.rows * a.query_dim;
    load_biased(r, t, strip, rows, rows + strip.rows * r.dim(), s.content, s.position);
    s.softmax.reset(strip.rows, depth);
  });
  for (int64_t j0 = window.begin; j0 < window.end; j0 += kKeyBlock)
    for (int k = 0; k < count; k++) {
      StripState<C>& s = states[k];
      const int64_t from = std::max(j0, s.window.begin), to = std::min(j0 + kKeyBlock, s.window.end);
      if (from >= to) continue;
      scores_of(r, t, s.strip, s.content, s.position, kt, rt, from, to, scores, kKeyBlock, band);
      s.softmax.add(scores, s.strip.stored, to - from, v + from * depth, depth, part,
                    [&](int m, C* row) { drop(r, head, s.strip.begin + m, from, to - from, row); });
    }
  for (int k = 0; k < count; k++) store_strip(r, states[k].strip, states[k].softmax, y, lse);
}

// The memory of few_queries.
struct FewQueries {
  int64_t keys, offsets, depth, values;  // padded
  int64_t content, position, by_key, by_offset, block, part, total, packed, elements;
  explicit FewQueries(const RelAttention& r)
      : keys(r.key_rows()), offsets(r.problem.padded_offsets()), depth(r.dim()), values(r.values()) {
    const int64_t n = r.problem.frames;
    content = 0, position = content + n * depth, by_key = position + n * depth, by_offset = by_key + n * keys;
    block = by_offset + n * offsets, part = block + kAttentionRows * kKeyBlock, total = part + kAttentionRows * values;
    packed = total + kAttentionRows * values, elements = packed + values * keys;
  }
};

// --------------------------------------------------------------------------- backward
// Memory of one head, and of one block of its queries.
template <typename C>
struct BackwardMemory {
  C *kt, *keys, *vt, *dk, *dv;      // packed operands and sums
  C *content, *position, *columns;  // of a strip, by channel; columns: of the gradient
  C *band, *part;                   // of a strip
  C *q, *p, *g, *dq, *dp;           // of the block, rows; g by 1 / sum
  C *weights, *ds;                  // of the block, rows `stride` apart
  C* scores;                        // of a query, under a soft cap
  int64_t stride, elements;

  BackwardMemory(const RelAttention& r, C* memory) {
    const int64_t n = r.key_rows(), depth = r.dim(), dim = r.problem.query_dim;
    C* at = memory;
    const auto take = [&](int64_t count) {
      C* here = at;
      at += round_up(count, 16);
      return here;
    };
    kt = take(r.keys_transposed_size()), keys = take(depth * n), vt = take(r.value_dim * n), dk = take(depth * n);
    dv = take(r.values() * n);
    content = take(dim * kAttentionRows), position = take(dim * kAttentionRows);
    columns = take(r.value_dim * kAttentionRows);
    band = take(kBandWidth * kAttentionRows), part = take(depth * kAttentionRows);
    q = take(depth * kBackwardQueries), p = take(depth * kBackwardQueries), g = take(r.values() * kBackwardQueries);
    dq = take(depth * kBackwardQueries), dp = take(depth * kBackwardQueries);
    // An odd number of 64 bytes: rows a power of two apart would share a few sets of the first cache.
    stride = round_up(n + 2 * kAttentionMargin, 32) + 16;
    weights = take(stride * kBackwardQueries);
    ds = take(stride * kBackwardQueries) + kAttentionMargin;
    scores = take(r.soft_cap > 0 ? n : 0);
    elements = at - memory;
  }
};

template <typename T, typename C>
struct BackwardProblem {
  const RelAttention& r;
  const RelAttentionOperands<T>& t;
  const T* grad;
  const C *rt, *rows;  // R of this head
  int64_t head;
  const RelAttentionGradients<T>& gradients;
  const RelAttentionSums<C>& sums;
  const BackwardMemory<C>& m;
  Window window;  // window of the block
};

// Computes the gate's gradient of a query and adds to the offset bias's, from n numbers of dS.
template <typename T, typename C>
void add_offset_gradients(const BackwardProblem<T, C>& b, int64_t frame, int64_t n, const C* ds) {
  const AttentionRows<C>& row_kernels = kernels<AttentionRows<C>>();
  row_kernels.add_to_double(bias_row(b.r, b.sums.offsets, frame, b.window.begin), ds, n, gate(b.r, b.t, b.head, frame));
  if (!b.t.offset_gate) return;
  const C* bias = offset_bias_of(b.r, b.rt);
  store(row_of(b.r, b.gradients.offset_gate, 1, b.head, frame),
        row_kernels.dot(bias_row(b.r, bias, frame, b.window.begin), ds, n));
}

// Writes e^(s - max) of a strip to `weights`, dS to `ds`, and the strip's rows of q, p and g. `first` is the block's.
template <typename T, typename C>
void strip_softmax_gradient(const BackwardProblem<T, C>& b, const Strip& t, int64_t first) {
  const AttentionTiles<C>& tiles = kernels<AttentionTiles<C>>();
  const AttentionRows<T>& row_kernels = kernels<AttentionRows<T>>();
  const AttentionProblem& a = b.r.problem;
  const BackwardMemory<C>& m = b.m;
  const int64_t depth = b.r.dim(), values = b.r.values(), width = b.r.value_dim, row0 = t.begin - first;
  const Window w = b.window;
  C *weights = m.weights + row0 * m.stride, *ds = m.ds + row0 * m.stride;
  load_biased(b.r, b.t, t, m.q + row0 * depth, m.p + row0 * depth, m.content, m.position);
  copy_padded(row_of(b.r, b.grad, width, b.head, t.begin), a.heads * width, t.stored, width, m.g + row0 * values,
              values, t.rows);
  transpose(m.g + row0 * values, values, t.rows, width, m.columns, t.rows);
  for (int64_t j = w.begin; j < w.end; j += kKeyBlock) {
    const int64_t end = std::min(j + kKeyBlock, w.end);
    scores_of(b.r, b.t, t, m.content, m.position, m.kt, b.rt, j, end, weights + j, m.stride, m.band);
  }
  tiles.scores(m.columns, m.vt, a.padded_keys(), width, nullptr, nullptr, 0, 0, w.begin, w.end, ds, m.stride, nullptr,
               0);
  for (int i = 0; i < t.rows; i++) {
    C *e = weights + i * m.stride + w.begin, *gradient = ds + i * m.stride + w.begin, *g = m.g + (row0 + i) * values;
    const int64_t n = w.end - w.begin;
    zero(gradient - kAttentionMargin, kAttentionMargin), zero(gradient + n, kAttentionMargin);
    C sum = 0;
    if (b.r.soft_cap > 0) std::copy_n(e, n, m.scores);
    if (i < t.stored)
      sum = row_kernels.exponentials(e, n, std::max(row_kernels.maximum(e, n), std::numeric_limits<C>::lowest()));
    // the query sees no key, or does not exist
    if (sum == 0 && (i >= t.stored || hides_any(b.r, t.begin + i))) {
      zero(e, n), zero(gradient, n), zero(g, values);
      if (i < t.stored && b.t.offset_gate) store(row_of(b.r, b.gradients.offset_gate, 1, b.head, t.begin + i), C(0));
      continue;
    }
    drop(b.r, b.head, t.begin + i, w.begin, n, gradient);
    row_kernels.attention_gradient(e, sum, gradient, n);
    if (b.r.soft_cap > 0) row_kernels.soft_cap_gradient(m.scores, gradient, n, static_cast<C>(b.r.soft_cap));
    if (b.r.has_offset_bias) add_offset_gradients(b, t.begin + i, n, gradient);
    if (b.r.key_bias_heads)
      row_kernels.add_to_double(b.sums.keys + b.r.first + w.begin, gradient, std::min(n, a.keys() - w.begin), C(1));
    drop(b.r, b.head, t.begin + i, w.begin, n, e);
    for (int64_t d = 0; d < width; d++) g[d] /= sum;
  }
}

// The keys of a block of queries that R's span meets: query i of the block multiplies rows for those from begin + i to
// end + i, and has R's first row for the keys before, its last one for those behind.
template <typename T, typename C>
Window spanned(const BackwardProblem<T, C>& b, int64_t first) {
  const AttentionProblem& a = b.r.problem;
  const int64_t at = first + a.left, least = b.window.begin - kBackwardQueries, most = b.window.end;
  // R may have rows for keys of longer recordings.
  const int64_t left = std::min(b.r.span.left, a.keys() - 1), right = std::min(b.r.span.right, a.frames - 1);
  const int64_t begin = std::clamp(round_down(at - left), least, most);
  return {begin, std::clamp(round_up(at + right + 1, kAttentionPad), begin, most)};
}

// Adds what keys beyond the span give to dq and to the first and last row of dR.
template <typename T, typename C>
void add_beyond_span(const BackwardProblem<T, C>& b, const Window& span, int64_t count) {
  const AttentionRows<C>& row_kernels = kernels<AttentionRows<C>>();
  const BackwardMemory<C>& m = b.m;
  const Window w = b.window;
  const int64_t depth = b.r.dim(), dim = b.r.problem.query_dim;
  if (span.begin + count - 1 <= w.begin && span.end >= w.end) return;
  const C *const first = b.rows + kPositionMargin * depth, *const last = first + (b.r.span.rows() - 1) * depth;
  double* const sums = b.sums.biases + 2 * dim;
  for (int64_t i = 0; i < count; i++) {
    const C *const ds = m.ds + i * m.stride, *const p = m.p + i * depth;
    const int64_t begin = std::clamp(span.begin + i, w.begin, w.end), end = std::clamp(span.end + i, begin, w.end);
    const C before = row_kernels.sum(ds + w.begin, begin - w.begin), behind = row_kernels.sum(ds + end, w.end - end);
    for (int64_t d = 0; d < dim; d++) {
      m.dp[i * depth + d] += before * first[d] + behind * last[d];
      sums[d] += static_cast<double>(before * p[d]), sums[dim + d] += static_cast<double>(behind * p[d]);
    }
  }
}

// Adds the gradients of a block's queries, and its part of dk, dv and dR.
template <typename T, typename C>
void block_gradients(const BackwardProblem<T, C>& b, int64_t first, int64_t count) {
  const AttentionTiles<C>& tiles = kernels<AttentionTiles<C>>();
  const AttentionRows<T>& row_kernels = kernels<AttentionRows<T>>();
  const AttentionProblem& a = b.r.problem;
  const BackwardMemory<C>& m = b.m;
  const int64_t depth = b.r.dim(), values = b.r.values(), dim = a.query_dim;
  const Window w = b.window, span = spanned(b, first);
  const int64_t block = round_up(count, tiles.rows);
  const int64_t shift = kPositionMargin + b.r.span.left - a.left - first;  // row of R of the first query and key 0
  const auto products = [&](const C* ds, int64_t stride, const C* rows, int64_t begin, int64_t end, C* out) {
    const auto queries = depth % kAttentionPad ? tiles.narrow : tiles.queries;
    zero(out, tiles.rows * depth);
    for (int64_t j = begin; j < end; j += kValueBlock) {
      queries(ds, stride, rows, depth, j, std::min(j + kValueBlock, end), m.part);
      row_kernels.add(out, m.part, tiles.rows * depth);
    }
  };
  const auto add = [&](const C* ds, int64_t stride, const C* rows, int64_t width, int64_t begin, int64_t end, C* out) {
    if (width % kAttentionPad)
      tiles.narrow_keys(ds, stride, block, rows, width, begin, end, out);
    else
      tiles.keys(ds, stride, block, rows, width, begin, end, out, nullptr, nullptr, 0);
  };
  for (int64_t i = 0; i < block; i += tiles.rows) {
    const C* ds = m.ds + i * m.stride;
    products(ds, m.stride, m.keys, w.begin, w.end, m.dq + i * depth);
    if (b.r.pos_heads)
      products(ds, m.stride + 1, b.rows + (shift - i) * depth, std::max(span.begin + i, w.begin - kAttentionRows),
               std::min(span.end + i, w.end), m.dp + i * depth);
  }
  add(m.weights, m.stride, m.g, values, w.begin, w.end, m.dv);
  add(m.ds, m.stride, m.q, depth, w.begin, w.end, m.dk);
  if (b.r.pos_heads) {
    add(m.ds, m.stride + 1, m.p, depth, span.begin, span.end, b.sums.positions + shift * depth);
    add_beyond_span(b, span, count);
  }
  const C scale = scale_of<C>(b.r);
  const auto add_biases = [&](const C* rows, double* sums) {
    for (int64_t d = 0; d < dim; d++) {
      C sum = 0;
      for (int64_t i = 0; i < count; i++) sum += rows[i * depth + d];
      sums[d] += static_cast<double>(sum * scale);
    }
  };
  if (b.t.bias_u) add_biases(m.dq, b.sums.biases);
  if (b.t.bias_v) add_biases(m.dp, b.sums.biases + dim);
  if (b.r.pos_heads)
    for (int64_t i = 0; i < count * depth; i++) m.dq[i] += m.dp[i];
  for (int64_t i = 0; i < count; i++) {
    T* row = row_of(b.r, b.gradients.q, dim, b.head, first + i);
    for (int64_t d = 0; d < dim; d++) store(&row[d], m.dq[i * depth + d] * scale);
  }
}

template <typename T, typename C = compute_t<T>>
void backward(const RelAttention& r, const T* grad, const RelAttentionOperands<T>& t, const C* rt, const C* rows,
              int64_t head, const RelAttentionGradients<T>& gradients, const RelAttentionSums<C>& sums, C* scratch) {
  const AttentionProblem& a = r.problem;
  const BackwardMemory<C> m(r, scratch);
  const int64_t n = r.key_rows(), depth = r.dim(), values = r.values(), dim = a.query_dim, width = r.value_dim;
  BackwardProblem<T, C> b = {r, t, grad, rt, rows, head, gradients, sums, m, {}};
  copy_padded(key_row(r, t.k, dim, head, 0), a.heads * dim, a.keys(), dim, m.keys, depth, n);
  transpose_keys(r, t, head, m.kt);
  transpose_padded(key_row(r, t.v, width, head, 0), a.heads * width, a.keys(), width, m.vt, n);
  zero(m.dk, depth * n), zero(m.dv, values * n);
  for (int64_t first = 0; first < a.frames; first += kBackwardQueries) {
    const int64_t count = std::min(kBackwardQueries, a.frames - first);
    b.window = window_of(r, first, first + count - 1);
    for_each_strip<C>(a, head, first, first + count, [&](const Strip& s) { strip_softmax_gradient(b, s, first); });
    block_gradients(b, first, count);
  }
  for (int64_t j = 0; j < a.keys(); j++) {
    T *key = key_row(r, gradients.k, dim, head, j), *value = key_row(r, gradients.v, width, head, j);
    for (int64_t d = 0; d < dim; d++) store(&key[d], m.dk[j * depth + d]);
    for (int64_t d = 0; d < width; d++) store(&value[d], m.dv[j * values + d]);
  }
}

template <typename T, typename C = compute_t<T>>
void store_sums(const RelAttention& r, const RelAttentionSums<C>& sums, int64_t parts, int64_t head,
                const RelAttentionGradients<T>& gradients) {
  const AttentionProblem& a = r.problem;
  const int64_t dim = a.query_dim, depth = r.dim();
  const auto sum_of = [](const auto* first, int64_t step, int64_t count) {
    double sum = 0;
    for (int64_t k = 0; k < count; k++) sum += static_cast<double>(first[k * step]);
    return sum;
  };
  if (gradients.offset_bias)
    for (int64_t row = 0; row < a.offsets(); row++)
      store(&gradients.offset_bias[row * a.heads + head],
            static_cast<C>(sum_of(sums.offsets + kAttentionMargin + row, r.offsets_size(), parts)));
  const auto store_bias = [&](const double* found, T* bias) {
    if (!bias) return;
    for (int64_t d = 0; d < dim; d++)
      store(&bias[head * dim + d], static_cast<C>(sum_of(found + d, r.biases_size(), parts)));
  };
  store_bias(sums.biases, gradients.bias_u), store_bias(sums.biases + dim, gradients.bias_v);
  const bool shared = r.pos_heads == 1;
  if (!gradients.pos || (shared && head > 0)) return;
  const int64_t count = shared ? parts * a.heads : parts, n = r.span.rows();
  const auto rows_of = [&](int64_t begin, int64_t end, int64_t d) {
    double sum = 0;
    for (int64_t row = begin; row < end; row++)
      sum += sum_of(sums.positions + row * depth + d, r.positions_size(), count);
    return sum;
  };
  for (int64_t row = 0; row < n; row++)
    for (int64_t d = 0; d < dim; d++) {
      // rows of the margins are copies of the first and the last one
      const int64_t begin = row == 0 ? 0 : kPositionMargin + row;
      double sum = rows_of(begin, row == n - 1 ? r.positions() : kPositionMargin + row + 1, d);
      if (row == 0) sum += sum_of(sums.biases + 2 * dim + d, r.biases_size(), count);
      if (row == n - 1) sum += sum_of(sums.biases + 3 * dim + d, r.biases_size(), count);
      store(&gradients.pos[((r.span.first + row) * r.pos_heads + (shared ? 0 : head)) * dim + d], static_cast<C>(sum));
    }
}

template <typename T, typename C = compute_t<T>>
void store_key_bias(const RelAttention& r, const double* sums, T* gradient) {
  const int64_t n = r.all_keys, batch = r.problem.batch;
  std::vector<double> table(static_cast<size_t>(r.key_bias_batch * r.key_bias_heads * n));
  for (int64_t pair = 0; pair < r.problem.heads * batch; pair++) {
    double* const row = table.data() + key_bias_row(r, pair / batch, pair % batch) * n;
    for (int64_t j = 0; j < n; j++) row[j] += sums[pair * n + j];
  }
  for (size_t i = 0; i < table.size(); i++) store(&gradient[i], static_cast<C>(table[i]));
}

}  // namespace

RelAttention RelAttention::part(int64_t sequence_, int64_t first_, int64_t frames) const {
  RelAttention r = *this;
  AttentionProblem& a = r.problem;
  r.sequence = sequence_, r.first = first_, a.batch = 1, a.frames = frames, a.mask_keys = all_keys;
  if (a.padding) a.padding += sequence_ * all_keys + first_;
  if (a.mask) a.mask += (a.mask_per_sequence ? sequence_ * all_frames : 0) * all_keys + first_ * (all_keys + 1);
  attention_key_ranges(a, &r.range);
  return r;
}

int64_t RelAttention::dim() const { return round_up(problem.query_dim, kAttentionPad / 2); }
int64_t RelAttention::positions() const { return round_up(span.rows() + 2 * kPositionMargin, kAttentionPad / 2); }
int64_t RelAttention::values() const { return round_up(value_dim, kAttentionPad / 2); }

int64_t RelAttention::forward_scratch() const {
  return kAttentionRows * (kKeyBlock + kBandWidth + values() + 2 * dim()) +
         (kRelAttentionQueries + kAttentionRows) * (values() + 2 * problem.query_dim);
}

int64_t RelAttention::few_queries_scratch() const { return FewQueries(*this).elements; }

bool RelAttention::has_few_queries() const {
  // a query without a cache belongs to a recording, whose bits must not depend on its length
  return problem.left > 0 && problem.frames <= kFewRows && key_rows() <= kKeyBlock && problem.keys() >= kFewColumns &&
         dropout.threshold == 0 && pos_heads == problem.heads && span.rows() == problem.offsets() && !has_offset_bias &&
         !key_bias_heads && soft_cap == 0;
}

int64_t RelAttention::backward_scratch() const { return BackwardMemory<float>(*this, nullptr).elements; }

// Queries, keys and positions are multiplied where they lie: packed keys would serve too few queries.
void rel_attention_few_queries(const RelAttention& r, const RelAttentionOperands<float>& t, int64_t head, float* y,
                               float* lse, float* scratch) {
  const AttentionProblem& a = r.problem;
  const FewQueries m(r);
  const int64_t dim = a.query_dim, step = a.heads * dim, n = a.keys();
  const float scale = scale_of<float>(r);
  for (int64_t i = 0; i < a.frames; i++) {
    const float* q = row_of(r, t.q, dim, head, i);
    add_bias(q, bias_of(t.bias_u, head, dim), dim, scale, scratch + m.content + i * m.depth);
    add_bias(q, bias_of(t.bias_v, head, dim), dim, scale, scratch + m.position + i * m.depth);
  }
  const FewRowsGemm& gemm = kernels<FewRowsGemm>();
  const auto product = [&](int64_t rows, const float* columns, int64_t out, int64_t count, int64_t out_row) {
    const Gemm<float> g = {scratch + rows, m.depth,       1,       columns,  1,     step,
                           nullptr,        scratch + out, out_row, a.frames, count, dim};
    gemm.products(g, 0, gemm.groups(g));
  };
  product(m.content, key_row(r, t.k, dim, head, 0), m.by_key, n, m.keys);
  product(m.position, t.pos + head * dim, m.by_offset, a.offsets(), m.offsets);
  float *const block = scratch + m.block, *const packed = scratch + m.packed;
  const float* values = key_row(r, t.v, r.value_dim, head, 0);
  copy_padded(values, a.heads * r.value_dim, n, r.value_dim, packed, m.values, m.keys);
  for_each_strip<float>(a, head, 0, a.frames, [&](const Strip& strip) {
    zero(block, kAttentionRows * kKeyBlock);
    RunningSoftmax<float> softmax;
    softmax.total = scratch + m.total;
    softmax.reset(strip.rows, m.values);
    for (int k = 0; k < strip.stored; k++) {
      const int64_t i = strip.begin + k;
      const float* content = scratch + m.by_key + i * m.keys;
      const float* position = scratch + m.by_offset + i * m.offsets + a.frames - 1 - i;
      float* row = block + k * kKeyBlock;
      for (int64_t j = 0; j < n; j++) row[j] = content[j] + position[j];
      hide(r, strip, k, 0, m.keys, row);
    }
    softmax.add(block, strip.stored, m.keys, packed, m.values, scratch + m.part);
    store_strip(r, strip, softmax, y, lse);
  });
}

FASTASR_KERNELS(RelAttentionKernels, .pack_keys = pack_keys<T>, .pack_positions = pack_positions<T>,
                .forward = forward<T>, .backward = backward<T>, .store_sums = store_sums<T>,
                .store_key_bias = store_key_bias<T>)

}  // namespace fastasr::cpu
