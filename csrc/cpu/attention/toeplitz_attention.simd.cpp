// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/toeplitz_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/attention/softmax_backward.simd.h"
#include "cpu/math/activation.h"
#include "cpu/simd/vectors.simd.h"

namespace fastasr::cpu {
namespace {

constexpr int64_t kTile = kPanel * kPanel;

// The frames of a unit.
struct Span {
  int64_t batch, first, length;
};
FASTASR_INLINE Span span_of(const ToeplitzSizes& p, int64_t unit) {
  const int64_t first = unit % p.count * p.size;
  return {unit / p.count, first, std::min(p.size, p.length - first)};
}

// Returns the keys that a block's queries may see: [0, end), whole tiles.
FASTASR_INLINE int64_t keys_of(const ToeplitzSizes& p, int64_t block) {
  return p.causal ? std::min(p.keys(), (block + 1) * kPanel) : p.keys();
}

// out[j][l] = in[l][j], 32 by 32, of which only `rows` rows of the input exist: the others are zeros.
template <typename C>
__attribute__((noinline)) void transpose_tile(const C* in, int64_t rows, C* out) {
  constexpr int n = Lanes<C>::count;
  for (int64_t l = 0; l < kPanel; l += n)
    for (int64_t j = 0; j < kPanel; j += n) {
      Vector<C> r[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; i++) r[i] = l + i < rows ? at(in + (l + i) * kPanel + j) : Vector<C>{};
      transpose<C>(r);
#pragma GCC unroll 16
      for (int i = 0; i < n; i++) put(out + (j + i) * kPanel + l, r[i]);
    }
}

// Copies a panel's row. The compiler would call memmove for a loop of one type.
template <typename From, typename To>
FASTASR_INLINE void convert(const From* __restrict in, To* __restrict out) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(out, in, sizeof(To) * kPanel);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < kPanel; j++) store(&out[j], load(in[j]));
  }
}

// Copies channels from `first` on of `rows` frames from frame t on into rows of 32 in `panels` panels, which lie
// `stride` apart, with zeros beyond `frames` and `channels`.
template <typename T>
__attribute__((noinline)) void fetch(const Sequence<const T>& x, int64_t t, int64_t b, int64_t first, int64_t channels,
                                     int64_t frames, int64_t rows, compute_t<T>* out, int64_t panels = 1,
                                     int64_t stride = kTile) {
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t panel = 0; panel < panels; panel++) {
      const int64_t from = first + panel * kPanel, n = i < frames ? std::min(kPanel, channels - from) : 0;
      const T* __restrict in = n > 0 ? x.at(t + i, b) + from : nullptr;
      compute_t<T>* __restrict to = out + panel * stride + i * kPanel;
      if (n == kPanel) {
        convert(in, to);
        continue;
      }
      for (int64_t j = 0; j < n; j++) to[j] = load(in[j]);
      for (int64_t j = n; j < kPanel; j++) to[j] = 0;
    }
  }
}

// Prefetches a row of what fetch reads next: memory works while the processor multiplies.
template <typename T>
FASTASR_INLINE void prefetch(const Sequence<const T>& x, int64_t t, int64_t b, int64_t first, int64_t channels) {
  const char* from = reinterpret_cast<const char*>(x.at(t, b) + first);
  const int64_t bytes = std::min(kToeplitzPanels * kPanel, channels - first) * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

template <typename T>
FASTASR_INLINE void put_row(T* __restrict out, const compute_t<T>* __restrict in, int64_t n) {
  if (n == kPanel) return convert(in, out);
  for (int64_t j = 0; j < n; j++) store(&out[j], in[j]);
}

// Writes `rows` frames of (L, B, channels), channels from `first` on of `panels` tiles.
template <typename T>
__attribute__((noinline)) void deliver(const ToeplitzSizes& p, T* x, int64_t t, int64_t b, int64_t first,
                                       int64_t channels, int64_t rows, const compute_t<T>* in, int64_t panels) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t panel = 0; panel < panels; panel++) {
      const int64_t from = first + panel * kPanel;
      put_row(x + ((t + i) * p.batch + b) * channels + from, in + panel * kTile + i * kPanel,
              std::min(kPanel, channels - from));
    }
}

