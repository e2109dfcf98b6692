// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/layer_norm_lstm.h"

#include <algorithm>
#include <thread>

#include "tests/check.h"

namespace fastasr::test {
namespace {

using Row = std::vector<long double>;
constexpr double kEps = 1e-3;

// Computes n = (z - mean) / deviation, y = n weight + bias, in place.
void norm(long double* z, int64_t n, const Row& weight, const Row& bias) {
  long double mean = 0, variance = 0;
  for (int64_t j = 0; j < n; j++) mean += z[j] / n;
  for (int64_t j = 0; j < n; j++) variance += (z[j] - mean) * (z[j] - mean) / n;
  for (int64_t j = 0; j < n; j++) {
    const size_t at = static_cast<size_t>(j);
    z[j] = (z[j] - mean) / std::sqrt(variance + kEps) * weight[at] + bias[at];
  }
}

long double logistic(long double x) { return 1 / (1 + std::exp(-x)); }

enum Operand { kGates, kHiddenWeight, kGateWeight, kGateBias, kCellWeight, kCellBias, kHidden, kCell, kOperands };

// Holds a call's operands and the gradients given to it, in any precision.
struct Reference {
  int64_t steps, batch, hidden;
  Row operand[kOperands], y, last_cell;

  // Computes the formula, from the product of the input on.
  void run() {
    const size_t units = static_cast<size_t>(hidden);
    y.assign(static_cast<size_t>(steps * batch) * units, 0), last_cell = operand[kCell];
    Row h = operand[kHidden], z(4 * units);
    for (int64_t t = 0; t < steps; t++) {
      Row next(h.size());
      for (size_t b = 0; b < static_cast<size_t>(batch); b++) {
        for (size_t r = 0; r < 4 * units; r++) {
          z[r] = operand[kGates][(static_cast<size_t>(t * batch) + b) * 4 * units + r];
          for (size_t k = 0; k < units; k++) z[r] += operand[kHiddenWeight][r * units + k] * h[b * units + k];
        }
        norm(z.data(), 4 * hidden, operand[kGateWeight], operand[kGateBias]);
        long double* c = last_cell.data() + b * units;
        for (size_t j = 0; j < units; j++)
          c[j] = logistic(z[units + j]) * c[j] + logistic(z[j]) * std::tanh(z[2 * units + j]);
        norm(c, hidden, operand[kCellWeight], operand[kCellBias]);
        for (size_t j = 0; j < units; j++) {
          next[b * units + j] = logistic(z[3 * units + j]) * std::tanh(c[j]);
          y[(static_cast<size_t>(t * batch) + b) * units + j] = next[b * units + j];
        }
      }
      h = next;
    }
  }
};

template <typename C>
struct Call {
  cpu::LstmSizes size;
  Buffer<C> x, input_weight, gates, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell;
  Buffer<C> grad_y, grad_hidden, grad_cell;
  Buffer<C> y, last_cell, kept, dgates, dgate_weight, dgate_bias, dcell_weight, dcell_bias, dhidden, dcell;
  bool states, step;

  Call(int64_t steps, int64_t batch, int64_t units, bool with_states, bool with_input)
      : size{steps, batch, units, with_input ? 11 : 0},
        x(steps * batch * 11),
        input_weight(4 * units * 11),
        gates(steps * batch * 4 * units),
        hidden_weight(4 * units * units),
        gate_weight(4 * units),
        gate_bias(4 * units),
        cell_weight(units),
        cell_bias(units),
        hidden(batch * units),
        cell(batch * units),
        grad_y(steps * batch * units),
        grad_hidden(batch * units),
        grad_cell(batch * units),
        y(steps * batch * units),
        last_cell(batch * units),
        kept(size.kept()),
        dgates(gates.size()),
        dgate_weight(4 * units),
        dgate_bias(4 * units),
        dcell_weight(units),
        dcell_bias(units),
        dhidden(batch * units),
        dcell(batch * units),
        states(with_states),
        step(with_input) {
    Random random(static_cast<uint64_t>(steps * 7919 + batch * 131 + units));
    for (Buffer<C>* b : {&x, &gates, &hidden, &cell, &grad_y, &grad_hidden, &grad_cell}) b->fill(random);
    for (Buffer<C>* b : {&gate_weight, &cell_weight}) b->fill(random, 0.3, 1);
    for (Buffer<C>* b : {&gate_bias, &cell_bias}) b->fill(random, 0.3);
    input_weight.fill(random, 0.3);
    hidden_weight.fill(random, 1 / std::sqrt(static_cast<double>(units)));
    if (!states)
      for (Buffer<C>* b : {&hidden, &cell})
        for (int64_t i = 0; i < b->size(); i++) (*b)[i] = 0;
    if (step)  // the kernel computes these itself
      for (int64_t i = 0; i < steps * batch; i++)
        for (int64_t r = 0; r < 4 * units; r++) {
          C sum = 0;
          for (int64_t k = 0; k < 11; k++) sum += x[i * 11 + k] * input_weight[r * 11 + k];
          gates[i * 4 * units + r] = sum;
        }
  }

