// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/layer_norm_lstm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/gemm/gemm.h"
#include "cpu/math/activation.h"
#include "cpu/simd/vectors.simd.h"

// In the forward pass a step has three phases: the products of a unit's rows with h; its share of the gates,
// normalised, and of the new cell; the cell normalised, and h. Between them the units' means and squares are merged.
// The backward pass has the same phases in reverse order, and merges sums instead of moments.
namespace fastasr::cpu {
namespace {

// One chain of sums has this many terms, where lanes are not terms: H or 4 H would be less exact.
constexpr int64_t kBlockTerms = 64;
constexpr int64_t kManySequences = 8;  // from this many on, copying a block of weights costs less than it saves

// out[b * rows + r] = sum over k of w[r][k] h[b][k]: as many sums as a vector has lanes, with lanes over k; at the end
// they become one vector of sums. Weights are read in place, each once for kBatch rows; kAhead prefetches those of the
// rows after the next.
template <int kBatch, bool kAhead, typename C>
__attribute__((noinline)) void dot_products(const C* __restrict w, int64_t w_row, const C* __restrict h, int64_t h_row,
                                            int64_t depth, C* __restrict out) {
  constexpr int n = Lanes<C>::count, rows = n / kBatch;
  Vector<C> sum[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; i++) sum[i] = Vector<C>{};
  int64_t k = 0;
  for (; k + n <= depth; k += n) {
    Vector<C> x[kBatch];
#pragma GCC unroll 16
    for (int b = 0; b < kBatch; b++) x[b] = at(h + b * h_row + k);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
      if constexpr (kAhead) __builtin_prefetch(w + (r + 2 * rows) * w_row + k);
      const Vector<C> v = at(w + r * w_row + k);
#pragma GCC unroll 16
      for (int b = 0; b < kBatch; b++) sum[b * rows + r] += v * x[b];
    }
  }
  sum_each<C>(sum);
  put(out, sum[0]);
  if (k == depth) return;
  for (int r = 0; r < rows; r++)
    for (int b = 0; b < kBatch; b++)
      for (int64_t j = k; j < depth; j++) out[b * rows + r] += w[r * w_row + j] * h[b * h_row + j];
}

// Computes the sum of one row, where rows are left over.
template <typename C>
__attribute__((noinline)) C dot_product(const C* __restrict w, const C* __restrict h, int64_t depth) {
  constexpr int n = Lanes<C>::count;
  Vector<C> first{}, second{};
  int64_t k = 0;
  for (; k + 2 * n <= depth; k += 2 * n) first += at(w + k) * at(h + k), second += at(w + k + n) * at(h + k + n);
  first += second;
  C sum = 0;
  for (int i = 0; i < n; i++) sum += first[i];
  for (; k < depth; k++) sum += w[k] * h[k];
  return sum;
}

// Adds the products of sequences [from, to), kBatch at a time; a group of rows stays in the first cache for all of
// them.
template <int kBatch, typename C>
FASTASR_INLINE void add_products_of(const C* w, int64_t rows, int64_t depth, const C* h, int64_t from, int64_t to,
                                    C* gates, int64_t gate_row) {
  constexpr int n = Lanes<C>::count, group = n / kBatch;
  alignas(64) C out[n];
  int64_t r = 0;
  for (; r + group <= rows; r += group) {
    for (int64_t b = from; b < to; b += kBatch) {
      if (kBatch > 1 && b == from)
        dot_products<kBatch, true>(w + r * depth, depth, h + b * depth, depth, depth, out);
      else
        dot_products<kBatch, false>(w + r * depth, depth, h + b * depth, depth, depth, out);
      for (int i = 0; i < kBatch; i++)
        for (int j = 0; j < group; j++) gates[(b + i) * gate_row + r + j] += out[i * group + j];
    }
  }
  for (; r < rows; r++)
    for (int64_t b = from; b < to; b++) gates[b * gate_row + r] += dot_product(w + r * depth, h + b * depth, depth);
}

// Computes gates[b][r] += w[r] . h[b] for the rows of one gate in a unit. Fours, two sequences or one fill
// dot_products; for others the product of few rows, with larger tiles, takes 0.7 to 0.9 of its time.
template <typename C>
__attribute__((noinline)) void add_products(const C* w, int64_t rows, int64_t depth, const C* h, int64_t batch,
                                            C* gates, int64_t gate_row) {
  constexpr int four = Lanes<C>::count >= 4 ? 4 : 2;
  if constexpr (std::is_same_v<C, float>) {
    if (batch > 2 && batch % four && rows >= kFewColumns) {
      const int64_t parts = (batch + kFewRows - 1) / kFewRows;
      for (int64_t part = 0; part < parts; part++) {
        const int64_t b = batch * part / parts, end = batch * (part + 1) / parts;
        const C *x = h + b * depth, *no_bias = nullptr;
        C* out = gates + b * gate_row;
        Gemm<float> g{x, depth, 1, w, 1, depth, no_bias, out, gate_row, end - b, rows, depth};
        g.add = true;
        kernels<FewRowsGemm>().products(g, 0, kernels<FewRowsGemm>().groups(g));
      }
      return;
    }
  }
  const int64_t fours = batch / four * four, twos = batch / 2 * 2;
  add_products_of<four>(w, rows, depth, h, 0, fours, gates, gate_row);
  add_products_of<2>(w, rows, depth, h, fours, twos, gates, gate_row);
  add_products_of<1>(w, rows, depth, h, twos, batch, gates, gate_row);
}

// out[b][u] += sum over k of g[b][k] w[k][u] for kVectors vectors of u: a tile of sums in registers. kFar says that the
// rows of w are too far apart for the hardware's prefetcher.
template <int kBatch, int kVectors, bool kFar, typename C>
__attribute__((noinline)) void product_tile(const C* __restrict w, int64_t w_row, const C* __restrict g, int64_t g_row,
                                            int64_t depth, C* __restrict out, int64_t out_row) {
  constexpr int n = Lanes<C>::count;
  Vector<C> sum[kBatch][kVectors];
#pragma GCC unroll 16
  for (int b = 0; b < kBatch; b++)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v++) sum[b][v] = Vector<C>{};
  for (int64_t k = 0; k < depth; k++) {
    const C* row = w + k * w_row;
    if constexpr (kFar) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v++) __builtin_prefetch(row + 24 * w_row + v * n);
    }
    Vector<C> x[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v++) x[v] = at(row + v * n);
