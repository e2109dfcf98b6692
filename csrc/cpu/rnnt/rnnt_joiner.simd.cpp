// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/rnnt_joiner.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/math/activation.h"

namespace fastasr::cpu {
namespace {

template <typename C>
int64_t rows(const JoinerBand& p, const C* gx, const C* gy, JoinerRow* out) {
  int64_t count = 0;
  for (int64_t b = 0; b < p.batch; b++) {
    int64_t s_begin = 0, t_begin = 0, s_end = p.length, t_end = p.frames;
    if (p.boundary) {
      const int64_t* at = p.boundary + 4 * b;
      s_begin = std::max<int64_t>(0, at[0]), t_begin = std::max<int64_t>(0, at[1]);
      s_end = std::min(s_end, at[2]), t_end = std::min(t_end, at[3]);
    }
    for (int64_t t = t_begin; t < t_end; t++) {
      const int64_t frame = b * p.frames + t, start = p.starts[frame];
      const int64_t last = start > s_end ? 0 : std::min(p.range, s_end - start + 1);  // no overflow at absurd starts
      for (int64_t r = start < s_begin ? s_begin - start : 0; r < last; r++) {
        const int64_t place = frame * p.range + r, s = start + r;
        const bool has_symbol = s < s_end;
        if (gx && gy[place] == 0 && (!has_symbol || gx[place] == 0)) continue;
        if (out) {
          int64_t symbol = JoinerRow::kNoSymbol;
          if (has_symbol) symbol = p.symbols[b * p.length + s];
          if (has_symbol && (symbol < 0 || symbol >= p.outputs)) symbol = JoinerRow::kUnknown;
          out[count] = {place, frame, b * (p.length + 1) + s, symbol};
        }
        count++;
      }
    }
  }
  return count;
}

template <typename T, bool kTanh, typename C = compute_t<T>>
void hidden_rows(const T* am, const T* lm, const JoinerRow* rows, int64_t begin, int64_t end, int64_t n, C* hidden) {
  constexpr Activation kActivation = kTanh ? Activation::tanh : Activation::relu;
  for (int64_t i = begin; i < end; i++) {
    const T* __restrict a = am + rows[i].frame * n;
    const T* __restrict c = lm + rows[i].context * n;
    C* __restrict h = hidden + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) h[j] = activate<kActivation>(load(a[j]) + load(c[j]));
  }
}

template <typename C>
void dropout(const WeightsDropout& d, const JoinerRow* rows, int64_t begin, int64_t end, int64_t n, C* x) {
  const C scale = static_cast<C>(d.scale);
  for (int64_t i = begin; i < end; i++) {
    const DropoutRow row = dropout_row(d, rows[i].place);
    C* __restrict h = x + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; j++)
      h[j] = dropout_bits(row, static_cast<uint32_t>(j)) >= d.threshold ? h[j] * scale : C(0);
  }
}

// Adds at most kChain terms per lane in the compute type, then in double.
constexpr int64_t kChain = 512;

template <typename T, typename C = compute_t<T>>
FASTASR_INLINE C largest(const T* __restrict x, int64_t begin, int64_t end, C so_far) {
#pragma omp simd reduction(max : so_far)
  for (int64_t j = begin; j < end; j++) so_far = load(x[j]) > so_far ? load(x[j]) : so_far;
  return so_far;
}

template <typename T, typename C = compute_t<T>>
FASTASR_INLINE double sum_of_exp(const T* __restrict x, int64_t begin, int64_t end, C shift) {
  double total = 0;
  for (int64_t first = begin; first < end; first += kChain) {
    const int64_t last = first + kChain < end ? first + kChain : end;
    C sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = first; j < last; j++) sum += exp_or_zero(load(x[j]) - shift);
    total += static_cast<double>(sum);
  }
  return total;
}

// Leaves out one element, or none where `without` is n.
template <typename T, typename C = compute_t<T>>
FASTASR_INLINE double log_sum_of_exp(const T* x, int64_t n, int64_t without) {
  const C shift = largest(x, without + 1, n, largest(x, 0, without, -std::numeric_limits<C>::infinity()));
  return static_cast<double>(shift) + std::log(sum_of_exp(x, 0, without, shift) + sum_of_exp(x, without + 1, n, shift));
}

// log(1 + e^x)
double softplus(double x) { return std::log1p(std::exp(-std::fabs(x))) + (x > 0 ? x : 0); }

