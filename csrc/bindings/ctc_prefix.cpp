// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <limits>

#include "bindings/dispatch.h"

// Prefix scores of CTC: hypotheses that a search has extended by a token.
namespace fastasr::bindings::ctc_prefix {
namespace {

// Returns log(exp(a) + exp(b)), which is NaN if one of both is.
double log_add(double a, double b) {
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  if (a == kNothing || b == kNothing) return a == kNothing ? b : a;
  return std::max(a, b) + std::log1p(std::exp(-std::abs(a - b)));
}

// x: log-probabilities of each hypothesis' last token (n, T), blank: those of the blank (n, T), before: the logarithm
// of the probability (n, T) that the frames up to each one give the hypothesis without that token, where it may follow.
// Returns the logarithms (2, n, T) of the probabilities that the frames up to each one give the hypothesis and end with
// its last token, and that they end with a blank. Frames before `start` give it with probability 0, whose logarithm is
// `lowest`; if the token is the hypothesis' `first` one, frame 0 may give it alone.
Tensor ctc_prefix_forward(const Tensor& x, const Tensor& blank, const Tensor& before, int64_t start, bool first,
                          double lowest) {
  constexpr const char* kOp = "ctc_prefix_forward";
  const int64_t rows = x.dim() == 2 ? x.size(0) : 0, frames = x.dim() == 2 ? x.size(1) : 0;
  for (const Tensor* t : {&x, &blank, &before})
    check(t->is_cpu() && is_dense(*t, ScalarType::Double, {rows, frames}), kOp, "log-probabilities");
  check(start >= 1 && frames >= 1, kOp, "start");
  const Tensor found = new_contiguous(x, {2, rows, frames});
  const double *const xp = data<double>(x), *const bp = data<double>(blank), *const fp = data<double>(before);
  double* const yp = mutable_data<double>(found);
  parallel_tasks(rows, 32 * frames, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      double *const token = yp + i * frames, *const empty = yp + (rows + i) * frames;
      const int64_t from = std::min(start, frames), at = i * frames;
      std::fill_n(token, from, lowest);
      std::fill_n(empty, from, lowest);
      if (first) token[0] = xp[at];
      for (int64_t t = from; t < frames; t++) {
        token[t] = log_add(token[t - 1], fp[at + t - 1]) + xp[at + t];
        empty[t] = log_add(token[t - 1], empty[t - 1]) + bp[at + t];
      }
    }
  });
  return found;
}

}  // namespace

FASTASR_UNDECLARED("fastasr/swap/forwards/ctc_prefix.py calls it without gradients, with tensors that it made",
                   FASTASR_TYPED(ctc_prefix_forward))

}  // namespace fastasr::bindings::ctc_prefix