  // Runs f(team, begin, end) by `threads` threads; 0 stands for two owners one after the other, in this thread.
  template <typename F>
  void on_threads(int64_t threads, const F& f) {
    cpu::Team team(size.units());
    const int64_t units = size.units();
    if (threads == 0) {
      f(team, int64_t{0}, units / 2);
      f(team, units / 2, units);
      return;
    }
    std::vector<std::thread> pool;
    for (int64_t i = 0; i < threads; i++)
      pool.emplace_back([&, i] { f(team, units * i / threads, units * (i + 1) / threads); });
    for (std::thread& t : pool) t.join();
  }

  void run(int64_t threads) {
    const auto& kernel = cpu::kernels<cpu::LayerNormLstmKernels<C>>();
    cpu::LayerNormLstm<C> p{};
    p.size = size;
    p.input = step ? x.data() : gates.data(), p.input_weight = step ? input_weight.data() : nullptr;
    p.hidden_weight = hidden_weight.data();
    p.gate_weight = gate_weight.data(), p.gate_bias = gate_bias.data();
    p.cell_weight = cell_weight.data(), p.cell_bias = cell_bias.data();
    p.hidden = states ? hidden.data() : nullptr, p.cell = states ? cell.data() : nullptr;
    p.eps = kEps;
    Buffer<C> scratch(cpu::lstm_forward_scratch(size)), more(cpu::lstm_backward_scratch(size));
    on_threads(threads, [&](cpu::Team& team, int64_t begin, int64_t end) {
      kernel.forward(p, y.data(), last_cell.data(), kept.data(), scratch.data(), team, begin, end);
    });
    std::copy(grad_hidden.data(), grad_hidden.data() + grad_hidden.size(), dhidden.data());
    std::copy(grad_cell.data(), grad_cell.data() + grad_cell.size(), dcell.data());
    std::vector<double> sums(static_cast<size_t>(10 * size.hidden));
    const cpu::LayerNormLstmGradients<C> grad{grad_y.data(),       dhidden.data(),      dcell.data(),
                                              dgates.data(),       dgate_weight.data(), dgate_bias.data(),
                                              dcell_weight.data(), dcell_bias.data(),   true};
    on_threads(threads, [&](cpu::Team& team, int64_t begin, int64_t end) {
      kernel.backward(p, kept.data(), grad, sums.data(), more.data(), team, begin, end);
    });
    for (Buffer<C>* b : {&y, &last_cell, &kept, &dgates, &dgate_weight, &dgate_bias, &dcell_weight, &dcell_bias,
                         &dhidden, &dcell, &scratch, &more})
      CHECK(b->intact(), "%s wrote outside", Type<C>::name);
  }