template <typename C>
void scores(const C* logits, const JoinerRow* rows, int64_t begin, int64_t end, const JoinerOutputs& o,
            const JoinerScores<C>& to) {
  constexpr C kNone = -std::numeric_limits<C>::infinity();
  const int64_t n = o.tokens;
  for (int64_t i = begin; i < end; i++) {
    const C* x = logits + i * o.all;
    const double total = log_sum_of_exp(x, n, o.hat ? o.blank : n), z = static_cast<double>(x[o.blank]);
    const int64_t y = rows[i].symbol, place = rows[i].place;
    double symbol = y == JoinerRow::kUnknown ? std::numeric_limits<double>::quiet_NaN() : static_cast<double>(kNone);
    if (y >= 0 && !(o.hat && y == o.blank)) symbol = static_cast<double>(x[y]) - total - (o.hat ? softplus(z) : 0);
    to.symbol[place] = static_cast<C>(symbol);
    to.blank[place] = static_cast<C>(o.hat ? -softplus(-z) : z - total);
    to.normaliser[place] = total;
    if (!o.durations) continue;
    const double of_durations = log_sum_of_exp(x + n, o.durations, o.durations);
    C* out = to.durations + place * o.durations;
    for (int64_t j = 0; j < o.durations; j++) out[j] = static_cast<C>(static_cast<double>(x[n + j]) - of_durations);
  }
}

// Computes exp(x - L) weight of four rows at a time, so that dbias is read and written once for them. L has two parts,
// because its rounding would scale a whole row.
template <typename C>
struct GradientRow {
  const C* x;
  C* out;
  C high, low, weight;
};

template <int kRows, typename C>
FASTASR_INLINE void softmax_gradient(const GradientRow<C>* rows, int64_t n, C* __restrict dbias) {
  const GradientRow<C> r0 = rows[0], r1 = rows[kRows > 1 ? 1 : 0], r2 = rows[kRows > 1 ? 2 : 0],
                       r3 = rows[kRows > 1 ? 3 : 0];
  const auto of = [](const GradientRow<C>& r, int64_t j) __attribute__((always_inline)) {
    const C a = (r.x[j] - r.high) - r.low;
    return exp_or_zero(a > 0 ? C(0) : a) * r.weight;  // above 0 by rounding, and a HAT's blank, which is replaced
  };
#pragma omp simd
  for (int64_t j = 0; j < n; j++) {
    const C d0 = of(r0, j);
    r0.out[j] = d0;
    C sum = d0;
    if constexpr (kRows > 1) {
      const C d1 = of(r1, j), d2 = of(r2, j), d3 = of(r3, j);
      r1.out[j] = d1, r2.out[j] = d2, r3.out[j] = d3;
      sum = (d0 + d1) + (d2 + d3);
    }
    dbias[j] += sum;
  }
}

// Writes the gradient of the durations' logits x to d, which may be x, and adds it to dbias.
template <typename C>
void durations_gradient(const C* x, const C* gz, int64_t n, C* d, C* dbias) {
  const double total = log_sum_of_exp(x, n, n);
  double sum = 0;
  for (int64_t j = 0; j < n; j++) sum += static_cast<double>(gz[j]);
  for (int64_t j = 0; j < n; j++) {
    const C a = static_cast<C>(static_cast<double>(x[j]) - total);
    d[j] = static_cast<C>(static_cast<double>(gz[j]) - static_cast<double>(exp_or_zero(a > 0 ? C(0) : a)) * sum);
    dbias[j] += d[j];
  }
}

template <typename C>
void logits_gradient(const JoinerGradient<C>& g, const JoinerRow* rows, int64_t begin, int64_t end,
                     const JoinerOutputs& o, C* dbias) {
  const int64_t n = o.tokens, blank = o.blank;
  for (int64_t j = 0; j < o.all; j++) dbias[j] = 0;
  double at_blank = 0;
  for (int64_t i = begin; i < end;) {
    const int count = end - i >= 4 ? 4 : 1;
    GradientRow<C> four[4];
    C z[4];
    for (int k = 0; k < count; k++) {
      const JoinerRow& row = rows[i + k];
      const double total = g.normaliser[row.place];
      const C gx = row.symbol == JoinerRow::kNoSymbol ? C(0) : g.gx[row.place], gy = g.gy[row.place];
      const C high = static_cast<C>(total);
      four[k] = {g.logits + (i + k) * o.all, g.out + (i + k) * o.all, high,
                 static_cast<C>(total - static_cast<double>(high)), o.hat ? -gx : -(gx + gy)};
      z[k] = four[k].x[blank];  // out may be the same memory
    }
    if (count == 4)
      softmax_gradient<4>(four, n, dbias);
    else
      softmax_gradient<1>(four, n, dbias);
    for (int k = 0; k < count; k++) {
      const JoinerRow& row = rows[i + k];
      const C gx = row.symbol == JoinerRow::kNoSymbol ? C(0) : g.gx[row.place], gy = g.gy[row.place];
      C* d = four[k].out;
      if (o.hat) {
        C s, r;
        sigmoid_pair(z[k], &s, &r);
        d[blank] = gy * r - gx * s;
      } else {
        d[blank] += row.symbol == blank ? gx + gy : gy;
      }
      if (row.symbol >= 0 && row.symbol != blank) d[row.symbol] += gx, dbias[row.symbol] += gx;
      at_blank += static_cast<double>(d[blank]);
      if (o.durations) durations_gradient(four[k].x + n, g.gz + row.place * o.durations, o.durations, d + n, dbias + n);
    }
    i += count;
  }
  dbias[blank] = static_cast<C>(at_blank);
}