#pragma GCC unroll 16
    for (int b = 0; b < kBatch; b++) {
      const Vector<C> y = vector_of(g[b * g_row + k]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v++) sum[b][v] += x[v] * y;
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < kBatch; b++)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v++) put(out + b * out_row + v * n, at(out + b * out_row + v * n) + sum[b][v]);
}

// Calls f<kBatch>(first) for `batch` sequences, up to six at a time.
template <typename F>
FASTASR_INLINE void by_sequences(int64_t batch, const F& f) {
  int64_t b = 0;
  for (; b + 6 <= batch; b += 6) f.template operator()<6>(b);
  if (batch - b >= 4) f.template operator()<4>(b), b += 4;
  if (batch - b >= 2) f.template operator()<2>(b), b += 2;
  if (batch > b) f.template operator()<1>(b);
}

// Packs rows of hidden_weight for the products of many sequences: panels of two vectors of rows, each (depth, 2 n) with
// zeros beyond the last row.
template <typename C>
constexpr int64_t kPanelRows = 2 * Lanes<C>::count;

// Does this for the rest of a row, and for a row beyond the last.
template <typename C>
__attribute__((noinline)) void pack_rest(const C* row, int64_t k, int64_t depth, C* to) {
  for (; k < depth; k++) to[k * kPanelRows<C>] = row ? row[k] : C(0);
}

