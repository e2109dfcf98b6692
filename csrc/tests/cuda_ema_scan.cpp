// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' bodies and launches on the CPU (cuda_emulation.h), against the CPU's own kernels in double.
#include "cuda/ema_scan.cu"
#include "tests/ema_case.h"

namespace fastasr::test {
namespace {

template <typename T>
constexpr int dtype_of() {
  if (std::is_same_v<T, double>) return kFastasrDouble;
  if (std::is_same_v<T, bfloat16>) return kFastasrBfloat16;
  return std::is_same_v<T, float16> ? kFastasrHalf : kFastasrFloat;
}

template <typename T, bool complex = false>
struct Case : EmaCase<T, complex> {
  using C = compute_t<T>;
  using Base = EmaCase<T, complex>;
  Case(const EmaOptions& o, uint64_t seed) : Base(o, seed, true, rounded<T>) {}

  FastasrSequence view(Sequence<T>& s) { return s.template view<FastasrSequence>(); }
  FastasrEmaScan scan() {
    const EmaOptions& o = this->o;
    return {dtype_of<T>(),
            complex,
            o.length,
            o.batch,
            o.channels,
            o.states,
            o.truncation,
            o.direction,
            o.activation,
            view(this->x),
            this->damping,
            this->decay,
            this->expansion,
            this->projection,
            this->if_residual(this->residual),
            this->if_state(this->state),
            this->mask_or_null(),
            nullptr};
  }
  FastasrEmaScanGrads grads() {
    return {view(this->grad),
            this->if_state(this->grad_state),
            view(this->dx),
            this->ddamping,
            this->ddecay,
            this->dexpansion,
            this->dprojection,
            this->if_residual(this->dresidual),
            this->if_state(this->dstate)};
  }

