// SPDX-License-Identifier: Apache-2.0
#include "cpu/ema/ema_scan.h"

#include "tests/check.h"
#include "tests/ema_case.h"
#include "tests/parallel.h"

namespace fastasr::test {
namespace {

template <typename T>
struct Case : EmaCase<T> {
  using C = compute_t<T>;
  explicit Case(const EmaOptions& o) : EmaCase<T>(o, EmaCase<T>::seed_of(o), false) {}

  cpu::EmaShape shape() {
    const EmaOptions& o = this->o;
    return {o.length,
            o.batch,
            o.channels,
            o.states,
            o.truncation,
            cpu::EmaDirection(o.direction),
            cpu::EmaActivation(o.activation)};
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
    cpu::kernels<cpu::EmaForward<T>>().real(shape(), arguments(), x.data, strides(x), y.data, strides(y),
                                            this->if_state(this->final_state), parallel);
    cpu::kernels<cpu::EmaBackward<T>>().real(shape(), arguments(), x.data, strides(x), grad.data, strides(grad),
                                             this->if_state(this->grad_state), dx.data, strides(dx),
                                             {this->ddamping, this->ddecay, this->dexpansion, this->dprojection,
                                              this->if_residual(this->dresidual), this->if_state(this->dstate)},
                                             parallel);
  }
  void compare() {
    const long double loose = sizeof(C) == 8 ? 4096 : 128;
    each_result(*this, [&](const char* name, auto got, const Sum& expected, int64_t i) {
      expect(name, got, i, expected.value, loose * expected.size);
    });
  }
};

template <typename T>
void values(const EmaOptions& o) {
  INFO(Type<T>::name, " ", o.text());
  Case<T> c(o), again(o);
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
  cpu::kernels<cpu::EmaStep<T>>().run(other.shape(), other.arguments(), other.x.data, other.strides(other.x),
                                      other.y.data, other.strides(other.y), other.if_state(other.final_state));
  std::swap(c.y, other.y);
  if (o.state) std::swap(c.final_state, other.final_state);
  c.compare();
}

}  // namespace

TEST_CASE("ema_scan") {
  for_each_type([]<typename T>() {
    values<T>({37, 2, 5, 4});
    values<T>({70, 3, 65, 1, 0, kForward, kSilu, kBld});
    values<T>({33, 2, 64, 5, 0, kReverse, kGelu, kBdl, true, true});
    values<T>({40, 1, 17, 4, 0, kForward, kTanh, kLbd, true});
    values<T>({65, 2, 20, 6, 0, kBidirectional, kRelu, kLbd, false, true});
    values<T>({64, 1, 15, 3, 0, kBidirectional, kIdentity, kBdl, false, true});
    values<T>({100, 2, 18, 4, 7, kForward, kSilu, kLbd, false, true});
    values<T>({150, 1, 7, 2, 40, kReverse, kIdentity, kBld});
    values<T>({90, 2, 9, 3, 64, kBidirectional, kGelu, kBdl});
    values<T>({20, 2, 3, 2, 1, kForward, kIdentity, kLbd, false, false, false});
    values<T>({9, 1, 3, 64, 0, kForward, kSilu, kLbd, true, false, false});
    values<T>({1, 2, 3, 4, 0, kBidirectional, kSilu});
    for (const EmaOptions& empty : {EmaOptions{0, 2, 3, 4, 0, kForward, kSilu, kLbd, true}, EmaOptions{5, 0, 3, 4},
                                    EmaOptions{5, 2, 0, 4, 0, kBidirectional}})
      values<T>(empty);
    for (const int64_t states : {1, 3, 4, 16}) {
      step<T>({1, 3, 70, states, 0, kForward, kSilu, kLbd, true, false});
      step<T>({1, 2, 7, states, 0, kReverse, kIdentity, kBdl, true, true});
      step<T>({1, 1, 65, states, 0, kForward, kGelu, kBld, false, false, false});
    }
  });
  // long and narrow: cut in time
  values<float>({4500, 1, 3, 2, 0, kForward, kSilu, kLbd, true});
  values<float>({4500, 1, 2, 4, 0, kBidirectional, kGelu, kLbd, false, true});
  values<double>({4501, 1, 2, 3, 0, kReverse, kIdentity, kBdl, true, true});
  values<double>({4200, 1, 1, 2, 300, kBidirectional, kSilu, kBld});
}

}  // namespace fastasr::test