template <typename C>
__attribute__((noinline)) void pack_rows(const C* w, int64_t rows, int64_t depth, C* out) {
  constexpr int n = Lanes<C>::count;
  const int64_t whole = (rows + kPanelRows<C> - 1) / kPanelRows<C> * kPanelRows<C>;
  for (int64_t r = 0; r < whole; r += n) {
    C* to = out + r / kPanelRows<C> * kPanelRows<C> * depth + r % kPanelRows<C>;
    int64_t k = 0;
    for (; r + n <= rows && k + n <= depth; k += n) {
      Vector<C> square[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; i++) square[i] = at(w + (r + i) * depth + k);
      transpose<C>(square);
#pragma GCC unroll 16
      for (int i = 0; i < n; i++) put(to + (k + i) * kPanelRows<C>, square[i]);
    }
    for (int64_t i = 0; i < n; i++) pack_rest(r + i < rows ? w + (r + i) * depth : nullptr, k, depth, to + i);
  }
}

// Computes gates[b][r] += w[r] . h[b] for rows that pack_rows has packed.
template <typename C>
__attribute__((noinline)) void add_packed_products(const C* packed, int64_t rows, int64_t depth, const C* h,
                                                   int64_t batch, C* gates, int64_t gate_row) {
  constexpr int64_t n = kPanelRows<C>;
  for (int64_t r = 0; r < rows; r += n) {
    const C* w = packed + r * depth;
    const int64_t width = std::min(n, rows - r);
    by_sequences(batch, [&]<int kBatch>(int64_t b) __attribute__((always_inline)) {
      alignas(64) C sum[kBatch * n] = {};
      for (int64_t k = 0; k < depth; k += kBlockTerms)
        product_tile<kBatch, 2, false>(w + k * n, n, h + b * depth + k, depth, std::min(kBlockTerms, depth - k), sum,
                                       n);
      for (int i = 0; i < kBatch; i++)
        for (int64_t j = 0; j < width; j++) gates[(b + i) * gate_row + r + j] += sum[i * n + j];
    });
  }
}

// out[b][u] += sum over k of g[b][k] w[k][u] for k < terms and u < columns; the rows of g are `depth` apart.
// add_last_columns serves columns that fill no vector.
template <typename C>
__attribute__((noinline)) void add_last_columns(const C* w, int64_t w_row, const C* g, int64_t depth, int64_t terms,
                                                int64_t batch, int64_t columns, C* out, int64_t out_row) {
  for (int64_t b = 0; b < batch; b++) {
    for (int64_t i = 0; i < columns; i++) {
      C sum = 0;
      for (int64_t k = 0; k < terms; k++) sum += g[b * depth + k] * w[k * w_row + i];
      out[b * out_row + i] += sum;
    }
  }
}

template <int kBatch, bool kFar, typename C>
FASTASR_INLINE void add_columns(const C* w, int64_t w_row, const C* g, int64_t depth, int64_t terms, int64_t columns,
                                C* out, int64_t out_row) {
  constexpr int n = Lanes<C>::count, vectors = kRegisters == 32 ? 4 : 2;
  int64_t u = 0;
  for (; u + vectors * n <= columns; u += vectors * n)
    product_tile<kBatch, vectors, kFar>(w + u, w_row, g, depth, terms, out + u, out_row);
  for (; u + n <= columns; u += n) product_tile<kBatch, 1, kFar>(w + u, w_row, g, depth, terms, out + u, out_row);
  if (u < columns) add_last_columns(w + u, w_row, g, depth, terms, kBatch, columns - u, out + u, out_row);
}

