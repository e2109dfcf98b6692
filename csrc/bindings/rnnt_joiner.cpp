// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/rnnt_joiner.h"

#include "bindings/dispatch.h"
#include "cpu/math/activation.h"

namespace fastasr::bindings::rnnt_joiner {
namespace {

using cpu::JoinerRow;

// Rows of a block share one part of dbias.
constexpr int64_t kBlock = 16;

void check_indices(const Tensor& t, int64_t dim, const char* op, const char* name) {
  check(dtype_of(t) == ScalarType::Long && t.is_contiguous() && t.dim() == dim, op, name);
}

bool is_tanh(int64_t activation, const char* op) {
  const bool tanh = activation == static_cast<int64_t>(cpu::Activation::tanh);
  check(tanh || activation == static_cast<int64_t>(cpu::Activation::relu), op, "activation");
  return tanh;
}

// Makes a contiguous tensor of the compute type with this many elements.
template <typename C>
void check_plain(const Tensor& t, int64_t elements, const char* op, const char* name) {
  check(dtype_of(t) == kComputeType<C> && t.is_contiguous() && t.numel() == elements, op, name);
}

// Checks that each row of a table lies within the tensors that the kernels read and write by it.
const JoinerRow* checked_rows(const Tensor& rows, int64_t places, int64_t frames, int64_t contexts, int64_t outputs,
                              const char* op) {
  check_indices(rows, 2, op, "rows");
  check(rows.size(1) == 4, op, "rows");
  static_assert(sizeof(JoinerRow) == 4 * sizeof(int64_t));
  const auto* found = reinterpret_cast<const JoinerRow*>(data<int64_t>(rows));
  bool right = true;
  for (int64_t i = 0; i < rows.size(0); i++) {
    const JoinerRow& row = found[i];
    right = right && row.place >= 0 && row.place < places && row.frame >= 0 && row.frame < frames && row.context >= 0 &&
            row.context < contexts && row.symbol < outputs;
  }
  check(right, op, "a row is out of range");
  return found;
}

constexpr int64_t kAny = int64_t{1} << 62;

Tensor rnnt_joiner_rows(const Tensor& starts, const Tensor& symbols, const Optional& boundary, int64_t s_range,
                        int64_t outputs, const Optional& grad_symbol, const Optional& grad_blank) {
  const char* op = "rnnt_joiner_rows";
  check_indices(starts, 2, op, "starts");
  check_indices(symbols, 2, op, "symbols");
  const int64_t batch = starts.size(0), frames = starts.size(1);
  check(symbols.size(0) == batch && s_range >= 1, op, "symbols, s_range");
  cpu::JoinerBand band{
      data<int64_t>(starts), data<int64_t>(symbols), nullptr, batch, frames, symbols.size(1), s_range, outputs};
  if (boundary) {
    check_indices(*boundary, 2, op, "boundary");
    check(boundary->size(0) == batch && boundary->size(1) == 4, op, "boundary");
    band.boundary = data<int64_t>(*boundary);
  }
  check(grad_symbol.has_value() == grad_blank.has_value(), op, "one gradient of two");
  Tensor found;
  with_compute_type(grad_symbol ? dtype_of(*grad_symbol) : ScalarType::Float, op, [&]<typename C>() {
    const auto& kernel = cpu::kernels<cpu::JoinerKernels<C>>();
    const C *gx = nullptr, *gy = nullptr;
    if (grad_symbol) {
      check_plain<C>(*grad_symbol, batch * frames * s_range, op, "grad_symbol");
      check_plain<C>(*grad_blank, batch * frames * s_range, op, "grad_blank");
      gx = data<C>(*grad_symbol), gy = data<C>(*grad_blank);
    }
    const int64_t count = kernel.rows(band, gx, gy, nullptr);
    found = new_contiguous(starts, {count, 4});
    if (count) kernel.rows(band, gx, gy, reinterpret_cast<JoinerRow*>(mutable_data<int64_t>(found)));
  });
  return found;
}

void rnnt_joiner_hidden(const Tensor& am, const Tensor& lm, const Tensor& rows, int64_t activation, Tensor out) {
  const char* op = "rnnt_joiner_hidden";
  check(am.dim() == 3 && lm.dim() == 3 && am.size(2) == lm.size(2), op, "am, lm");
  check_like(am, am, op, "am");
  check_like(lm, am, op, "lm");
  const bool tanh = is_tanh(activation, op);
  const int64_t channels = am.size(2), frames = am.size(0) * am.size(1), contexts = lm.size(0) * lm.size(1);
  const JoinerRow* table = checked_rows(rows, kAny, frames, contexts, kAny, op);
  with_kernels<cpu::JoinerKernels>(am, op, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    check_plain<C>(out, rows.size(0) * channels, op, "out");
    const T *left = data<T>(am), *right = data<T>(lm);
    C* hidden = mutable_data<C>(out);
    parallel_tasks(rows.size(0), channels, [&](int64_t begin, int64_t end) {
      kernel.hidden(left, right, table, begin, end, channels, tanh, hidden);
    });
  });
}

// Applies dropout with probability p to x (rows, channels) in place; seed (1,) and a row's place choose what is kept.
void rnnt_joiner_dropout(const Tensor& rows, const Tensor& seed, double p, Tensor x) {
  const char* op = "rnnt_joiner_dropout";
  check(is_dense(seed, ScalarType::Long, {1}) && p > 0 && p < 1, op, "seed, p");
  check(x.dim() == 2, op, "x");
  const int64_t count = rows.size(0), channels = x.size(1);
  const JoinerRow* table = checked_rows(rows, kAny, kAny, kAny, kAny, op);
  const cpu::WeightsDropout dropout{static_cast<uint64_t>(*data<int64_t>(seed)), static_cast<int32_t>(p * 0x1p31),
                                    1 / (1 - p)};
  with_wide_kernels<cpu::JoinerKernels>(x, op, [&]<typename C>(const auto& kernel) {
    check_plain<C>(x, count * channels, op, "x");
    C* to = mutable_data<C>(x);
    parallel_tasks(count, channels,
                   [&](int64_t begin, int64_t end) { kernel.dropout(dropout, table, begin, end, channels, to); });
  });
}

// The outputs of logits, of which the last ones are `durations`.
cpu::JoinerOutputs outputs_of(const Tensor& logits, const Tensor& rows, int64_t durations, int64_t blank, bool hat,
                              const char* op) {
  check(logits.dim() == 2 && logits.size(0) == rows.size(0), op, "logits");
  const int64_t all = logits.size(1), tokens = all - durations;
  check(durations >= 0 && blank >= 0 && blank < tokens, op, "durations, termination_symbol");
  return {tokens, durations, blank, hat, all};
}

void rnnt_joiner_scores(const Tensor& logits, const Tensor& rows, int64_t blank, bool hat, Tensor symbol_logprobs,
                        Tensor blank_logprobs, Tensor duration_logprobs, Tensor normaliser) {
  const char* op = "rnnt_joiner_scores";
  const int64_t places = normaliser.numel(), durations = duration_logprobs.size(duration_logprobs.dim() - 1);
  const cpu::JoinerOutputs outputs = outputs_of(logits, rows, durations, blank, hat, op);
  const int64_t count = rows.size(0);
  const JoinerRow* table = checked_rows(rows, places, kAny, kAny, outputs.tokens, op);
  check_plain<double>(normaliser, places, op, "normaliser");
  with_wide_kernels<cpu::JoinerKernels>(logits, op, [&]<typename C>(const auto& kernel) {
    check_plain<C>(logits, count * outputs.all, op, "logits");
    check_plain<C>(symbol_logprobs, places, op, "symbol_logprobs");
    check_plain<C>(blank_logprobs, places, op, "blank_logprobs");
    check_plain<C>(duration_logprobs, places * durations, op, "duration_logprobs");
    const C* x = data<C>(logits);
    const cpu::JoinerScores<C> to{mutable_data<C>(symbol_logprobs), mutable_data<C>(blank_logprobs),
                                  mutable_data<double>(normaliser), mutable_data<C>(duration_logprobs)};
    parallel_tasks(count, outputs.all,
                   [&](int64_t begin, int64_t end) { kernel.scores(x, table, begin, end, outputs, to); });
  });
}

// out may be logits; dbias, float64, is added to.
void rnnt_joiner_logits_gradient(const Tensor& logits, const Tensor& rows, const Tensor& normaliser,
                                 const Tensor& grad_symbol, const Tensor& grad_blank, const Tensor& grad_durations,
                                 int64_t blank, bool hat, Tensor out, Tensor dbias) {
  const char* op = "rnnt_joiner_logits_gradient";
  const int64_t places = normaliser.numel(), durations = grad_durations.size(grad_durations.dim() - 1);
  const cpu::JoinerOutputs outputs = outputs_of(logits, rows, durations, blank, hat, op);
  const int64_t count = rows.size(0), all = outputs.all;
  const JoinerRow* table = checked_rows(rows, places, kAny, kAny, outputs.tokens, op);
  check_plain<double>(normaliser, places, op, "normaliser");
  check_plain<double>(dbias, all, op, "dbias");
  with_wide_kernels<cpu::JoinerKernels>(logits, op, [&]<typename C>(const auto& kernel) {
    check_plain<C>(logits, count * all, op, "logits");
    check_plain<C>(out, count * all, op, "out");
    check_plain<C>(grad_symbol, places, op, "grad_symbol");
    check_plain<C>(grad_blank, places, op, "grad_blank");
    check_plain<C>(grad_durations, places * durations, op, "grad_durations");
    const cpu::JoinerGradient<C> g{data<C>(logits),     data<double>(normaliser), data<C>(grad_symbol),
                                   data<C>(grad_blank), data<C>(grad_durations),  mutable_data<C>(out)};
    double* sum = mutable_data<double>(dbias);
    const int64_t blocks = (count + kBlock - 1) / kBlock;
    std::vector<C> parts(static_cast<size_t>(blocks * all));
    parallel_tasks(blocks, kBlock * all, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++)
        kernel.logits_gradient(g, table, b * kBlock, std::min(count, (b + 1) * kBlock), outputs,
                               parts.data() + b * all);
    });
    parallel_range(all, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t b = 0; b < blocks; b++)
        for (int64_t j = begin; j < end; j++) sum[j] += static_cast<double>(parts[b * all + j]);
    });
  });
}