template <typename T, typename C = compute_t<T>>
void pack(const ToeplitzAttention<T>& p, int64_t unit, bool backward, const ToeplitzUnit<C>& u, C* __restrict z) {
  const Span s = span_of(p, unit);
  const int64_t rows = p.rows();
  const C scale = static_cast<C>(1 / std::sqrt(static_cast<double>(p.d)));
  for (int64_t panel = 0; panel < p.d_panels(); panel++) {
    const int64_t first = panel * kPanel, n = std::min(kPanel, p.d - first);
    const C *w = p.qk_weight + first, *b = p.qk_bias + first;
    alignas(64) C qw[kPanel] = {}, qb[kPanel] = {}, kw[kPanel] = {}, kb[kPanel] = {};
    for (int64_t j = 0; j < n; j++) qw[j] = w[j], qb[j] = b[j], kw[j] = w[p.d + j], kb[j] = b[p.d + j];
    C* __restrict key = u.key + panel * rows * kPanel;
    for (int64_t i0 = 0; i0 < rows; i0 += kPanel) {
      const int64_t frames = std::clamp<int64_t>(s.length - i0, 0, kPanel);
      fetch(p.query_key, s.first + i0, s.batch, first, p.d, frames, frames, z);
      activate(p.activation, z, frames * kPanel);
      alignas(64) C q[kTile];
      for (int64_t i = 0; i < frames; i++) {
#pragma omp simd
        for (int64_t j = 0; j < kPanel; j++) {
          q[i * kPanel + j] = (z[i * kPanel + j] * qw[j] + qb[j]) * scale;
          key[(i0 + i) * kPanel + j] = z[i * kPanel + j] * kw[j] + kb[j];
        }
      }
      std::memset(key + (i0 + frames) * kPanel, 0, sizeof(C) * static_cast<size_t>(kPanel - frames) * kPanel);
      transpose_tile(q, frames, u.query_t + i0 * p.d_panels() * kPanel + panel * kTile);
      if (backward) std::copy_n(q, frames * kPanel, u.query + (panel * rows + i0) * kPanel);
    }
  }
  // reversed_bias[rows + t] is the bias of distance -t: the lanes of a row of scores are neighbours
  for (int64_t t = -rows; t < rows + kPanel; t++)
    u.reversed_bias[rows + t] = t > -p.size && t < p.size ? p.position_bias[-t] : C(0);
  bool all = p.padding != nullptr;
  for (int64_t j = 0; j < s.length && all; j++) all = p.padding[s.batch * p.length + s.first + j];
  for (int64_t j = 0; j < rows; j++)
    u.hidden[j] = j >= s.length || (p.padding && !all && p.padding[s.batch * p.length + s.first + j]);
}

// Packs the values of the 32 keys of a block.
template <typename T, typename C = compute_t<T>>
void pack_value(const ToeplitzAttention<T>& p, int64_t unit, int64_t block, const ToeplitzUnit<C>& u) {
  const Span s = span_of(p, unit);
  const int64_t j0 = block * kPanel, stride = p.rows() * kPanel;
  const int64_t frames = std::clamp<int64_t>(s.length - j0, 0, kPanel);
  for (int64_t panel = 0; panel < p.v_panels(); panel += kToeplitzPanels) {
    const int64_t panels = std::min(kToeplitzPanels, p.v_panels() - panel);
    C* const out = u.value + panel * stride + j0 * kPanel;
    fetch(p.value, s.first + j0, s.batch, panel * kPanel, p.v, frames, std::min(kPanel, p.keys() - j0), out, panels,
          stride);
    for (int64_t i = 0; p.activate_value && i < panels; i++) activate(p.activation, out + i * stride, frames * kPanel);
  }
}

// S[j][l] = q_l k_j, j < keys.
template <typename C>
__attribute__((noinline)) void products(const ToeplitzSizes& p, const ToeplitzUnit<C>& u, int64_t block, int64_t keys,
                                        C* s) {
  const C* q = u.query_t + block * p.d_panels() * kTile;
  for (int64_t j = 0; j < keys; j += kTileRows)
    tile_rows(u.key + j * kPanel, p.rows() * kPanel, q, p.d_panels() * kPanel, s + j * kPanel, false);
}