  void run(Order order = Order::kAscending) {
    INFO(this->o.text());
    Emulator::get().order = order;
    FastasrEmaScan s = scan();
    Buffer<unsigned char> workspace(fastasr_cuda_ema_scan_forward_workspace(&s));
    s.workspace = workspace;
    CHECK(fastasr_cuda_ema_scan_forward(&s, view(this->y), this->if_state(this->final_state), nullptr) == 0);
    FastasrEmaScanGrads g = grads();
    Buffer<unsigned char> second(fastasr_cuda_ema_scan_backward_workspace(&s, &g));
    s.workspace = second;
    CHECK(fastasr_cuda_ema_scan_backward(&s, &g, nullptr) == 0);
    Emulator::get().order = Order::kAscending;
  }
};

// slack: a factor on the tolerances.
template <typename T, bool complex = false>
void one(const EmaOptions& o, double slack = 1) {
  INFO(Type<T>::name, " ", o.text());
  const uint64_t seed = Case<T>::seed_of(o);
  Case<T, complex> a(o, seed);
  CpuEma<double, complex> exact(o, seed, true, rounded<T>);
  a.run(), exact.run();
  expect_like<T>(a.outputs(), exact.outputs(), slack * 200);
}

// Tiles have 256 steps forward and 128 backward (64 and 32 in double); up to two tiles are one segment.
TEST_CASE("cuda_ema_scan: shapes") {
  for (const int64_t length : {0, 1, 2, 31, 32, 33, 128, 256, 257, 300})
    for (const int64_t channels : {1, 33}) one<float>({length, 2, channels, 4});
  for (const int64_t length : {0, 1, 7, 63, 65, 150})
    for (const int64_t channels : {2, 32}) one<double>({length, 1, channels, 4, 0, 0, 1});
  one<float>({20, 0, 5, 4});
  one<float>({20, 2, 0, 4});
}

TEST_CASE("cuda_ema_scan: layouts") {
  for (const Layout layout : {kLbd, kBld, kBdl, kPadded}) {
    one<float>({75, 2, 35, 4, 0, 0, 1, layout, true, true});
    one<bfloat16>({140, 1, 34, 4, 0, 1, 4, layout, false, true});
    one<float16>({70, 2, 31, 4, 0, 2, 3, layout, false, true, false});
    one<double>({70, 2, 33, 4, 0, 0, 2, layout, true, true});
  }
}

TEST_CASE("cuda_ema_scan: groups") {
  for (const int64_t states : {1, 2, 3, 4, 5, 8, 16, 64})
    for (const int direction : {0, 1, 2}) {
      const bool state = direction != 2;
      one<float>({states < 16 ? 270 : 40, 1, 3, states, 0, direction, 1, kLbd, state, true});
    }
  one<double>({70, 1, 2, 64, 0, 1, 4, kBdl, true, true});
  one<bfloat16>({140, 2, 3, 16, 0, 2, 0, kBld});
}

TEST_CASE("cuda_ema_scan: options") {
  for (int activation = 0; activation <= 4; activation++)
    for (const int direction : {0, 1, 2})
      for (const bool mask : {false, true}) {
        one<float>({130, 1, 5, 4, 0, direction, activation, kLbd, false, mask, !mask});
        one<float>({130, 2, 3, 2, 0, direction, activation, kBdl, direction != 2, mask, mask});
      }
  for (const int direction : {0, 1, 2})
    for (const int64_t truncation : {1, 3, 40, 129, 200, 1000}) {
      one<float>({200, 1, 3, 4, truncation, direction, 1, kLbd, false, true});
      one<double>({200, 1, 2, 5, truncation, direction, 0, kBdl, false, true});
    }
}

// States are close to 1 (decay far below 0) and close to 0, over several segments.
TEST_CASE("cuda_ema_scan: long_memory") {
  for (const double decay : {-7.0, 0.0, 8.0}) {
    EmaOptions c{1500, 1, 2, 4, 0, 0, 1, kLbd, true, true};
    c.decay = decay;
    const double slack = 4;  // a memory of 1500 steps: q is rounded once, and taken to the power of up to 31
    one<float>(c, slack);
    c.direction = 1, c.layout = kBdl;
    one<float>(c, slack);
    c.direction = 2, c.state = false;
    one<float>(c, slack);
    c.direction = 0, c.truncation = 300, c.layout = kBld;
    one<float>(c, slack);
  }
}

// One segment has several tiles where there are blocks enough without cutting time.
TEST_CASE("cuda_ema_scan: one_segment") {
  const int64_t before = Emulator::get().launches;
  EmaOptions c{600, 128, 1, 4, 0, 0, 0, kBld};
  one<float>(c);
  // coefficients, scan; coefficients, adjoint scan, gradients
  CHECK(Emulator::get().launches - before == 5, "%ld launches", long(Emulator::get().launches - before));
  c.activation = 1, c.states = 5, c.mask = true, c.state = true, c.length = 280;
  one<float>(c);
}

// Threads run in any order between barriers and give the same bits. A missing barrier shows here.
template <typename T, bool complex = false>
void orders(const EmaOptions& c) {
  Case<T, complex> first(c, 5);
  first.run();
  for (const Order order : {Order::kDescending, Order::kShuffled}) {
    Case<T, complex> a(c, 5);
    a.run(order);
    CHECK(same_outputs(a.outputs(), first.outputs()), "%s: another order of threads gives another result",
          c.text().c_str());
  }
}

TEST_CASE("cuda_ema_scan: order_of_threads") {
  for (const int64_t states : {3, 4, 9})
    for (const int direction : {0, 1, 2}) {
      orders<float>({700, 1, 3, states, 0, direction, 1, kBdl, direction != 2, true});
      orders<double>({150, 1, 3, states, 0, direction, 0, kLbd, direction != 2});
    }
}

// A sequence in two calls gives the same as in one.
TEST_CASE("cuda_ema_scan: carried_state") {
  for (const int64_t cut : {1, 40, 299}) {
    const EmaOptions c{300, 1, 6, 4, 0, 0, 0, kLbd, true};
    Case<float> whole(c, 3);
    whole.run();
    Case<float> head(c, 3), tail(c, 3);
    head.o.length = cut, tail.o.length = 300 - cut;
    head.run();
    for (int64_t i = 0; i < tail.state.size(); i++) tail.state[i] = head.final_state[i];
    for (int64_t t = cut; t < 300; t++)
      for (int64_t d = 0; d < 6; d++) tail.x.at(t - cut, 0, d) = whole.x.at(t, 0, d);
    tail.run();
    INFO("cut at ", cut);
    for (int64_t t = 0; t < 300; t++)
      for (int64_t d = 0; d < 6; d++)
        expect_within("y", t < cut ? head.y.at(t, 0, d) : tail.y.at(t - cut, 0, d), t, whole.y.at(t, 0, d), 1e-6);
    for (int64_t i = 0; i < whole.state.size(); i++) EXPECT_WITHIN(tail.final_state, i, whole.final_state[i], 1e-6);
  }
}

// NaNs in padding stay there: only the residual term sees them. Infinities do not travel back in time.
TEST_CASE("cuda_ema_scan: not_finite") {
  const EmaOptions c{100, 1, 3, 4, 0, 0, 0, kBdl, false, true, false};
  Case<float> a(c, 9), clean(c, 9);
  for (int64_t t = 0; t < 100; t++) {
    if (!a.mask[t]) continue;
    for (int64_t d = 0; d < 3; d++) a.x.at(t, 0, d) = std::nanf(""), clean.x.at(t, 0, d) = 0;
  }
  a.run(), clean.run();
  CHECK(a.y.data.equals(clean.y.data) && a.dx.data.equals(clean.dx.data) && a.ddecay.equals(clean.ddecay),
        "padding reaches the result");
  EmaOptions open = c;
  open.mask = false, open.length = 270;
  Case<float> b(open, 9), same(open, 9);
  b.x.at(40, 0, 1) = std::numeric_limits<float>::infinity();
  b.run(), same.run();
  for (int64_t t = 0; t < 270; t++)
    for (int64_t d = 0; d < 3; d++)
      CHECK((d == 1 && t >= 40) ? !std::isfinite(b.y.at(t, 0, d)) : b.y.at(t, 0, d) == same.y.at(t, 0, d),
            "infinity at 40, channel 1: (%ld, %ld)", long(t), long(d));
}

// The gradient has stride 0, as sum().backward() makes it.
TEST_CASE("cuda_ema_scan: expanded_gradient") {
  const EmaOptions c{150, 2, 33, 4, 0, 0, 1};
  Case<float> a(c, 4), b(c, 4);
  for (int64_t i = 0; i < a.grad.data.size(); i++) a.grad.data[i] = 1.5f;
  b.grad.data[0] = 1.5f;
  b.grad.time = b.grad.batch = b.grad.channel = 0;
  a.run(), b.run();
  CHECK(a.dx.data.equals(b.dx.data) && a.ddamping.equals(b.ddamping), "an expanded gradient differs");
}

// Returns the shared memory of the largest launch, in bytes: two blocks of 4 states must fit into a multiprocessor.
TEST_CASE("cuda_ema_scan: shared_memory") {
  const auto largest = [](const EmaOptions& c, bool backward) {
    Case<float> a(c, 1);
    FastasrEmaScan s = a.scan();
    FastasrEmaScanGrads g = a.grads();
    Buffer<unsigned char> workspace(backward ? fastasr_cuda_ema_scan_backward_workspace(&s, &g)
                                             : fastasr_cuda_ema_scan_forward_workspace(&s));
    s.workspace = workspace;
    Emulator::get().largest_shared = 0;
    backward ? fastasr_cuda_ema_scan_backward(&s, &g, nullptr)
             : fastasr_cuda_ema_scan_forward(&s, a.view(a.y), nullptr, nullptr);
    return Emulator::get().largest_shared;
  };
  const struct {
    int64_t states;
    int direction;
    bool backward;
    int64_t bytes;
  } expected[] = {{4, 0, false, 43008},  {4, 0, true, 68608},   {64, 0, false, 84480},
                  {64, 0, true, 100864}, {64, 2, false, 75776}, {64, 2, true, 83456}};
  for (const auto& e : expected) {
    const int64_t got = largest({270, 1, 1, e.states, 0, e.direction, 1}, e.backward);
    CHECK(got == e.bytes, "%ld states, direction %d, %s: %ld bytes, expected %ld", long(e.states), e.direction,
          e.backward ? "backward" : "forward", long(got), long(e.bytes));
  }
}

std::vector<EmaOptions> complex_options() {
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

TEST_CASE("cuda_ema_scan: complex") {
  for (const EmaOptions& o : complex_options()) {
    one<float, true>(o), one<double, true>(o);
    if (o.batch <= 2) orders<float, true>(o), orders<double, true>(o);
  }
}

}  // namespace
}  // namespace fastasr::test
