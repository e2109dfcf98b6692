// SPDX-License-Identifier: Apache-2.0
// The complex EMA scan's CUDA kernels on the CPU (cuda_emulation.h): memory, barriers, agreement of float with double.
// Their values are compared with the definition's by tests/kernels/test_cuda_contract.py.
#include "cuda/complex_ema_scan_launchers.h"
#include "tests/check.h"
#include "tests/ema_case.h"

namespace fastasr::test {
namespace {

template <typename C>
struct Case : ComplexEmaCase<C> {
  using ComplexEmaCase<C>::ComplexEmaCase;

  void run(Order order = Order::kAscending) {
    Emulator::get().order = order;
    const EmaOptions& o = this->o;
    INFO(o.text());
    FastasrEmaScan s{sizeof(C) == 8 ? kFastasrDouble : kFastasrFloat,
                     o.length,
                     o.batch,
                     o.channels,
                     o.states,
                     o.truncation,
                     o.direction,
                     o.activation,
                     this->x.template view<FastasrSequence>(),
                     this->alpha,
                     this->delta,
                     this->theta,
                     this->gamma,
                     this->residual,
                     this->if_state(this->state),
                     this->mask_or_null(),
                     nullptr};
    Buffer<unsigned char> workspace(fastasr_cuda_complex_ema_scan_forward_workspace(&s));
    s.workspace = workspace;
    CHECK(fastasr_cuda_complex_ema_scan_forward(&s, this->y.template view<FastasrSequence>(),
                                                this->if_state(this->final_state), nullptr) == 0);
    FastasrEmaScanGrads g{this->grad.template view<FastasrSequence>(),
                          this->if_state(this->grad_state),
                          this->dx.template view<FastasrSequence>(),
                          this->dalpha,
                          this->ddelta,
                          this->dtheta,
                          this->dgamma,
                          this->dresidual,
                          this->if_state(this->dstate)};
    Buffer<unsigned char> second(fastasr_cuda_complex_ema_scan_backward_workspace(&s, &g));
    s.workspace = second;
    CHECK(fastasr_cuda_complex_ema_scan_backward(&s, &g, nullptr) == 0);
    Emulator::get().order = Order::kAscending;
  }
};

// Tiles have 256 steps forward and 128 backward (64 and 32 in double).
std::vector<EmaOptions> configs() {
  std::vector<EmaOptions> all;
  for (const int64_t states : {1, 2, 5})
    for (const int direction : {0, 1, 2}) {
      all.push_back({300, 1, 3, states, 0, direction, 1, states == 2 ? kBdl : kLbd, direction != 2, true});
      all.push_back({150, 2, 3, states, 20, direction, 0, states != 2 ? kBdl : kLbd, false, true});
    }
  all.push_back({0, 2, 3, 4, 0, kForward, kIdentity, kLbd, true});
  all.push_back({1, 2, 33, 4, 0, kReverse, kSilu, kLbd, true});
  all.push_back({20, 0, 3, 4});
  all.push_back({20, 2, 0, 4});
  all.push_back({600, 128, 1, 2, 0, kForward, kIdentity, kLbd, true});  // one segment of several tiles
  // backward: segments of one tile, for lack of shared memory
  all.push_back({270, 1, 2, 64, 0, kForward, kSilu, kLbd, true});
  return all;
}

TEST_CASE("cuda_complex_bodies: float_and_double") {
  for (const EmaOptions& o : configs()) {
    INFO(o.text());
    Case<float> narrow(o);
    Case<double> wide(o);
    narrow.run(), wide.run();
    narrow.each_result(wide, [](const char* name, Buffer<float>& got, Buffer<double>& want) {
      double error = 0, size = 1e-3;
      for (int64_t i = 0; i < got.size(); i++) {
        const double e = std::fabs(got[i] - want[i]);
        error = e > error || e != e ? e : error, size = std::max(size, std::fabs(want[i]));
      }
      CHECK(error <= 4e-6 * size, "%s: relative error %.3g", name, error / size);
    });
  }
}

// Threads run in any order between barriers and give the same bits.
template <typename C>
void orders() {
  for (const EmaOptions& o : configs()) {
    if (o.batch > 2) continue;
    Case<C> first(o);
    first.run();
    for (const Order order : {Order::kDescending, Order::kShuffled}) {
      Case<C> again(o);
      again.run(order);
      first.each_result(again, [&](const char* name, auto& a, auto& b) {
        CHECK(a.equals(b), "%s: %s: another order of threads gives another result", o.text().c_str(), name);
      });
    }
  }
}

TEST_CASE("cuda_complex_bodies: orders") { orders<float>(), orders<double>(); }

}  // namespace
}  // namespace fastasr::test