template <typename T, typename C = compute_t<T>>
void row_scores(const T* x, int64_t n, int64_t y, int64_t blank, bool hat, C* px, C* py, C* normaliser) {
  double total = log_sum_of_exp(x, n, hat ? blank : n);
  if (std::isnan(total)) {
    total = -std::numeric_limits<double>::infinity();
    for (int64_t j = 0; j < n && !std::isnan(total); j++)
      if (const double l = static_cast<double>(load(x[j])); !(hat && j == blank) && !(l <= total)) total = l;
  }
  const double z = static_cast<double>(load(x[blank]));
  *px = static_cast<C>(static_cast<double>(load(x[y])) - total - (hat ? softplus(z) : 0));
  *py = static_cast<C>(hat ? -softplus(-z) : z - total);
  *normaliser = static_cast<C>(total);
}

template <typename T, typename C = compute_t<T>>
void row_gradient(const T* x, C total, C gx, C gy, int64_t n, int64_t y, int64_t blank, bool hat, T* out) {
  if (gx == 0 && gy == 0) {  // a row without a part in the loss, whatever its logits are
    for (int64_t j = 0; j < n; j++) store(out + j, C(0));
    return;
  }
  const C weight = hat ? -gx : -(gx + gy);
  const auto softmax = [&](int64_t j) __attribute__((always_inline)) {
    const C a = load(x[j]) - total;
    return exp_or_zero(a > 0 ? C(0) : a) * weight;  // above 0 by rounding, and a HAT's blank, which is replaced
  };
  const C at_symbol = softmax(y) + gx;
  C at_blank = softmax(blank) + gy;
  if (hat) {
    C s, r;
    sigmoid_pair(load(x[blank]), &s, &r);
    at_blank = gy * r - gx * s;
  }
#pragma omp simd
  for (int64_t j = 0; j < n; j++) store(out + j, softmax(j));
  store(out + y, at_symbol);
  store(out + blank, y == blank ? at_blank + gx : at_blank);
}

template <bool kTanh, typename C>
void hidden_gradient_rows(const C* dhidden, const C* hidden, const JoinerRow* rows, int64_t count, int64_t begin,
                          int64_t end, int64_t n, C* dam, C* dlm) {
  for (int64_t i = 0; i < count; i++) {
    const C* __restrict d = dhidden + i * n;
    const C* __restrict h = hidden + i * n;
    C* __restrict a = dam + rows[i].frame * n;
    C* __restrict c = dlm + rows[i].context * n;
#pragma omp simd
    for (int64_t j = begin; j < end; j++) {
      const C da = kTanh ? d[j] * (1 - h[j] * h[j]) : (h[j] > 0 ? d[j] : C(0));
      a[j] += da;
      c[j] += da;
    }
  }
}

template <typename T>
void hidden(const T* am, const T* lm, const JoinerRow* rows, int64_t begin, int64_t end, int64_t n, bool tanh,
            compute_t<T>* out) {
  (tanh ? hidden_rows<T, true> : hidden_rows<T, false>)(am, lm, rows, begin, end, n, out);
}

template <typename C>
void hidden_gradient(const C* dhidden, const C* hidden, const JoinerRow* rows, int64_t count, int64_t begin,
                     int64_t end, int64_t n, bool tanh, C* dam, C* dlm) {
  (tanh ? hidden_gradient_rows<true, C> : hidden_gradient_rows<false, C>)(dhidden, hidden, rows, count, begin, end, n,
                                                                          dam, dlm);
}

}  // namespace

FASTASR_KERNELS(JoinerKernels, .rows = rows<compute_t<T>>, .hidden = hidden<T>, .dropout = dropout<compute_t<T>>,
                .scores = scores<compute_t<T>>, .logits_gradient = logits_gradient<compute_t<T>>,
                .row_scores = row_scores<T>, .row_gradient = row_gradient<T>,
                .hidden_gradient = hidden_gradient<compute_t<T>>)

}  // namespace fastasr::cpu
