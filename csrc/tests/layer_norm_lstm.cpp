// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/layer_norm_lstm.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

constexpr double kEps = 1e-3;

// Computes n = (z - mean) / deviation, y = n weight + bias, in place.
void norm(long double* z, int64_t n, const Reals& weight, const Reals& bias) {
  long double mean = 0, variance = 0;
  for (int64_t j = 0; j < n; j++) mean += z[j] / n;
  for (int64_t j = 0; j < n; j++) variance += (z[j] - mean) * (z[j] - mean) / n;
  for (int64_t j = 0; j < n; j++) z[j] = (z[j] - mean) / std::sqrt(variance + kEps) * weight[j] + bias[j];
}

enum Operand { kGates, kHiddenWeight, kGateWeight, kGateBias, kCellWeight, kCellBias, kHidden, kCell, kOperands };

// Holds a call's operands and the gradients given to it, in any precision.
struct Reference {
  int64_t steps, batch, hidden;
  Reals operand[kOperands], y, last_cell;

  // Computes the formula, from the product of the input on.
  void run() {
    const int64_t units = hidden;
    y.assign(size_t(steps * batch * units), 0), last_cell = operand[kCell];
    Reals h = operand[kHidden], z(size_t(4 * units));
    for (int64_t t = 0; t < steps; t++) {
      Reals next(h.size());
      for (int64_t b = 0; b < batch; b++) {
        for (int64_t r = 0; r < 4 * units; r++) {
          z[r] = operand[kGates][(t * batch + b) * 4 * units + r];
          for (int64_t k = 0; k < units; k++) z[r] += operand[kHiddenWeight][r * units + k] * h[b * units + k];
        }
        norm(z.data(), 4 * units, operand[kGateWeight], operand[kGateBias]);
        long double* c = &last_cell[b * units];
        for (int64_t j = 0; j < units; j++)
          c[j] = logistic(z[units + j]) * c[j] + logistic(z[j]) * std::tanh(z[2 * units + j]);
        norm(c, units, operand[kCellWeight], operand[kCellBias]);
        for (int64_t j = 0; j < units; j++)
          y[(t * batch + b) * units + j] = next[b * units + j] = logistic(z[3 * units + j]) * std::tanh(c[j]);
      }
      h = next;
    }
  }
};

template <typename C>
struct Call {
  int64_t steps, batch, units;
  bool states, step;
  int64_t frames = steps * batch, n = batch * units;
  cpu::LstmSizes size{steps, batch, units, step ? 11 : 0};
  Random random{static_cast<uint64_t>(steps * 7919 + batch * 131 + units)};
  Buffer<C> x{frames * 11, 0, random}, gates{frames * 4 * units, 0, random}, hidden{n, 0, random}, cell{n, 0, random},
      grad_y{frames * units, 0, random}, grad_hidden{n, 0, random}, grad_cell{n, 0, random};
  Buffer<C> gate_weight{4 * units, 0, random, 0.3, 1}, cell_weight{units, 0, random, 0.3, 1},
      gate_bias{4 * units, 0, random, 0.3}, cell_bias{units, 0, random, 0.3},
      input_weight{4 * units * 11, 0, random, 0.3},
      hidden_weight{4 * units * units, 0, random, 1 / std::sqrt(static_cast<double>(units))};
  Buffer<C> y{frames * units}, last_cell{n}, kept{size.kept()}, dgates{gates.size()}, dgate_weight{4 * units},
      dgate_bias{4 * units}, dcell_weight{units}, dcell_bias{units}, dhidden{n}, dcell{n};

  Call(int64_t steps_, int64_t batch_, int64_t units_, bool with_states, bool with_input)
      : steps(steps_), batch(batch_), units(units_), states(with_states), step(with_input) {
    if (!states) hidden.set(0), cell.set(0);
    if (step)  // the kernel computes these itself
      for (int64_t i = 0; i < steps * batch; i++)
        for (int64_t r = 0; r < 4 * units; r++) {
          C sum = 0;
          for (int64_t k = 0; k < 11; k++) sum += x[i * 11 + k] * input_weight[r * 11 + k];
          gates[i * 4 * units + r] = sum;
        }
  }

  // Runs f(barrier, begin, end) by `threads` threads; 0 stands for two owners one after the other, in this thread.
  template <typename F>
  void by_threads(int64_t threads, const F& f) {
    cpu::PhaseBarrier barrier(size.units());
    const int64_t all = size.units();
    if (threads == 0) {
      f(barrier, int64_t{0}, all / 2);
      f(barrier, all / 2, all);
      return;
    }
    test::on_threads(threads, [&](int64_t i) { f(barrier, all * i / threads, all * (i + 1) / threads); });
  }

  void run(int64_t threads) {
    const auto& kernel = cpu::kernels<cpu::LayerNormLstmKernels<C>>();
    cpu::LayerNormLstm<C> p{};
    p.size = size;
    p.input = step ? x : gates, p.input_weight = step ? input_weight.data() : nullptr;
    p.hidden_weight = hidden_weight;
    p.gate_weight = gate_weight, p.gate_bias = gate_bias;
    p.cell_weight = cell_weight, p.cell_bias = cell_bias;
    p.hidden = states ? hidden.data() : nullptr, p.cell = states ? cell.data() : nullptr;
    p.eps = kEps;
    Buffer<C> scratch(cpu::lstm_forward_scratch(size)), more(cpu::lstm_backward_scratch(size));
    by_threads(threads, [&](cpu::PhaseBarrier& barrier, int64_t begin, int64_t end) {
      kernel.forward(p, y, last_cell, kept, scratch, barrier, begin, end);
    });
    std::copy_n(grad_hidden.data(), n, dhidden.data());
    std::copy_n(grad_cell.data(), n, dcell.data());
    std::vector<double> sums(static_cast<size_t>(10 * size.hidden));
    const cpu::LayerNormLstmGradients<C> grad{grad_y,     dhidden,      dcell,      dgates, dgate_weight,
                                              dgate_bias, dcell_weight, dcell_bias, true};
    by_threads(threads, [&](cpu::PhaseBarrier& barrier, int64_t begin, int64_t end) {
      kernel.backward(p, kept, grad, sums.data(), more, barrier, begin, end);
    });
  }

  std::vector<Buffer<C>*> outputs() {
    return {&y, &last_cell, &kept, &dgates, &dgate_weight, &dgate_bias, &dcell_weight, &dcell_bias, &dhidden, &dcell};
  }
};

template <typename C>
Reals wide(Buffer<C>& b) {
  Reals row(static_cast<size_t>(b.size()));
  for (int64_t i = 0; i < b.size(); i++) row[i] = value(b[i]);
  return row;
}

// Compares values with the formula, and gradients with its differences along a direction, one operand after the other.
template <typename C>
void values(int64_t steps, int64_t batch, int64_t units, bool states, bool with_input) {
  INFO(Type<C>::name, " ", steps, "x", batch, "x", units);
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
  for (int64_t i = 0; i < call.y.size(); i++) EXPECT_WITHIN(call.y, i, reference.y[i], room);
  for (int64_t i = 0; i < call.n; i++) EXPECT_WITHIN(call.last_cell, i, reference.last_cell[i], 4 * room);

  const Reals gy = wide(call.grad_y), gh = wide(call.grad_hidden), gc = wide(call.grad_cell);
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
          "gradient %d: expected %.9Lg, got %.9Lg", o, expected, along);
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