// Adds the bias to S, with -inf where a key is not seen; m[l] is the maximum.
template <typename C>
__attribute__((noinline)) void bias_and_maximum(const ToeplitzSizes& p, const ToeplitzUnit<C>& u, int64_t i0,
                                                int64_t keys, C* __restrict s, C* __restrict m) {
  constexpr C kNone = -std::numeric_limits<C>::infinity();
  for (int64_t l = 0; l < kPanel; l++) m[l] = kNone;
  for (int64_t j = 0; j < keys; j++, s += kPanel) {
    if (u.hidden[j]) {
      for (int64_t l = 0; l < kPanel; l++) s[l] = kNone;
      continue;
    }
    const C* __restrict r = u.reversed_bias + p.rows() + i0 - j;
    const int64_t first = p.causal ? std::max<int64_t>(0, j - i0) : 0;  // lane
#pragma omp simd
    for (int64_t l = 0; l < kPanel; l++) {
      const C v = l < first ? kNone : s[l] + r[l];
      s[l] = v;
      m[l] = v > m[l] ? v : m[l];
    }
  }
}

// Sets S = exp(S - shift), exactly 0 where S is -inf by masking; total[l] is the sum.
template <typename C>
__attribute__((noinline)) void exponentials(const ToeplitzSizes& p, const ToeplitzUnit<C>& u, int64_t i0, int64_t keys,
                                            const C* __restrict shift, C* __restrict s, double* __restrict total) {
  alignas(64) double sum[kPanel] = {};
  for (int64_t j0 = 0; j0 < keys; j0 += kPanel) {
    alignas(64) C part[kPanel] = {};
    const int64_t end = std::min(keys, j0 + kPanel);
    for (int64_t j = j0; j < end; j++, s += kPanel) {
      if (u.hidden[j]) {
        for (int64_t l = 0; l < kPanel; l++) s[l] = 0;
        continue;
      }
      const int64_t first = p.causal ? std::max<int64_t>(0, j - i0) : 0;
#pragma omp simd
      for (int64_t l = 0; l < kPanel; l++) {
        const C e = exp_nonpositive(s[l] - shift[l]);
        s[l] = l < first ? C(0) : e;
        part[l] += s[l];
      }
    }
#pragma omp simd
    for (int64_t l = 0; l < kPanel; l++) sum[l] += static_cast<double>(part[l]);
  }
  for (int64_t l = 0; l < kPanel; l++) total[l] = sum[l];
}

// Returns 1 / total, NaN for a query that sees no key.
template <typename C>
FASTASR_INLINE void inverse_of(const C* __restrict m, const double* __restrict total, C* __restrict inverse) {
  for (int64_t l = 0; l < kPanel; l++)
    inverse[l] = m[l] == -std::numeric_limits<C>::infinity() ? std::numeric_limits<C>::quiet_NaN()
                                                             : static_cast<C>(1 / total[l]);
}

// The weights' rows must add up to 1 within a rounding: dS is a difference of sums over them.
template <typename C>
__attribute__((noinline)) void normalise(const C* m, const double* total, C* __restrict a, int64_t keys) {
  alignas(64) C inverse[kPanel];
  inverse_of(m, total, inverse);
  for (int64_t j = 0; j < keys; j++) {
#pragma omp simd
    for (int64_t l = 0; l < kPanel; l++) a[j * kPanel + l] *= inverse[l];
  }
}

// Computes S *= dropout for j < keys.
template <typename C>
__attribute__((noinline)) void drop(const ToeplitzSizes& p, const C* dropout, int64_t unit, int64_t i0, int64_t keys,
                                    C* __restrict s) {
  const Span span = span_of(p, unit);
  const C* __restrict m = dropout + (unit * p.size + i0) * p.size;
  const int64_t queries = std::min(kPanel, span.length - i0), end = std::min(keys, span.length);
  for (int64_t j = 0; j < end; j++)
    for (int64_t l = 0; l < queries; l++) s[j * kPanel + l] *= m[l * p.size + j];
}

