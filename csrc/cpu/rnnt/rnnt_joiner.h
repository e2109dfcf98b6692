// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/attention/weights_dropout.h"
#include "cpu/simd/kernels.h"

// The passes around the matrix products of a transducer's joiner, over a chunk of rows. Row (b, t, r) joins frame t and
// context s = starts[b, t] + r:
//   h = act(am[b, t] + lm[b, s]),   l = W h + bias (a matrix product),   L = log sum_v exp(l_v),
//   blank = l_blank - L,   symbol = l_y - L with y = symbols[b, s];
//   HAT: blank = log sigmoid(l_blank), symbol = l_y - L + log sigmoid(-l_blank), L over the other outputs;
//   the durations of a TDT joiner are outputs behind these tokens, with a softmax of their own.
// Backward, with gx, gy the gradients of symbol and blank: dl = gx e_y + gy e_blank - (gx + gy) exp(l - L);
//   HAT: dl = gx e_y - gx exp(l - L) but dl_blank = gy sigmoid(-l_blank) - gx sigmoid(l_blank);
//   with durations, gz the gradients of theirs and q their softmax: dl_i = gz_i - q_i sum gz;
//   then dh = dl W, dW = dl^T h (matrix products), and da = dh act' is added to dam[b, t] and dlm[b, s].
namespace fastasr::cpu {

// A row to compute: its place (b T + t) R + r in the tensors of results, b T + t, b (S + 1) + s, and y.
struct JoinerRow {
  static constexpr int64_t kNoSymbol = -1;  // s has no symbol: -infinity
  static constexpr int64_t kUnknown = -2;   // a symbol outside the vocabulary: NaN
  int64_t place, frame, context, symbol;
};

struct JoinerBand {
  const int64_t *starts, *symbols, *boundary;  // (B, T), (B, S); (B, 4) of s_begin, t_begin, s_end, t_end, or null
  int64_t batch, frames, length, range, outputs;
};

// A row of logits holds the tokens, blank among them, and behind them the durations, if there are any.
struct JoinerOutputs {
  int64_t tokens, durations, blank;
  bool hat;
  int64_t all;  // tokens + durations
};

// The forward pass writes these by a row's place; a place has `durations` of the last.
template <typename C>
struct JoinerScores {
  C *symbol, *blank;
  double* normaliser;
  C* durations;
};

// The backward pass reads and writes these. The logits and their gradient go by row, everything else by a row's place.
template <typename C>
struct JoinerGradient {
  const C* logits;
  const double* normaliser;
  const C *gx, *gy, *gz;
  C* out;  // may be logits
};

template <typename T>
struct JoinerKernels {
  using C = compute_t<T>;
  // Writes the rows inside the boundary, without those whose gradients gx and gy (B, T, R) are both 0 (null: none is
  // left out). Returns their number; if `out` is null it only counts.
  int64_t (*rows)(const JoinerBand& band, const C* gx, const C* gy, JoinerRow* out);
  // Computes hidden[i] = act(am[frame] + lm[context]), `channels` wide, for rows [begin, end); act is tanh or relu.
  void (*hidden)(const T* am, const T* lm, const JoinerRow* rows, int64_t begin, int64_t end, int64_t channels,
                 bool tanh, C* hidden);
  // Applies dropout to rows [begin, end) of x, in place: a row's place and the channel decide which elements are kept.
  void (*dropout)(const WeightsDropout& dropout, const JoinerRow* rows, int64_t begin, int64_t end, int64_t channels,
                  C* x);
  // Computes the scores of rows [begin, end).
  void (*scores)(const C* logits, const JoinerRow* rows, int64_t begin, int64_t end, const JoinerOutputs& outputs,
                 const JoinerScores<C>& to);
  // Computes dl of rows [begin, end), and their sum in dbias (overwritten).
  void (*logits_gradient)(const JoinerGradient<C>& g, const JoinerRow* rows, int64_t begin, int64_t end,
                          const JoinerOutputs& outputs, C* dbias);
  // Do the same as `scores` and `logits_gradient` for one row of given logits, with a single L in the compute type and
  // without a dbias. Where the largest logit is infinite and none is NaN, L is that logit. `out` may be `logits`.
  void (*row_scores)(const T* logits, int64_t outputs, int64_t symbol, int64_t blank, bool hat, C* symbol_logprob,
                     C* blank_logprob, C* normaliser);
  void (*row_gradient)(const T* logits, C normaliser, C gx, C gy, int64_t outputs, int64_t symbol, int64_t blank,
                       bool hat, T* out);
  // Adds columns [begin, end) of da of all rows, in order, to dam and dlm.
  void (*hidden_gradient)(const C* dhidden, const C* hidden, const JoinerRow* rows, int64_t count, int64_t begin,
                          int64_t end, int64_t channels, bool tanh, C* dam, C* dlm);
};

}  // namespace fastasr::cpu
