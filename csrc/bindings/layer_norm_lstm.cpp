// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/layer_norm_lstm.h"

#include <cstring>

#include "bindings/dispatch.h"
#include "bindings/scratch.h"

namespace fastasr::bindings::layer_norm_lstm {
namespace {

using cpu::LstmSizes;

void check_size(const Tensor& t, const Tensor& reference, int64_t size, const char* op, const char* name) {
  check_like(t, reference, op, name);
  check(t.numel() == size, op, name, " has another number of elements");
}

// Runs f(barrier, begin, end) on as many threads as there is work for.
template <typename F>
void on_threads(const LstmSizes& s, const F& f) {
  cpu::PhaseBarrier barrier(s.units());
  // Work of a step: with less, waiting for each other costs more than the threads save.
  const int64_t work = s.batch * s.hidden * (4 * s.hidden + 64);
  const int64_t threads =
      work < (int64_t{1} << 17) ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), s.units());
  if (threads <= 1) return f(barrier, int64_t{0}, s.units());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    f(barrier, s.units() * begin / threads, s.units() * end / threads);
  });
}

void check_state(const Optional& state, const Tensor& like, const LstmSizes& s, const char* op, const char* name) {
  if (!state.has_value()) return;
  check(has_sizes(*state, {s.batch, s.hidden}), op, name);
  check_like(*state, like, op, name);
}

// Returns the problem that checked parameters and states describe.
template <typename C>
cpu::LayerNormLstm<C> problem(const char* op, const Tensor& like, const LstmSizes& s, const Tensor& hidden_weight,
                              const Tensor& gate_weight, const Tensor& gate_bias, const Tensor& cell_weight,
                              const Tensor& cell_bias, const Optional& hidden, const Optional& cell, double eps) {
  check(hidden_weight.dim() == 2 && hidden_weight.size(0) == 4 * s.hidden, op, "hidden_weight");
  check_like(hidden_weight, like, op, "hidden_weight");
  const auto parameter = [&](const Tensor& t, int64_t size, const char* name) {
    check_like(t, like, op, name);
    check(has_sizes(t, {size}), op, name);
    return data<C>(t);
  };
  check_state(hidden, like, s, op, "hidden");
  check_state(cell, like, s, op, "cell");
  cpu::LayerNormLstm<C> p{};
  p.size = s, p.hidden_weight = data<C>(hidden_weight), p.eps = eps;
  p.gate_weight = parameter(gate_weight, 4 * s.hidden, "gate_weight");
  p.gate_bias = parameter(gate_bias, 4 * s.hidden, "gate_bias");
  p.cell_weight = parameter(cell_weight, s.hidden, "cell_weight");
  p.cell_bias = parameter(cell_bias, s.hidden, "cell_bias");
  p.hidden = data_or_null<C>(hidden), p.cell = data_or_null<C>(cell);
  return p;
}

// Copies from to `to`, or writes zeros.
template <typename C>
void copy_or_clear(C* to, const C* from, int64_t n) {
  if (!n) return;
  if (from)
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(C));
  else
    std::fill(to, to + n, C(0));
}

// Takes input (T, B, 4 H), the product of the input. With input_weight it takes x itself, (T, B, D): for few rows,
// reading the weight is most of the cost. Returns y, the last hidden and cell, and what the backward needs.
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_lstm_forward(const Tensor& input, const Optional& input_weight,
                                                                   const Tensor& hidden_weight,
                                                                   const Tensor& gate_weight, const Tensor& gate_bias,
                                                                   const Tensor& cell_weight, const Tensor& cell_bias,
                                                                   const Optional& hidden, const Optional& cell,
                                                                   double eps, bool keep) {
  const char* op = "layer_norm_lstm_forward";
  check(input.dim() == 3 && hidden_weight.dim() == 2, op, "sizes");
  check_like(input, input, op, "input");
  LstmSizes s{input.size(0), input.size(1), hidden_weight.size(1), 0};
  if (input_weight.has_value()) {
    s.inputs = input.size(2);
    check_like(*input_weight, input, op, "input_weight");
    check(input_weight->dim() == 2 && input_weight->size(0) == 4 * s.hidden && s.inputs > 0 &&
              input_weight->size(1) == s.inputs,
          op, "input_weight");
  } else {
    check(input.size(2) == 4 * s.hidden, op, "input");
  }
  Tensor y = new_contiguous(input, {s.steps, s.batch, s.hidden});
  Tensor last_hidden = new_contiguous(input, {s.batch, s.hidden}),
         last_cell = new_contiguous(input, {s.batch, s.hidden});
  Tensor kept = keep ? new_contiguous(input, {s.kept()}) : new_without_elements(input);
  with_wide_kernels<cpu::LayerNormLstmKernels>(input, op, [&]<typename C>(const auto& kernel) {
    auto p = problem<C>(op, input, s, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell, eps);
    p.input = data<C>(input), p.input_weight = data_or_null<C>(input_weight);
    C *yp = mutable_data<C>(y), *hp = mutable_data<C>(last_hidden), *cp = mutable_data<C>(last_cell);
    C* kp = keep ? mutable_data<C>(kept) : nullptr;
    const int64_t state = s.batch * s.hidden;
    if (s.steps && state) {
      const Scratch<C> scratch(cpu::lstm_forward_scratch(s));
      on_threads(s, [&](cpu::PhaseBarrier& barrier, int64_t begin, int64_t end) {
        kernel.forward(p, yp, cp, kp, scratch.data(), barrier, begin, end);
      });
      copy_or_clear(hp, yp + (s.steps - 1) * state, state);
    } else {
      copy_or_clear(hp, p.hidden, state);
      copy_or_clear(cp, p.cell, state);
    }
  });
  return {y, last_hidden, last_cell, kept};
}