template <typename T, typename C = compute_t<T>>
void forward(const ToeplitzAttention<T>& p, int64_t unit, int64_t block, const ToeplitzUnit<C>& u, T* __restrict y,
             T* __restrict mixed, C* __restrict scratch) {
  const Span span = span_of(p, unit);
  const int64_t i0 = block * kPanel, rows = p.rows(), queries = std::min(kPanel, span.length - i0);
  if (queries <= 0) return;
  const int64_t keys = keys_of(p, block);
  C *s = scratch, *h = s + rows * kPanel, *gate = h + kTile;
  alignas(64) C m[kPanel], inverse[kPanel];
  alignas(64) double total[kPanel];
  products(p, u, block, keys, s);
  bias_and_maximum(p, u, i0, keys, s, m);
  exponentials(p, u, i0, keys, m, s, total);
  inverse_of(m, total, inverse);
  if (p.dropout) drop(p, p.dropout, unit, i0, keys, s);
  for (int64_t panel = 0; panel < p.v_panels(); panel++) {
    const C* v = u.value + panel * rows * kPanel;
    for (int64_t l = 0; l < queries; l += kTileRows)
      tile_columns(s + l, v, p.causal ? std::min(keys, i0 + l + kTileRows) : keys, h + l * kPanel, false);
    const int64_t first = panel * kPanel, n = std::min(kPanel, p.v - first);
    fetch(p.gate, span.first + i0, span.batch, first, p.v, queries, queries, gate);
    activate(p.activation, gate, queries * kPanel);
    for (int64_t l = 0; l < queries; l++) {
      C* __restrict hl = h + l * kPanel, * __restrict gl = gate + l * kPanel;
#pragma omp simd
      for (int64_t c = 0; c < kPanel; c++) hl[c] *= inverse[l], gl[c] *= hl[c];
      const int64_t at = ((span.first + i0 + l) * p.batch + span.batch) * p.v + first;
      put_row(y + at, gl, n);
      if (mixed) put_row(mixed + at, hl, n);
    }
  }
}

// Computes g = dy act(gate) of some panels of a block into u.grad, and transposed ([v][32]) into gt; dgate = dy h
// act'(gate).
template <typename T, typename C = compute_t<T>>
FASTASR_INLINE void ungate(const ToeplitzAttention<T>& p, const ToeplitzGradients<T>& g, const Span& span, int64_t i0,
                           int64_t queries, int64_t panel, int64_t panels, const ToeplitzUnit<C>& u, C* gt,
                           C* scratch) {
  C *const gates = scratch, *const mixtures = gates + kToeplitzPanels * kTile;
  C* __restrict slope = mixtures + kToeplitzPanels * kTile;
  const int64_t t = span.first + i0, stride = p.rows() * kPanel, first = panel * kPanel;
  C* const grads = u.grad + panel * stride + i0 * kPanel;
  fetch(p.gate, t, span.batch, first, p.v, queries, queries, gates, panels);
  fetch(g.grad, t, span.batch, first, p.v, queries, queries, grads, panels, stride);
  fetch(g.mixed, t, span.batch, first, p.v, queries, queries, mixtures, panels);
  for (int64_t k = 0; k < panels; k++) {
    C* __restrict gate = gates + k * kTile, * __restrict mixed = mixtures + k * kTile;
    C* __restrict out = grads + k * stride;
    activate_with_slope(p.activation, gate, slope, queries * kPanel);
#pragma omp simd
    for (int64_t i = 0; i < queries * kPanel; i++) {
      mixed[i] *= out[i] * slope[i];
      out[i] *= gate[i];
    }
    transpose_tile(out, queries, gt + k * kTile);
  }
  deliver(p, g.dgate, t, span.batch, first, p.v, queries, mixtures, panels);
}