  std::vector<Buffer<C>*> outputs() {
    return {&y, &last_cell, &kept, &dgates, &dgate_weight, &dgate_bias, &dcell_weight, &dcell_bias, &dhidden, &dcell};
  }
};

template <typename C>
Row wide(Buffer<C>& b) {
  Row row(static_cast<size_t>(b.size()));
  for (int64_t i = 0; i < b.size(); i++) row[static_cast<size_t>(i)] = value(b[i]);
  return row;
}

// Compares values with the formula, and gradients with its differences along a direction, one operand after the other.
template <typename C>
void values(int64_t steps, int64_t batch, int64_t units, bool states, bool with_input) {
  Call<C> call(steps, batch, units, states, with_input);
  call.run(1);
  Buffer<C>* operands[kOperands] = {&call.gates,       &call.hidden_weight, &call.gate_weight, &call.gate_bias,
                                    &call.cell_weight, &call.cell_bias,     &call.hidden,      &call.cell};
  Buffer<C>* gradients[kOperands] = {&call.dgates,       nullptr,          &call.dgate_weight, &call.dgate_bias,
                                     &call.dcell_weight, &call.dcell_bias, &call.dhidden,      &call.dcell};
  Reference reference{steps, batch, units, {}, {}, {}};
  for (int i = 0; i < kOperands; i++) reference.operand[i] = wide(*operands[i]);
  reference.run();
  const long double unit = 2 * Type<C>::half_ulp, room = 200 * unit * static_cast<long double>(steps);
  for (size_t i = 0; i < reference.y.size(); i++)
    CHECK(std::fabs(value(call.y[int64_t(i)]) - reference.y[i]) <= room, "%s y %ldx%ldx%ld: %.9Lg, got %.9g",
          Type<C>::name, long(steps), long(batch), long(units), reference.y[i], value(call.y[int64_t(i)]));
  for (size_t i = 0; i < reference.last_cell.size(); i++)
    CHECK(std::fabs(value(call.last_cell[int64_t(i)]) - reference.last_cell[i]) <= 4 * room, "%s cell", Type<C>::name);

  const Row gy = wide(call.grad_y), gh = wide(call.grad_hidden), gc = wide(call.grad_cell);
  const auto loss = [&](Reference r) {
    r.run();
    long double sum = 0;
    for (size_t i = 0; i < gy.size(); i++) sum += gy[i] * r.y[i];
    for (size_t i = 0; i < gh.size(); i++) {
      const size_t last = r.y.size() - gh.size();
      sum += gh[i] * r.y[last + i] + gc[i] * r.last_cell[i];
    }
    return sum;
  };
  for (int o = 0; o < kOperands; o++) {
    if (!gradients[o]) continue;
    Random random(static_cast<uint64_t>(o + 77));
    Reference up = reference, down = reference;
    long double along = 0, size = 0;
    const long double h = 1e-7L;  // with many rows the third derivative shows at 1e-6
    for (size_t i = 0; i < reference.operand[o].size(); i++) {
      const long double d = random.normal(), g = value((*gradients[o])[int64_t(i)]);
      up.operand[o][i] += h * d, down.operand[o][i] -= h * d;
      along += g * d, size += g * g;
    }
    const long double expected = (loss(up) - loss(down)) / (2 * h);
    CHECK(std::fabs(along - expected) <= (400 * unit * static_cast<long double>(steps) + 1e-9L) * (1 + std::sqrt(size)),
          "%s gradient %d, %ldx%ldx%ld: %.9Lg, got %.9Lg", Type<C>::name, o, long(steps), long(batch), long(units),
          expected, along);
  }
}

// Any number of threads, and threads that come after one another, give the same bits.
template <typename C>
void threads(int64_t steps, int64_t batch) {
  Call<C> one(steps, batch, 200, true, false);
  one.run(1);
  for (const int64_t count : {0, 2, 3, 4}) {
    Call<C> other(steps, batch, 200, true, false);
    other.run(count);
    const auto a = one.outputs(), b = other.outputs();
    for (size_t i = 0; i < a.size(); i++)
      CHECK(a[i]->equals(*b[i]), "%s: output %ld of %ld threads differs", Type<C>::name, long(i), long(count));
  }
}

template <typename C>
void all() {
  for (const int64_t units : {2, 3, 15, 16, 17, 33, 64, 65, 130}) values<C>(3, 3, units, true, false);
  for (const int64_t batch : {1, 2, 4, 5, 18}) values<C>(2, batch, 20, batch % 2, false);
  for (const int64_t batch : {1, 2, 3}) values<C>(1, batch, 70, batch != 2, true);
  values<C>(7, 21, 33, false, false), values<C>(8, 17, 70, true, false);  // hidden_weight is packed
  threads<C>(5, 3), threads<C>(6, 23);
}

}  // namespace

TEST_CASE("layer_norm_lstm") {
  all<float>();
  all<double>();
}

}  // namespace fastasr::test
