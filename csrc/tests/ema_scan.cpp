// SPDX-License-Identifier: Apache-2.0
#include "tests/ema_case.h"

namespace fastasr::test {
namespace {

// Three threads take the tasks one by one, from the last to the first.
const cpu::Parallel kScattered = [](int64_t tasks, int64_t, const std::function<void(int64_t, int64_t)>& f) {
  constexpr int64_t kThreads = 3;
  on_threads(kThreads, [&](int64_t thread) {
    for (int64_t i = tasks; i-- > 0;)
      if (i % kThreads == thread) f(i, i + 1);
  });
};

template <typename T, bool complex>
void values(const EmaOptions& o) {
  INFO(Type<T>::name, complex ? " complex " : " ", o.text());
  const uint64_t seed = CpuEma<T>::seed_of(o);
  CpuEma<T, complex> c(o, seed, false, rounded<T>), again(o, seed, false, rounded<T>);
  CpuEma<double, complex> exact(o, seed, false, rounded<T>);
  c.run(), again.run(kScattered), exact.run();
  expect_like<T>(c.outputs(), exact.outputs(), 200);
  CHECK(same_outputs(c.outputs(), again.outputs()), "the split of the tasks changes the result");
}

// Compares the path of one step with the general one, in double.
template <typename T>
void step(const EmaOptions& o) {
  INFO(Type<T>::name, " step ", o.text());
  const uint64_t seed = CpuEma<T>::seed_of(o);
  CpuEma<T> c(o, seed, false, rounded<T>);
  CpuEma<double> exact(o, seed, false, rounded<T>);
  exact.run();
  cpu::kernels<cpu::EmaTensor<T>>().one_step(c.shape(), c.arguments(), c.x.data, c.strides(c.x), c.y.data,
                                             c.strides(c.y), c.if_state(c.final_state));
  expect_like<T>(std::tie(c.y.data, c.final_state), std::tie(exact.y.data, exact.final_state), 200);
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