template <typename T, typename C = compute_t<T>>
void backward(const ToeplitzAttention<T>& p, const ToeplitzGradients<T>& g, int64_t unit, int64_t block,
              const ToeplitzUnit<C>& u, C* __restrict scratch) {
  const Span span = span_of(p, unit);
  const int64_t i0 = block * kPanel, rows = p.rows(), keys = keys_of(p, block);
  const int64_t queries = std::min(kPanel, span.length - i0);
  if (queries <= 0) return;  // backward_keys ends with the last query
  C *a = u.weights + block * rows * kPanel, *ds = u.dscores + block * rows * kPanel;
  C *gt = scratch, *rest = gt + kToeplitzPanels * kTile;
  alignas(64) C m[kPanel];
  alignas(64) double total[kPanel];
  products(p, u, block, keys, a);
  bias_and_maximum(p, u, i0, keys, a, m);
  exponentials(p, u, i0, keys, m, a, total);
  normalise(m, total, a, keys);
  for (int64_t panel = 0; panel == 0 || panel < p.v_panels(); panel += kToeplitzPanels) {
    const int64_t panels = std::min(kToeplitzPanels, p.v_panels() - panel), next = (panel + kToeplitzPanels) * kPanel;
    ungate(p, g, span, i0, queries, panel, panels, u, gt, rest);
    for (int64_t j = 0; j < keys; j += kTileRows) {
      tile_rows(u.value + (panel * rows + j) * kPanel, rows * kPanel, gt, panels * kPanel, ds + j * kPanel, panel > 0);
      if (next >= p.v) continue;
      for (int64_t i = j * queries / keys; i < (j + kTileRows) * queries / keys; i++) {
        prefetch(p.gate, span.first + i0 + i, span.batch, next, p.v);
        prefetch(g.grad, span.first + i0 + i, span.batch, next, p.v);
        prefetch(g.mixed, span.first + i0 + i, span.batch, next, p.v);
      }
    }
  }
  if (p.dropout) drop(p, p.dropout, unit, i0, keys, ds);
  softmax_backward<kPanel>(keys, a, ds);
  if (p.dropout) drop(p, p.dropout, unit, i0, keys, a);
  for (int64_t panel = 0; panel < p.d_panels(); panel++)
    for (int64_t l = 0; l < queries; l += kTileRows)
      tile_columns(ds + l, u.key + panel * rows * kPanel, p.causal ? std::min(keys, i0 + l + kTileRows) : keys,
                   u.dquery + (panel * rows + i0 + l) * kPanel, false);
}

template <typename T, typename C = compute_t<T>>
void backward_keys(const ToeplitzAttention<T>& p, const ToeplitzGradients<T>& g, int64_t unit, int64_t block,
                   const ToeplitzUnit<C>& u, C* __restrict scratch) {
  const Span span = span_of(p, unit);
  const int64_t j0 = block * kPanel, stride = p.rows() * kPanel, n = std::min(kPanel, span.length - j0);
  if (n <= 0) return;
  // out[j] = sum over queries i of a_ij b_i
  const int64_t first = p.causal ? j0 : 0;
  const auto sums = [&](const C* a, const C* b, C* out) {
    for (int64_t j = 0; j < n; j += kTileRows)
      tile_rows(a + first * p.rows() + (j0 + j) * kPanel, stride, b + first * kPanel, span.length - first,
                out + j * kPanel, false);
  };
  for (int64_t panel = 0; panel < p.d_panels(); panel++)
    sums(u.dscores, u.query + panel * stride, u.dkey + panel * stride + j0 * kPanel);
  C *const outs = scratch, *const values = outs + kToeplitzPanels * kTile;
  C* __restrict slope = values + kToeplitzPanels * kTile;
  for (int64_t panel = 0; panel < p.v_panels(); panel += kToeplitzPanels) {
    const int64_t channel = panel * kPanel, panels = std::min(kToeplitzPanels, p.v_panels() - panel);
    if (p.activate_value) fetch(p.value, span.first + j0, span.batch, channel, p.v, n, n, values, panels);
    for (int64_t k = 0; k < panels; k++) {
      C* __restrict out = outs + k * kTile;
      const int64_t next = channel + kToeplitzPanels * kPanel;
      if (p.activate_value && next < p.v)
        for (int64_t j = k * n / panels; j < (k + 1) * n / panels; j++)
          prefetch(p.value, span.first + j0 + j, span.batch, next, p.v);
      sums(u.weights, u.grad + (panel + k) * stride, out);
      if (!p.activate_value) continue;
      activate_with_slope(p.activation, values + k * kTile, slope, n * kPanel);
#pragma omp simd
      for (int64_t i = 0; i < n * kPanel; i++) out[i] *= slope[i];
    }
    deliver(p, g.dvalue, span.first + j0, span.batch, channel, p.v, n, outs, panels);
  }
}