// out (batch, H) = g (batch, 4 H) w for `columns` columns, at most kLstmUnit; w and out point to the first of them. For
// many sequences a block of w is first copied so that its rows follow each other: in place, they meet in a few sets of
// the caches.
template <typename C>
__attribute__((noinline)) void products_with_columns(const C* w, int64_t hidden, const C* g, int64_t batch,
                                                     int64_t columns, C* out) {
  const int64_t depth = 4 * hidden;
  alignas(64) C block[kBlockTerms * kLstmUnit];
  for (int64_t b = 0; b < batch; b++) std::fill(out + b * hidden, out + b * hidden + columns, C(0));
  for (int64_t first = 0; first < depth; first += kBlockTerms) {
    const int64_t terms = std::min(kBlockTerms, depth - first);
    const C *wf = w + first * hidden, *gf = g + first;
    if (batch < kManySequences) {
      by_sequences(batch, [&]<int kBatch>(int64_t b) __attribute__((always_inline)) {
        add_columns<kBatch, true>(wf, hidden, gf + b * depth, depth, terms, columns, out + b * hidden, hidden);
      });
      continue;
    }
    for (int64_t k = 0; k < terms; k++)
      std::memcpy(block + k * columns, wf + k * hidden, static_cast<size_t>(columns) * sizeof(C));
    by_sequences(batch, [&]<int kBatch>(int64_t b) __attribute__((always_inline)) {
      add_columns<kBatch, false>(block, columns, gf + b * depth, depth, terms, columns, out + b * hidden, hidden);
    });
  }
}

// Returns mean and 1 / deviation of a row from its units' means and sums of squares about them.
template <typename C>
__attribute__((noinline)) void merge_moments(const C* parts, const LstmSizes& s, int64_t b, int64_t per_unit,
                                             double eps, std::pair<C, C>* row) {
  const auto weight = [&](int64_t u) {
    return static_cast<double>(per_unit * std::min(kLstmUnit, s.hidden - u * kLstmUnit));
  };
  const auto count = static_cast<double>(per_unit * s.hidden);
  double mean = 0, square = 0;
  for (int64_t u = 0; u < s.units(); u++) mean += static_cast<double>(parts[2 * (u * s.batch + b)]) * weight(u);
  mean /= count;
  for (int64_t u = 0; u < s.units(); u++) {
    const double distance = static_cast<double>(parts[2 * (u * s.batch + b)]) - mean;
    square += static_cast<double>(parts[2 * (u * s.batch + b) + 1]) + distance * distance * weight(u);
  }
  *row = {static_cast<C>(mean), static_cast<C>(1 / std::sqrt(square / count + eps))};
}

// Returns two sums of a row from those of its units, over `count`.
template <typename C>
__attribute__((noinline)) void merge_sums(const C* parts, const LstmSizes& s, int64_t b, double count,
                                          std::pair<C, C>* row) {
  double first = 0, second = 0;
  for (int64_t u = 0; u < s.units(); u++) {
    first += static_cast<double>(parts[2 * (u * s.batch + b)]);
    second += static_cast<double>(parts[2 * (u * s.batch + b) + 1]);
  }
  *row = {static_cast<C>(first / count), static_cast<C>(second / count)};
}

// Turns the normalised gates of a row's units, `hidden` apart, into the new cells, in the first gate's place, and the
// output gate. Returns the cells' sum. It is a function of its own: inlined, GCC runs these loops number by number.
template <typename C>
__attribute__((noinline)) C cells(C* __restrict gates, const C* __restrict before, const C* __restrict weight,
                                  const C* __restrict bias, int64_t hidden, int64_t width) {
  C* __restrict input = gates, * __restrict output = gates + 3 * hidden;
  const C* __restrict forget = gates + hidden, * __restrict value = gates + 2 * hidden;
  const C* __restrict wi = weight, * __restrict wf = weight + hidden, * __restrict wv = weight + 2 * hidden;
  const C* __restrict bi = bias, * __restrict bf = bias + hidden, * __restrict bv = bias + 2 * hidden;
#pragma omp simd
  for (int64_t j = 0; j < width; j++) input[j] = sigmoid(input[j] * wi[j] + bi[j]) * tanh(value[j] * wv[j] + bv[j]);
#pragma omp simd
  for (int64_t j = 0; j < width; j++) input[j] += sigmoid(forget[j] * wf[j] + bf[j]) * before[j];
  const C* __restrict wo = weight + 3 * hidden, * __restrict bo = bias + 3 * hidden;
#pragma omp simd
  for (int64_t j = 0; j < width; j++) output[j] = sigmoid(output[j] * wo[j] + bo[j]);
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < width; j++) sum += input[j];
  return sum;
}

