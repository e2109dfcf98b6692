// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/layer_norm_lstm.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

template <typename C>
struct Call {
  int64_t steps, batch, units;
  bool states, step;
  Rounding rounding = nullptr;
  int64_t frames = steps * batch, n = batch * units;
  cpu::LstmSizes size{steps, batch, units, step ? 11 : 0};
  Random random{static_cast<uint64_t>(steps * 7919 + batch * 131 + units), rounding};
  Buffer<C> x{frames * 11, 0, random}, gates{frames * 4 * units, 0, random}, hidden{n, 0, random}, cell{n, 0, random},
      grad_y{frames * units, 0, random}, grad_hidden{n, 0, random}, grad_cell{n, 0, random};
  Buffer<C> gate_weight{4 * units, 0, random, 0.3, 1}, cell_weight{units, 0, random, 0.3, 1},
      gate_bias{4 * units, 0, random, 0.3}, cell_bias{units, 0, random, 0.3},
      input_weight{4 * units * 11, 0, random, 0.3},
      hidden_weight{4 * units * units, 0, random, 1 / std::sqrt(static_cast<double>(units))};
  Buffer<C> y{frames * units}, last_cell{n}, kept{size.kept()}, dgates{gates.size()}, dgate_weight{4 * units},
      dgate_bias{4 * units}, dcell_weight{units}, dcell_bias{units}, dhidden{n}, dcell{n};

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
    p.eps = 1e-3;
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

  auto outputs() {
    return std::tie(y, last_cell, dgates, dgate_weight, dgate_bias, dcell_weight, dcell_bias, dhidden, dcell);
  }
};

void values(int64_t steps, int64_t batch, int64_t units, bool states, bool with_input) {
  INFO(steps, "x", batch, "x", units);
  Call<float> call{steps, batch, units, states, with_input, rounded<float>};
  Call<double> exact{steps, batch, units, states, with_input, rounded<float>};
  call.run(1), exact.run(1);
  expect_like<float>(call.outputs(), exact.outputs(), 100);
}

// Any number of threads, and threads that come after one another, give the same bits.
template <typename C>
void threads(int64_t steps, int64_t batch) {
  Call<C> one{steps, batch, 200, true, false};
  one.run(1);
  for (const int64_t count : {0, 2, 3, 4}) {
    Call<C> other{steps, batch, 200, true, false};
    other.run(count);
    CHECK(same_outputs(one.outputs(), other.outputs()) && one.kept.equals(other.kept), "%s: %ld threads", Type<C>::name,
          long(count));
  }
}

}  // namespace

TEST_CASE("layer_norm_lstm") {
  for (const int64_t units : {2, 3, 15, 16, 17, 33, 64, 65, 130}) values(3, 3, units, true, false);
  for (const int64_t batch : {1, 2, 4, 5, 18}) values(2, batch, 20, batch % 2, false);
  for (const int64_t batch : {1, 2, 3, 10, 31}) values(1, batch, 70, batch != 2, true);
  values(7, 21, 33, false, false), values(8, 17, 70, true, false);  // hidden_weight is packed
  threads<float>(5, 3), threads<float>(6, 23);
  threads<double>(5, 3), threads<double>(6, 23);
}

}  // namespace fastasr::test