template <typename T, typename C = compute_t<T>>
void backward_parameters(const ToeplitzAttention<T>& p, const ToeplitzGradients<T>& g, int64_t unit,
                         const ToeplitzUnit<C>& u, double* __restrict dparameters, double* __restrict dposition,
                         C* __restrict scratch) {
  const Span span = span_of(p, unit);
  const int64_t rows = p.rows();
  const C scale = static_cast<C>(1 / std::sqrt(static_cast<double>(p.d)));
  C *z = scratch, *slope = z + kTile;
  // A key's bias adds the same to all scores of a query, so its gradient is 0 (or NaN where a weight is), not the sum
  // of rounding errors that adding up dkey would give.
  std::fill_n(dparameters, 4 * p.d, 0.0);
  for (int64_t panel = 0; panel < p.d_panels(); panel++) {
    const int64_t first = panel * kPanel, n = std::min(kPanel, p.d - first);
    alignas(64) C qw[kPanel] = {}, kw[kPanel] = {};
    for (int64_t j = 0; j < n; j++) qw[j] = p.qk_weight[first + j], kw[j] = p.qk_weight[p.d + first + j];
    alignas(64) double sums[4][kPanel] = {};
    for (int64_t i0 = 0; i0 < span.length; i0 += kPanel) {
      const int64_t frames = std::min(kPanel, span.length - i0);
      fetch(p.query_key, span.first + i0, span.batch, first, p.d, frames, kPanel, z);
      activate_with_slope(p.activation, z, slope, frames * kPanel);
      const C* __restrict dq = u.dquery + (panel * rows + i0) * kPanel, * __restrict dk =
                                                                            u.dkey + (panel * rows + i0) * kPanel;
      for (int64_t i = 0; i < frames; i++) {
        alignas(64) C dz[kPanel];
#pragma omp simd
        for (int64_t j = 0; j < kPanel; j++) {
          const int64_t at = i * kPanel + j;
          const C q = dq[at] * scale, k = dk[at];
          sums[0][j] += static_cast<double>(q * z[at]);
          sums[1][j] += static_cast<double>(k * z[at]);
          sums[2][j] += static_cast<double>(q);
          sums[3][j] += static_cast<double>(k) * 0;
          dz[j] = (q * qw[j] + k * kw[j]) * slope[at];
        }
        put_row(g.dquery_key + ((span.first + i0 + i) * p.batch + span.batch) * p.d + first, dz, n);
      }
    }
    for (int64_t r = 0; r < 4; r++)
      for (int64_t j = 0; j < n; j++) dparameters[r * p.d + first + j] = sums[r][j];
  }
  // dS of key j and query i counts for distance j - i: a row of dscores is a slice of the reversed vector
  const int64_t middle = p.size - 1;
  std::fill_n(dposition, 2 * p.size - 1, 0.0);
  for (int64_t block = 0; block < p.blocks(); block++) {
    const int64_t i0 = block * kPanel, queries = std::min(kPanel, span.length - i0);
    const int64_t keys = std::min(keys_of(p, block), span.length);
    for (int64_t j = 0; j < keys; j++) {
      const C* __restrict ds = u.dscores + (block * rows + j) * kPanel;
      double* __restrict to = dposition + middle + j - i0;
      for (int64_t l = 0; l < queries; l++) to[-l] += static_cast<double>(ds[l]);
    }
  }
}

}  // namespace

FASTASR_KERNELS(ToeplitzAttentionKernels, .pack = pack<T>, .pack_value = pack_value<T>, .forward = forward<T>,
                .backward = backward<T>, .backward_keys = backward_keys<T>,
                .backward_parameters = backward_parameters<T>)

}  // namespace fastasr::cpu