void rnnt_joiner_hidden_gradient(const Tensor& dhidden, const Tensor& hidden, const Tensor& rows, int64_t activation,
                                 Tensor dam, Tensor dlm) {
  const char* op = "rnnt_joiner_hidden_gradient";
  check(dam.dim() == 3 && dlm.dim() == 3 && dam.size(2) == dlm.size(2), op, "dam, dlm");
  const bool tanh = is_tanh(activation, op);
  const int64_t channels = dam.size(2), count = rows.size(0);
  const int64_t frames = dam.size(0) * dam.size(1), contexts = dlm.size(0) * dlm.size(1);
  const JoinerRow* table = checked_rows(rows, kAny, frames, contexts, kAny, op);
  with_wide_kernels<cpu::JoinerKernels>(dhidden, op, [&]<typename C>(const auto& kernel) {
    check_plain<C>(dhidden, count * channels, op, "dhidden");
    check_plain<C>(hidden, count * channels, op, "hidden");
    check_plain<C>(dam, frames * channels, op, "dam");
    check_plain<C>(dlm, contexts * channels, op, "dlm");
    const C *d = data<C>(dhidden), *h = data<C>(hidden);
    C *a = mutable_data<C>(dam), *c = mutable_data<C>(dlm);
    // threads own columns, in whole cache lines: every sum runs in row order
    constexpr int64_t kColumns = 16;
    const int64_t stripes = (channels + kColumns - 1) / kColumns;
    parallel_tasks(stripes, kColumns * std::max<int64_t>(1, count), [&](int64_t begin, int64_t end) {
      kernel.hidden_gradient(d, h, table, count, begin * kColumns, std::min(channels, end * kColumns), channels, tanh,
                             a, c);
    });
  });
}

}  // namespace

FASTASR_OPERATORS(FASTASR_TYPED(rnnt_joiner_rows), FASTASR_TYPED(rnnt_joiner_hidden),
                  FASTASR_TYPED(rnnt_joiner_dropout), FASTASR_TYPED(rnnt_joiner_scores),
                  FASTASR_TYPED(rnnt_joiner_logits_gradient), FASTASR_TYPED(rnnt_joiner_hidden_gradient))

}  // namespace fastasr::bindings::rnnt_joiner