// Returns the gradients of the input's product, gate_weight, gate_bias, cell_weight, cell_bias, hidden and cell, in the
// order of the forward's arguments. Without need_state, hidden's gradient is not computed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_lstm_backward(
    const Optional& grad_y, const Optional& grad_hidden, const Optional& grad_cell, const Tensor& hidden_weight,
    const Tensor& gate_weight, const Tensor& gate_bias, const Tensor& cell_weight, const Tensor& cell_bias,
    const Optional& cell, const Tensor& kept, int64_t steps, int64_t batch, double eps, bool need_state) {
  const char* op = "layer_norm_lstm_backward";
  check(hidden_weight.dim() == 2 && steps >= 0 && batch >= 0, op, "sizes");
  const LstmSizes s{steps, batch, hidden_weight.size(1), 0};
  check_like(hidden_weight, hidden_weight, op, "hidden_weight");
  check_size(kept, hidden_weight, s.kept(), op, "kept");
  if (grad_y.has_value()) check_size(*grad_y, hidden_weight, steps * batch * s.hidden, op, "grad_y");
  for (const Optional* state : {&grad_hidden, &grad_cell}) check_state(*state, hidden_weight, s, op, "grad");
  Tensor dgates = new_contiguous(hidden_weight, {steps, batch, 4 * s.hidden});
  Tensor dgate_weight = new_contiguous(gate_weight), dgate_bias = new_contiguous(gate_bias);
  Tensor dcell_weight = new_contiguous(cell_weight), dcell_bias = new_contiguous(cell_bias);
  Tensor dhidden = new_contiguous(hidden_weight, {batch, s.hidden}),
         dcell = new_contiguous(hidden_weight, {batch, s.hidden});
  with_wide_kernels<cpu::LayerNormLstmKernels>(hidden_weight, op, [&]<typename C>(const auto& kernel) {
    const auto p =
        problem<C>(op, hidden_weight, s, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, {}, cell, eps);
    const auto given = [](const Optional& t) { return data_or_null<C>(t); };
    cpu::LayerNormLstmGradients<C> grad{};
    grad.y = given(grad_y), grad.hidden = mutable_data<C>(dhidden), grad.cell = mutable_data<C>(dcell);
    grad.gates = mutable_data<C>(dgates), grad.gate_weight = mutable_data<C>(dgate_weight);
    grad.gate_bias = mutable_data<C>(dgate_bias), grad.cell_weight = mutable_data<C>(dcell_weight);
    grad.cell_bias = mutable_data<C>(dcell_bias), grad.first_state = need_state;
    copy_or_clear(grad.hidden, given(grad_hidden), batch * s.hidden);
    copy_or_clear(grad.cell, given(grad_cell), batch * s.hidden);
    std::vector<double> sums(static_cast<size_t>(10 * s.hidden));
    const Scratch<C> scratch(cpu::lstm_backward_scratch(s) + 1);
    on_threads(s, [&](cpu::PhaseBarrier& barrier, int64_t begin, int64_t end) {
      kernel.backward(p, data<C>(kept), grad, sums.data(), scratch.data(), barrier, begin, end);
    });
  });
  return {dgates, dgate_weight, dgate_bias, dcell_weight, dcell_bias, dhidden, dcell};
}

}  // namespace

FASTASR_OPERATORS(FASTASR_TYPED(layer_norm_lstm_forward), FASTASR_TYPED(layer_norm_lstm_backward))

}  // namespace fastasr::bindings::layer_norm_lstm
