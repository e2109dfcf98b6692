// SPDX-License-Identifier: Apache-2.0
// The complex EMA scan's CUDA kernels on the CPU (cuda_emulation.h): memory, barriers, agreement of float with double.
// Their values are compared with the definition's by tests/kernels/test_cuda_contract.py.
#include <string>

#include "cuda/complex_ema_scan_launchers.h"
#include "tests/check.h"

namespace fastasr::test {
namespace {

struct Config {
  int64_t length, batch, channels, states;
  int direction = 0, activation = 0;
  bool along_time = false, state = false, mask = false;
  int64_t truncation = 0;
  Order order = Order::kAscending;

  std::string name() const {
    return "L" + std::to_string(length) + " B" + std::to_string(batch) + " D" + std::to_string(channels) + " N" +
           std::to_string(states) + " direction " + std::to_string(direction) + " K" + std::to_string(truncation);
  }
  int64_t rows() const { return channels * (direction == 2 ? 2 : 1); }
};

// Numbers are drawn in float, so that float and double get the same.
template <typename C>
struct Case {
  Config c;
  Buffer<C> x, grad, alpha, delta, theta, gamma, residual, state, grad_state;
  Buffer<C> y, final_state, dx, dalpha, ddelta, dtheta, dgamma, dresidual, dstate;
  Buffer<unsigned char> mask;

  explicit Case(const Config& config)
      : c(config),
        x(elements()),
        grad(elements()),
        alpha(c.rows() * c.states),
        delta(c.rows() * c.states),
        theta(c.rows()),
        gamma(2 * c.rows() * c.states),
        residual(c.channels),
        state(2 * c.batch * c.channels * c.states),
        grad_state(state.size()),
        y(elements()),
        final_state(state.size()),
        dx(elements()),
        dalpha(alpha.size()),
        ddelta(alpha.size()),
        dtheta(theta.size()),
        dgamma(gamma.size()),
        dresidual(c.channels),
        dstate(state.size()),
        mask(c.batch * c.length) {
    Random random(7);
    for (Buffer<C>* b : {&x, &grad, &alpha, &delta, &theta, &gamma, &residual, &state, &grad_state})
      for (int64_t i = 0; i < b->size(); i++) (*b)[i] = static_cast<C>(static_cast<float>(2 * random.uniform() - 1));
    for (int64_t i = 0; i < mask.size(); i++) mask[i] = random.uniform() < 0.3;
  }
  int64_t elements() const { return c.length * c.batch * c.channels; }
  FastasrSequence view(Buffer<C>& b) const {
    if (c.along_time) return {b.data(), 1, c.channels * c.length, c.length};
    return {b.data(), c.batch * c.channels, c.channels, 1};
  }

  void run() {
    Emulator::get().order = c.order;
    FastasrEmaScan s{sizeof(C) == 8 ? kFastasrDouble : kFastasrFloat,
                     c.length,
                     c.batch,
                     c.channels,
                     c.states,
                     c.truncation,
                     c.direction,
                     c.activation,
                     view(x),
                     alpha.data(),
                     delta.data(),
                     theta.data(),
                     gamma.data(),
                     residual.data(),
                     c.state ? state.data() : nullptr,
                     c.mask ? mask.data() : nullptr,
                     nullptr};
    Buffer<unsigned char> workspace(fastasr_cuda_complex_ema_scan_forward_workspace(&s));
    s.workspace = workspace.data();
    CHECK(fastasr_cuda_complex_ema_scan_forward(&s, view(y), c.state ? final_state.data() : nullptr, nullptr) == 0,
          "-");
    FastasrEmaScanGrads g{view(grad),
                          c.state ? grad_state.data() : nullptr,
                          view(dx),
                          dalpha.data(),
                          ddelta.data(),
                          dtheta.data(),
                          dgamma.data(),
                          dresidual.data(),
                          c.state ? dstate.data() : nullptr};
    Buffer<unsigned char> second(fastasr_cuda_complex_ema_scan_backward_workspace(&s, &g));
    s.workspace = second.data();
    CHECK(fastasr_cuda_complex_ema_scan_backward(&s, &g, nullptr) == 0, "-");
    bool intact = workspace.intact() && second.intact();
    for (const auto& [name, b] : results()) intact = intact && b->intact();
    CHECK(intact, "%s wrote outside", c.name().c_str());
    Emulator::get().order = Order::kAscending;
  }

  std::vector<std::pair<const char*, Buffer<C>*>> results() {
    std::vector<std::pair<const char*, Buffer<C>*>> all{
        {"y", &y},           {"dx", &dx},         {"dalpha", &dalpha},      {"ddelta", &ddelta},
        {"dtheta", &dtheta}, {"dgamma", &dgamma}, {"dresidual", &dresidual}};
    if (c.state) all.push_back({"final state", &final_state}), all.push_back({"dstate", &dstate});
    return all;
  }
};

// Tiles have 256 steps forward and 128 backward (64 and 32 in double).
std::vector<Config> configs() {
  std::vector<Config> all;
  for (const int64_t states : {1, 2, 5})
    for (const int direction : {0, 1, 2}) {
      all.push_back({300, 1, 3, states, direction, 1, states == 2, direction != 2, true});
      all.push_back({150, 2, 3, states, direction, 0, states != 2, false, true, 20});
    }
  all.push_back({0, 2, 3, 4, 0, 0, false, true});
  all.push_back({1, 2, 33, 4, 1, 1, false, true});
  all.push_back({20, 0, 3, 4});
  all.push_back({20, 2, 0, 4});
  all.push_back({600, 128, 1, 2, 0, 0, false, true});  // one segment of several tiles
  all.push_back({270, 1, 2, 64, 0, 1, false, true});   // backward: segments of one tile, for lack of shared memory
  return all;
}

TEST_CASE("cuda_complex_bodies: float_and_double") {
  for (const Config& c : configs()) {
    Case<float> narrow(c);
    Case<double> wide(c);
    narrow.run(), wide.run();
    const auto expected = wide.results();
    size_t k = 0;
    for (const auto& [name, got] : narrow.results()) {
      double error = 0, size = 1e-3;
      Buffer<double>& want = *expected[k++].second;
      for (int64_t i = 0; i < got->size(); i++) {
        const double e = std::fabs(static_cast<double>((*got)[i]) - want[i]);
        error = e > error || e != e ? e : error, size = std::max(size, std::fabs(want[i]));
      }
      CHECK(error <= 4e-6 * size, "%s: %s: relative error %.3g", c.name().c_str(), name, error / size);
    }
  }
}

// Threads run in any order between barriers and give the same bits.
template <typename C>
void orders() {
  for (const Config& c : configs()) {
    if (c.batch > 2) continue;
    Case<C> first(c);
    first.run();
    for (const Order order : {Order::kDescending, Order::kShuffled}) {
      Config other = c;
      other.order = order;
      Case<C> again(other);
      again.run();
      const auto expected = again.results();
      size_t k = 0;
      for (const auto& [name, got] : first.results())
        CHECK(got->equals(*expected[k++].second), "%s: %s: another order of threads gives another result",
              c.name().c_str(), name);
    }
  }
}

TEST_CASE("cuda_complex_bodies: orders") { orders<float>(), orders<double>(); }

}  // namespace
}  // namespace fastasr::test
