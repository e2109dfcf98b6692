// SPDX-License-Identifier: Apache-2.0
#include "cpu/ema/ema_scan.h"

#include "tests/check.h"
#include "tests/ema_case.h"

namespace fastasr::test {
namespace {

const cpu::Parallel kSerial = [](int64_t tasks, int64_t, const std::function<void(int64_t, int64_t)>& f) {
  if (tasks > 0) f(0, tasks);
};
// Three threads take the tasks one by one, from the last to the first.
const cpu::Parallel kScattered = [](int64_t tasks, int64_t, const std::function<void(int64_t, int64_t)>& f) {
  constexpr int64_t kThreads = 3;
  on_threads(kThreads, [&](int64_t thread) {
    for (int64_t i = tasks; i-- > 0;)
      if (i % kThreads == thread) f(i, i + 1);
  });
};

template <typename T, bool complex = false>
struct Case : EmaCase<T, complex> {
  using C = compute_t<T>;
  using Base = EmaCase<T, complex>;
  explicit Case(const EmaOptions& o) : Base(o, Base::seed_of(o), false) {}

  cpu::EmaShape shape() {
    const EmaOptions& o = this->o;
    return {o.length,
            o.batch,
            o.channels,
            o.states,
            o.truncation,
            cpu::EmaDirection(o.direction),
            cpu::EmaActivation(o.activation),
            complex};
  }
  cpu::EmaStrides strides(Sequence<T>& s) { return {s.time, s.batch, s.channel}; }
  cpu::EmaParameters<C> arguments() {
    return {this->damping,
            this->decay,
            this->expansion,
            this->projection,
            this->if_residual(this->residual),
            this->if_state(this->state),
            this->mask_or_null()};
  }
  void run(const cpu::Parallel& parallel) {
    auto &x = this->x, &y = this->y, &grad = this->grad, &dx = this->dx;
    cpu::kernels<cpu::EmaScanKernels<T>>().forward(shape(), arguments(), x.data, strides(x), y.data, strides(y),
                                                   this->if_state(this->final_state), parallel);
    cpu::kernels<cpu::EmaScanKernels<T>>().backward(shape(), arguments(), x.data, strides(x), grad.data, strides(grad),
                                                    this->if_state(this->grad_state), dx.data, strides(dx),
                                                    {this->ddamping, this->ddecay, this->dexpansion, this->dprojection,
                                                     this->if_residual(this->dresidual), this->if_state(this->dstate)},
                                                    parallel);
  }
  void compare() {
    const long double loose = (sizeof(C) == 8 ? 4096 : 128) * (complex ? 2 : 1);
    each_result(*this, [&](const char* name, auto got, const Sum& expected, int64_t i) {
      expect(name, got, i, expected.value, loose * expected.size);
    });
  }
};

template <typename T, bool complex>
void values(const EmaOptions& o) {
  INFO(Type<T>::name, complex ? " complex " : " ", o.text());
  Case<T, complex> c(o), again(o);
  c.run(kSerial);
  c.compare();
  again.run(kScattered);
  CHECK(c.same_results(again), "the split of the tasks changes the result");
}

// Compares the path of one step with the general one.
template <typename T>
void step(EmaOptions o) {
  o.length = 1;
  INFO(Type<T>::name, " step ", o.text());
  Case<T> c(o), other(o);
  c.run(kSerial);
  cpu::kernels<cpu::EmaTensor<T>>().one_step(other.shape(), other.arguments(), other.x.data, other.strides(other.x),
                                             other.y.data, other.strides(other.y), other.if_state(other.final_state));
  std::swap(c.y, other.y);
  if (o.state) std::swap(c.final_state, other.final_state);
  c.compare();
}

template <bool complex>
void scans() {
  for_each_type([]<typename T>() {
    values<T, complex>({37, 2, 5, 4});
    values<T, complex>({70, 3, 65, 1, 0, kForward, kSilu, kBld});
    values<T, complex>({33, 2, 64, 5, 0, kReverse, kGelu, kBdl, true, true});
    values<T, complex>({40, 1, 17, 4, 0, kForward, kTanh, kLbd, true});
    values<T, complex>({65, 2, 20, 6, 0, kBidirectional, kRelu, kLbd, false, true});
    values<T, complex>({64, 1, 15, 3, 0, kBidirectional, kIdentity, kBdl, false, true});
    values<T, complex>({100, 2, 18, 4, 7, kForward, kSilu, kLbd, false, true});
    values<T, complex>({150, 1, 7, 2, 40, kReverse, kIdentity, kBld});
    values<T, complex>({90, 2, 9, 3, 64, kBidirectional, kGelu, kBdl});
    values<T, complex>({20, 2, 3, 2, 1, kForward, kIdentity, kLbd, false, false, false});
    values<T, complex>({9, 1, 3, 64, 0, kForward, kSilu, kLbd, true, false, false});
    values<T, complex>({1, 2, 3, 4, 0, kBidirectional, kSilu});
    values<T, complex>({1, 2, 3, 4, 0, kForward, kIdentity, kLbd, true});
    for (const EmaOptions& empty : {EmaOptions{0, 2, 3, 4, 0, kForward, kSilu, kLbd, true}, EmaOptions{5, 0, 3, 4},
                                    EmaOptions{5, 2, 0, 4, 0, kBidirectional}})
      values<T, complex>(empty);
  });
  // long and narrow: cut in time
  values<float, complex>({4500, 1, 3, 2, 0, kForward, kSilu, kLbd, true});
  values<float, complex>({4500, 1, 2, 4, 0, kBidirectional, kGelu, kLbd, false, true});
  values<double, complex>({4501, 1, 2, 3, 0, kReverse, kIdentity, kBdl, true, true});
  values<double, complex>({4200, 1, 1, 2, 300, kBidirectional, kSilu, kBld});
}

}  // namespace

TEST_CASE("ema_scan") { scans<false>(); }
TEST_CASE("complex_ema_scan") { scans<true>(); }

TEST_CASE("ema_scan: one step") {
  for_each_type([]<typename T>() {
    for (const int64_t states : {1, 3, 4, 16}) {
      step<T>({1, 3, 70, states, 0, kForward, kSilu, kLbd, true, false});
      step<T>({1, 2, 7, states, 0, kReverse, kIdentity, kBdl, true, true});
      step<T>({1, 1, 65, states, 0, kForward, kGelu, kBld, false, false, false});
    }
  });
}

}  // namespace fastasr::test