template <typename C>
void forward(const LayerNormLstm<C>& p, C* y, C* cell, C* kept, C* scratch, PhaseBarrier& barrier, int64_t begin,
             int64_t end) {
  const LstmSizes s = p.size;
  const int64_t hidden = s.hidden, batch = s.batch, gate_row = 4 * hidden, rows = s.steps * batch;
  C *gates = scratch, *gate_parts = gates + batch * gate_row, *cell_parts = gate_parts + 2 * s.units() * batch;
  C* packed = cell_parts + 2 * s.units() * batch;  // packs a unit's gate: kLstmUnit rows of hidden_weight
  std::vector<std::pair<C, C>> rows_of(static_cast<size_t>(batch));  // mean and 1 / deviation, per thread
  // The phase that rows_of belongs to. The owner of a unit merges: nobody writes the parts before that unit is done.
  int64_t merged = -1;
  const int64_t first = p.hidden ? 0 : 1;  // the first step with a product: a state of zeros needs none
  // The first cell, if none is given: the product by 0 stays, because a forget gate of NaN gives NaN.
  static constexpr C zeros[kLstmUnit] = {};
  for (int64_t t = 0; t < s.steps; t++) {
    const C* before = t ? y + (t - 1) * batch * hidden : p.hidden;
    const C* cell_before = t ? cell : p.cell;
    C* kept_gates = kept ? kept + t * batch * gate_row : nullptr;
    C* kept_cell = kept ? kept + rows * gate_row + t * batch * hidden : nullptr;
    C* kept_scales = kept ? kept + rows * 5 * hidden + t * batch * 2 : nullptr;

    const auto products = [&](int64_t unit) {
      const int64_t u0 = unit * kLstmUnit, u1 = std::min(hidden, u0 + kLstmUnit), width = u1 - u0;
      for (int q = 0; q < 4; q++) {
        const int64_t row = q * hidden + u0;
        for (int64_t b = 0; b < batch; b++) {
          C* g = gates + b * gate_row + row;
          if (p.input_weight) {
            std::fill(g, g + width, C(0));
          } else {
            std::memcpy(g, p.input + (t * batch + b) * gate_row + row, static_cast<size_t>(width) * sizeof(C));
          }
        }
        if (p.input_weight)
          add_products(p.input_weight + row * s.inputs, width, s.inputs, p.input + t * batch * s.inputs, batch,
                       gates + row, gate_row);
        const C* w = p.hidden_weight + row * hidden;
        C* own = packed + (4 * unit + q) * kLstmUnit * hidden;
        if (before && s.packs()) {
          if (t == first) pack_rows(w, width, hidden, own);
          add_packed_products(own, width, hidden, before, batch, gates + row, gate_row);
        } else if (before) {
          add_products(w, width, hidden, before, batch, gates + row, gate_row);
        }
      }
      for (int64_t b = 0; b < batch; b++) {
        const C* g = gates + b * gate_row + u0;
        C sum = 0, square = 0;
        for (int q = 0; q < 4; q++) {
#pragma omp simd reduction(+ : sum)
          for (int64_t j = 0; j < width; j++) sum += g[q * hidden + j];
        }
        const C mean = sum / static_cast<C>(4 * width);
        for (int q = 0; q < 4; q++) {
#pragma omp simd reduction(+ : square)
          for (int64_t j = 0; j < width; j++) square += (g[q * hidden + j] - mean) * (g[q * hidden + j] - mean);
        }
        C* part = gate_parts + 2 * (unit * batch + b);
        part[0] = mean, part[1] = square;
      }
    };
    // in alternating order: the weights read last are still in the cache
    barrier.phase(3 * t, begin, end, products, t % 2);

    barrier.phase(3 * t + 1, begin, end, [&](int64_t unit) {
      if (merged != 3 * t + 1) {
        for (int64_t b = 0; b < batch; b++) merge_moments(gate_parts, s, b, 4, p.eps, &rows_of[size_t(b)]);
        merged = 3 * t + 1;
      }
      const int64_t u0 = unit * kLstmUnit, u1 = std::min(hidden, u0 + kLstmUnit), width = u1 - u0;
      const C *w = p.gate_weight + u0, *bias = p.gate_bias + u0;
      for (int64_t b = 0; b < batch; b++) {
        C* __restrict g = gates + b * gate_row + u0;
        const C mean = rows_of[size_t(b)].first, scale = rows_of[size_t(b)].second;
        if (kept_scales && !unit) kept_scales[2 * b] = scale;
        for (int q = 0; q < 4; q++) {
#pragma omp simd
          for (int64_t j = 0; j < width; j++) g[q * hidden + j] = (g[q * hidden + j] - mean) * scale;
          if (kept_gates)
            std::memcpy(kept_gates + b * gate_row + q * hidden + u0, g + q * hidden,
                        static_cast<size_t>(width) * sizeof(C));
        }
        const C sum = cells(g, cell_before ? cell_before + b * hidden + u0 : zeros, w, bias, hidden, width);
        const C middle = sum / static_cast<C>(width);
        C square = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t j = 0; j < width; j++) square += (g[j] - middle) * (g[j] - middle);
        C* part = cell_parts + 2 * (unit * batch + b);
        part[0] = middle, part[1] = square;
      }
    });

    barrier.phase(3 * t + 2, begin, end, [&](int64_t unit) {
      if (merged != 3 * t + 2) {
        for (int64_t b = 0; b < batch; b++) merge_moments(cell_parts, s, b, 1, p.eps, &rows_of[size_t(b)]);
        merged = 3 * t + 2;
      }
      const int64_t u0 = unit * kLstmUnit, u1 = std::min(hidden, u0 + kLstmUnit), width = u1 - u0;
      const C *w = p.cell_weight + u0, *bias = p.cell_bias + u0;
      for (int64_t b = 0; b < batch; b++) {
        const C* __restrict g = gates + b * gate_row + u0;
        const C mean = rows_of[size_t(b)].first, scale = rows_of[size_t(b)].second;
        if (kept_scales && !unit) kept_scales[2 * b + 1] = scale;
        if (kept_cell) {
          C* __restrict to = kept_cell + b * hidden + u0;
#pragma omp simd
          for (int64_t j = 0; j < width; j++) to[j] = (g[j] - mean) * scale;
        }
        C* __restrict c = cell + b * hidden + u0;
        C* __restrict h = y + (t * batch + b) * hidden + u0;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
          const C v = (g[j] - mean) * scale * w[j] + bias[j];
          c[j] = v;
          h[j] = g[3 * hidden + j] * tanh(v);
        }
      }
    });
  }
}

template <typename C>
void backward(const LayerNormLstm<C>& p, const C* kept, const LayerNormLstmGradients<C>& grad, double* sums, C* scratch,
              PhaseBarrier& barrier, int64_t begin, int64_t end) {
  const LstmSizes s = p.size;
  const int64_t hidden = s.hidden, batch = s.batch, gate_row = 4 * hidden, rows = s.steps * batch;
  C *cell_parts = scratch, *gate_parts = cell_parts + 2 * s.units() * batch;
  std::vector<std::pair<C, C>> rows_of(static_cast<size_t>(batch));  // two means of a row, per thread
  int64_t merged = -1;
  constexpr int64_t kRows = 16;  // this many rows add their shares of the parameters' gradients in C, then in double
  int64_t phase = 0;
  for (int64_t t = s.steps - 1; t >= 0; t--) {
    const C *kept_gates = kept + t * batch * gate_row, *kept_cell = kept + rows * gate_row + t * batch * hidden;
    const C* scales = kept + rows * 5 * hidden + t * batch * 2;
    const C* cell_before = t ? kept_cell - batch * hidden : p.cell;  // normalised, where it is a step's
    C* dgates = grad.gates + t * batch * gate_row;

    // dh of this step, and through h = σ(o) tanh(c) and the cell's weight
    const auto through_output = [&](int64_t unit) {
      const int64_t u0 = unit * kLstmUnit, u1 = std::min(hidden, u0 + kLstmUnit), width = u1 - u0;
      if (t + 1 < s.steps)
        products_with_columns(p.hidden_weight + u0, hidden, dgates + batch * gate_row, batch, width, grad.hidden + u0);
      const C *gw = p.gate_weight + 3 * hidden + u0, *gb = p.gate_bias + 3 * hidden + u0;
      const C *cw = p.cell_weight + u0, *cb = p.cell_bias + u0;
      alignas(64) C dweight[kLstmUnit], dbias[kLstmUnit];
      for (int64_t first = 0; first < batch; first += kRows) {
        std::fill(dweight, dweight + width, C(0));
        std::fill(dbias, dbias + width, C(0));
        for (int64_t b = first; b < std::min(batch, first + kRows); b++) {
          C* __restrict dh = grad.hidden + b * hidden + u0;
          if (grad.y) {
            const C* __restrict dy = grad.y + (t * batch + b) * hidden + u0;
#pragma omp simd
            for (int64_t j = 0; j < width; j++) dh[j] += dy[j];
          }
          const C* __restrict n = kept_cell + b * hidden + u0, * __restrict o =
                                                                   kept_gates + b * gate_row + 3 * hidden + u0;
          C* __restrict dc = grad.cell + b * hidden + u0, * __restrict d_o = dgates + b * gate_row + 3 * hidden + u0;
          C sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
          for (int64_t j = 0; j < width; j++) {
            C open, shut;
            sigmoid_pair(o[j] * gw[j] + gb[j], &open, &shut);
            const C v = tanh(n[j] * cw[j] + cb[j]), e = dh[j] * open;
            d_o[j] = e * v * shut;
            C d = dc[j] + e * (1 - v * v);
            dweight[j] += d * n[j];
            dbias[j] += d;
            d *= cw[j];
            dc[j] = d;
            sum += d;
            along += d * n[j];
          }
          C* part = cell_parts + 2 * (unit * batch + b);
          part[0] = sum, part[1] = along;
        }
        double* total = sums + 8 * hidden + u0;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
          total[j] += static_cast<double>(dweight[j]);
          total[hidden + j] += static_cast<double>(dbias[j]);
        }
      }
    };
    barrier.phase(phase++, begin, end, through_output, t % 2);

    // through the cell's normalisation, the activations and the gates' weights
    barrier.phase(phase, begin, end, [&](int64_t unit) {
      if (merged != phase) {
        for (int64_t b = 0; b < batch; b++)
          merge_sums(cell_parts, s, b, static_cast<double>(hidden), &rows_of[size_t(b)]);
        merged = phase;
      }
      const int64_t u0 = unit * kLstmUnit, u1 = std::min(hidden, u0 + kLstmUnit), width = u1 - u0;
      const C *w = p.gate_weight + u0, *bias = p.gate_bias + u0, *cw = p.cell_weight + u0, *cb = p.cell_bias + u0;
      alignas(64) C dweight[4 * kLstmUnit], dbias[4 * kLstmUnit];
      for (int64_t first = 0; first < batch; first += kRows) {
        std::fill(dweight, dweight + 4 * kLstmUnit, C(0));
        std::fill(dbias, dbias + 4 * kLstmUnit, C(0));
        for (int64_t b = first; b < std::min(batch, first + kRows); b++) {
          const C mean = rows_of[size_t(b)].first, along = rows_of[size_t(b)].second;
          const C scale = scales[2 * b + 1];
          const C* __restrict n = kept_cell + b * hidden + u0, * __restrict z = kept_gates + b * gate_row + u0;
          const C* __restrict c = cell_before ? cell_before + b * hidden + u0 : nullptr;
          C* __restrict dc = grad.cell + b * hidden + u0, * __restrict g = dgates + b * gate_row + u0;
          alignas(64) C before[kLstmUnit];
          if (!c) {
            std::fill(before, before + width, C(0));
          } else if (t) {
#pragma omp simd
            for (int64_t j = 0; j < width; j++) before[j] = c[j] * cw[j] + cb[j];
          } else {
            std::copy(c, c + width, before);
          }
#pragma omp simd
          for (int64_t j = 0; j < width; j++) {
            const int64_t f = hidden + j, v = 2 * hidden + j;
            const C d = (dc[j] - mean - n[j] * along) * scale;
            C i_open, i_shut, f_open, f_shut;
            sigmoid_pair(z[j] * w[j] + bias[j], &i_open, &i_shut);
            sigmoid_pair(z[f] * w[f] + bias[f], &f_open, &f_shut);
            const C value = tanh(z[v] * w[v] + bias[v]);
            dc[j] = d * f_open;
            g[j] = d * value * i_open * i_shut;
            g[f] = d * before[j] * f_open * f_shut;
            g[v] = d * i_open * (1 - value * value);
          }
          C sum = 0, product = 0;
          for (int q = 0; q < 4; q++) {
            C* __restrict gq = g + q * hidden;
            const C* __restrict zq = z + q * hidden;
            const C* __restrict wq = w + q * hidden;
            C *dwq = dweight + q * kLstmUnit, *dbq = dbias + q * kLstmUnit;
#pragma omp simd reduction(+ : sum, product)
            for (int64_t j = 0; j < width; j++) {
              dwq[j] += gq[j] * zq[j];
              dbq[j] += gq[j];
              const C d = gq[j] * wq[j];
              gq[j] = d;
              sum += d;
              product += d * zq[j];
            }
          }
          C* part = gate_parts + 2 * (unit * batch + b);
          part[0] = sum, part[1] = product;
        }
        for (int q = 0; q < 4; q++) {
          double* total = sums + q * hidden + u0;
#pragma omp simd
          for (int64_t j = 0; j < width; j++) {
            total[j] += static_cast<double>(dweight[q * kLstmUnit + j]);
            total[4 * hidden + j] += static_cast<double>(dbias[q * kLstmUnit + j]);
          }
        }
      }
    });
    phase++;

    // through the gates' normalisation
    barrier.phase(phase, begin, end, [&](int64_t unit) {
      if (merged != phase) {
        for (int64_t b = 0; b < batch; b++)
          merge_sums(gate_parts, s, b, static_cast<double>(4 * hidden), &rows_of[size_t(b)]);
        merged = phase;
      }
      const int64_t u0 = unit * kLstmUnit, u1 = std::min(hidden, u0 + kLstmUnit), width = u1 - u0;
      for (int64_t b = 0; b < batch; b++) {
        const C mean = rows_of[size_t(b)].first, along = rows_of[size_t(b)].second;
        const C scale = scales[2 * b];
        for (int q = 0; q < 4; q++) {
          const C* __restrict z = kept_gates + b * gate_row + q * hidden + u0;
          C* __restrict g = dgates + b * gate_row + q * hidden + u0;
#pragma omp simd
          for (int64_t j = 0; j < width; j++) g[j] = (g[j] - mean - z[j] * along) * scale;
        }
      }
    });
    phase++;
  }

  barrier.phase(phase, begin, end, [&](int64_t unit) {
    const int64_t u0 = unit * kLstmUnit, u1 = std::min(hidden, u0 + kLstmUnit), width = u1 - u0;
    if (s.steps && grad.first_state)
      products_with_columns(p.hidden_weight + u0, hidden, grad.gates, batch, width, grad.hidden + u0);
    for (int q = 0; q < 4; q++) {
      for (int64_t j = u0; j < u1; j++) {
        grad.gate_weight[q * hidden + j] = static_cast<C>(sums[q * hidden + j]);
        grad.gate_bias[q * hidden + j] = static_cast<C>(sums[(4 + q) * hidden + j]);
      }
    }
    for (int64_t j = u0; j < u1; j++) {
      grad.cell_weight[j] = static_cast<C>(sums[8 * hidden + j]);
      grad.cell_bias[j] = static_cast<C>(sums[9 * hidden + j]);
    }
  });
}

}  // namespace

FASTASR_KERNELS_COMPUTE(LayerNormLstmKernels, .forward = forward<T>, .backward = backward<T>)

}  // namespace fastasr::cpu
