// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' bodies and launches on the CPU (cuda_emulation.h), against direct convolutions in double.
#include <string>
#include <type_traits>

#include "cuda/ema_scan_launchers.h"
#include "tests/check.h"

namespace fastasr::test {
namespace {

enum Layout { kLbd, kBld, kBdl, kPadded };

struct Config {
  int64_t length, batch, channels, states;
  int direction = 0, activation = 0;
  Layout layout = kLbd;
  bool residual = true, state = false, mask = false;
  int64_t truncation = 0;
  double decay = 0;  // mean of the decay parameters before the sigmoid
  double slack = 1;  // factor on the tolerances
  Order order = Order::kAscending;

  std::string name() const {
    return "L" + std::to_string(length) + " B" + std::to_string(batch) + " D" + std::to_string(channels) + " N" +
           std::to_string(states) + " direction " + std::to_string(direction) + " act " + std::to_string(activation) +
           " layout " + std::to_string(layout) + (state ? " state" : "") + (mask ? " mask" : "") + " K" +
           std::to_string(truncation);
  }
};

template <typename T>
constexpr int dtype_of() {
  if (std::is_same_v<T, double>) return kFastasrDouble;
  if (std::is_same_v<T, bfloat16>) return kFastasrBfloat16;
  return std::is_same_v<T, float16> ? kFastasrHalf : kFastasrFloat;
}

// Holds a sequence tensor in one of the layouts; the last one leaves gaps between rows.
template <typename T>
struct Sequence {
  Buffer<T> data;
  int64_t time, batch, channel;
  Sequence(const Config& c, Layout layout)
      : data(size(c, layout)),
        time(layout == kLbd   ? c.batch * c.channels
             : layout == kBld ? c.channels
             : layout == kBdl ? 1
                              : c.channels + 3),
        batch(layout == kLbd      ? c.channels
              : layout == kPadded ? (c.channels + 3) * c.length
                                  : c.channels * c.length),
        channel(layout == kBdl ? c.length : 1) {}
  static int64_t size(const Config& c, Layout layout) {
    return c.length * c.batch * (c.channels + (layout == kPadded ? 3 : 0));
  }
  T& at(int64_t t, int64_t b, int64_t d) { return data[t * time + b * batch + d * channel]; }
  FastasrSequence view() { return {data.data(), time, batch, channel}; }
};

// Returns the largest error over the largest magnitude, in units of the tensor's rounding.
struct Worst {
  double error = 0, magnitude = 0;
  void add(double got, double expected) {
    const double e = std::fabs(got - expected);
    error = e > error || e != e ? e : error;
    magnitude = std::max(magnitude, std::fabs(expected));
  }
  double relative() const { return error == 0 ? 0 : error / std::max(magnitude, 1e-30); }
};

template <typename T>
struct Case {
  using C = compute_t<T>;
  Config c;
  int64_t rows;
  Sequence<T> x, y, grad, dx;
  Buffer<C> damping, decay, expansion, projection, residual, state, final_state, grad_state;
  Buffer<C> ddamping, ddecay, dexpansion, dprojection, dresidual, dstate;
  Buffer<unsigned char> mask;

  explicit Case(const Config& c_, uint64_t seed)
      : c(c_),
        rows(c.channels * (c.direction == 2 ? 2 : 1)),
        x(c, c.layout),
        y(c, c.layout == kPadded ? kLbd : c.layout),
        grad(c, c.layout == kBdl ? kBld : c.layout),
        dx(c, c.layout == kPadded ? kBdl : c.layout),
        damping(rows * c.states),
        decay(rows * c.states),
        expansion(rows * c.states),
        projection(rows * c.states),
        residual(c.channels),
        state(c.batch * c.channels * c.states),
        final_state(state.size()),
        grad_state(state.size()),
        ddamping(rows * c.states),
        ddecay(rows * c.states),
        dexpansion(rows * c.states),
        dprojection(rows * c.states),
        dresidual(c.channels),
        dstate(state.size()),
        mask(c.batch * c.length) {
    Random random(seed);
    x.data.fill(random), grad.data.fill(random);
    damping.fill(random), decay.fill(random, 1, c.decay), expansion.fill(random), projection.fill(random);
    residual.fill(random), state.fill(random), grad_state.fill(random);
    for (int64_t i = 0; i < mask.size(); i++) mask[i] = random.uniform() < 0.3;
  }

  FastasrEmaScan scan() {
    return {dtype_of<T>(),
            c.length,
            c.batch,
            c.channels,
            c.states,
            c.truncation,
            c.direction,
            c.activation,
            x.view(),
            damping.data(),
            decay.data(),
            expansion.data(),
            projection.data(),
            c.residual ? residual.data() : nullptr,
            c.state ? state.data() : nullptr,
            c.mask ? mask.data() : nullptr,
            nullptr};
  }
  FastasrEmaScanGrads grads() {
    return {grad.view(),
            c.state ? grad_state.data() : nullptr,
            dx.view(),
            ddamping.data(),
            ddecay.data(),
            dexpansion.data(),
            dprojection.data(),
            c.residual ? dresidual.data() : nullptr,
            c.state ? dstate.data() : nullptr};
  }

  void run() {
    Emulator::get().order = c.order;
    FastasrEmaScan s = scan();
    {
      Buffer<unsigned char> workspace(fastasr_cuda_ema_scan_forward_workspace(&s));
      s.workspace = workspace.data();
      CHECK(fastasr_cuda_ema_scan_forward(&s, y.view(), c.state ? final_state.data() : nullptr, nullptr) == 0, "-");
      CHECK(workspace.intact(), "%s: workspace overrun", c.name().c_str());
    }
    FastasrEmaScanGrads g = grads();
    Buffer<unsigned char> workspace(fastasr_cuda_ema_scan_backward_workspace(&s, &g));
    s.workspace = workspace.data();
    CHECK(fastasr_cuda_ema_scan_backward(&s, &g, nullptr) == 0, "-");
    CHECK(workspace.intact() && y.data.intact() && dx.data.intact() && ddamping.intact() && ddecay.intact() &&
              dexpansion.intact() && dprojection.intact() && dresidual.intact() && dstate.intact() &&
              final_state.intact(),
          "%s wrote outside", c.name().c_str());
  }

  void compare();
};

double activation_of(int kind, double z) {
  switch (kind) {
    case 1:
      return z / (1 + std::exp(-z));
    case 2:
      return std::max(z, 0.0);
    case 3:
      return std::tanh(z);
    case 4:
      return z * 0.5 * std::erfc(-z / std::sqrt(2.0));
    default:
      return z;
  }
}
double slope_of(int kind, double z) {
  if (kind == 2) return z > 0;
  const double h = 1e-5;  // the activations' derivatives numerically: independent of the kernel's formulas
  return (activation_of(kind, z + h) - activation_of(kind, z - h)) / (2 * h);
}

template <typename T>
void Case<T>::compare() {
  const int64_t length = c.length, taps = c.truncation ? std::min(c.truncation, length) : length;
  const int directions = c.direction == 2 ? 2 : 1;
  Worst wy, wdx, wparameters[4], wresidual, wdstate, wfinal;
  std::vector<double> parameter_grads[4];
  for (auto& p : parameter_grads) p.assign(static_cast<size_t>(rows * c.states), 0);
  for (int64_t d = 0; d < c.channels; d++) {
    double dresidual_sum = 0;
    for (int64_t b = 0; b < c.batch; b++) {
      std::vector<double> xs(length), raw(length), z(length), g(length), dxs(length, 0);
      for (int64_t t = 0; t < length; t++) {
        raw[t] = value(x.at(t, b, d));
        xs[t] = c.mask && mask[b * length + t] ? 0 : raw[t];
        z[t] = c.residual ? static_cast<double>(residual[d]) * raw[t] : 0;
      }
      struct Coefficients {
        double p, a, q, b, c;
      };
      std::vector<Coefficients> k(static_cast<size_t>(directions * c.states));
      for (int e = 0; e < directions; e++)
        for (int64_t n = 0; n < c.states; n++) {
          const int64_t i = (d + e * c.channels) * c.states + n;
          const double p = 1 / (1 + std::exp(-static_cast<double>(damping[i])));
          const double a = 1 / (1 + std::exp(-static_cast<double>(decay[i])));
          k[e * c.states + n] = {p, a, 1 - p * a, p * static_cast<double>(expansion[i]),
                                 static_cast<double>(projection[i]) / std::sqrt(static_cast<double>(c.states))};
        }
      // time as direction e sees it
      const auto seen = [&](int e, int64_t t) {
        const bool reverse = c.direction == 1 || (c.direction == 2 && e == 1);
        return reverse ? length - 1 - t : t;
      };
      const auto initial = [&](int64_t n) { return static_cast<double>(state[(b * c.channels + d) * c.states + n]); };
      for (int e = 0; e < directions; e++) {
        std::vector<double> tap(length, 0);
        for (int64_t n = 0; n < c.states; n++) {
          const auto& m = k[e * c.states + n];
          for (int64_t j = 0; j < taps; j++) tap[j] += m.b * m.c * std::pow(m.q, static_cast<double>(j));
        }
        for (int64_t t = 0; t < length; t++) {
          for (int64_t j = 0; j <= t && j < taps; j++) z[seen(e, t)] += tap[j] * xs[seen(e, t - j)];
          if (c.state)
            for (int64_t n = 0; n < c.states; n++)
              z[seen(e, t)] += k[n].c * std::pow(k[n].q, static_cast<double>(t + 1)) * initial(n);
        }
      }
      for (int64_t t = 0; t < length; t++) {
        wy.add(value(y.at(t, b, d)), activation_of(c.activation, z[t]));
        g[t] = value(grad.at(t, b, d)) * slope_of(c.activation, z[t]);
        dresidual_sum += g[t] * raw[t];
      }
      for (int e = 0; e < directions; e++) {
        for (int64_t n = 0; n < c.states; n++) {
          const auto& m = k[e * c.states + n];
          const int64_t i = (d + e * c.channels) * c.states + n;
          const double s = 1 / std::sqrt(static_cast<double>(c.states));
          double db = 0, dc = 0, dq = 0, dh = 0, final = 0;
          for (int64_t j = 0; j < taps; j++) {
            double correlation = 0;
            for (int64_t t = j; t < length; t++) correlation += g[seen(e, t)] * xs[seen(e, t - j)];
            const double power = std::pow(m.q, static_cast<double>(j));
            const double slope = j ? static_cast<double>(j) * std::pow(m.q, static_cast<double>(j - 1)) : 0;
            db += m.c * power * correlation, dc += m.b * power * correlation, dq += m.b * m.c * slope * correlation;
          }
          for (int64_t t = 0; t < length; t++)
            for (int64_t j = 0; j <= t && j < taps; j++)
              dxs[seen(e, t - j)] += g[seen(e, t)] * m.b * m.c * std::pow(m.q, static_cast<double>(j));
          if (c.state) {
            const double h = initial(n), gs = static_cast<double>(grad_state[(b * c.channels + d) * c.states + n]);
            for (int64_t t = 0; t < length; t++) {
              const double power = std::pow(m.q, static_cast<double>(t));
              dh += g[seen(e, t)] * m.c * power * m.q, dc += g[seen(e, t)] * power * m.q * h;
              dq += g[seen(e, t)] * m.c * static_cast<double>(t + 1) * power * h;
              // the step that is t before the last one, in the final state
              const double late = xs[seen(e, length - 1 - t)];
              final += m.b * power * late, db += gs * power * late;
              if (t) dq += gs * m.b * static_cast<double>(t) * std::pow(m.q, static_cast<double>(t - 1)) * late;
              dxs[seen(e, length - 1 - t)] += gs * m.b * power;
            }
            const double all = std::pow(m.q, static_cast<double>(length));
            final += all * h, dh += gs * all;
            if (length) dq += gs * static_cast<double>(length) * std::pow(m.q, static_cast<double>(length - 1)) * h;
            wfinal.add(static_cast<double>(final_state[(b * c.channels + d) * c.states + n]), final);
            wdstate.add(static_cast<double>(dstate[(b * c.channels + d) * c.states + n]), dh);
          }
          parameter_grads[0][i] += (db * static_cast<double>(expansion[i]) - dq * m.a) * m.p * (1 - m.p);
          parameter_grads[1][i] += -dq * m.p * m.a * (1 - m.a);
          parameter_grads[2][i] += db * m.p;
          parameter_grads[3][i] += dc * s;
        }
      }
      for (int64_t t = 0; t < length; t++) {
        if (c.mask && mask[b * length + t]) dxs[t] = 0;
        if (c.residual) dxs[t] += static_cast<double>(residual[d]) * g[t];
        wdx.add(value(dx.at(t, b, d)), dxs[t]);
      }
    }
    if (c.residual) wresidual.add(static_cast<double>(dresidual[d]), dresidual_sum);
  }
  Buffer<C>* got[] = {&ddamping, &ddecay, &dexpansion, &dprojection};
  for (int j = 0; j < 4; j++)
    for (int64_t i = 0; i < rows * c.states; i++)
      wparameters[j].add(static_cast<double>((*got[j])[i]), parameter_grads[j][i]);

  // both come from dq, which is 0 where one tap is kept
  wparameters[1].magnitude = std::max(wparameters[1].magnitude, wparameters[0].magnitude);
  // 1e-9 for the numerical derivative
  const double unit = c.slack * (std::is_same_v<C, double> ? 1e-9 : 1e-6), stored = Type<T>::half_ulp;
  const auto check = [&](const Worst& w, double limit, const char* what) {
    CHECK(w.relative() <= limit, "%s %s: %s: relative error %.3g, limit %.3g", Type<T>::name, c.name().c_str(), what,
          w.relative(), limit);
  };
  check(wy, unit + stored, "y");
  check(wdx, unit + stored, "dx");
  check(wfinal, 2 * unit, "final state");
  check(wdstate, 2 * unit, "dstate");
  check(wresidual, 2 * unit, "dresidual");
  const char* names[] = {"ddamping", "ddecay", "dexpansion", "dprojection"};
  for (int j = 0; j < 4; j++) check(wparameters[j], 4 * unit, names[j]);
}

template <typename T>
void one(const Config& c) {
  Case<T> a(c, static_cast<uint64_t>(c.length * 31 + c.channels * 7 + c.states));
  a.run();
  a.compare();
}

// Tiles have 256 steps forward and 128 backward (64 and 32 in double); up to two tiles are one segment.
TEST_CASE("cuda_bodies: shapes") {
  for (const int64_t length : {0, 1, 2, 31, 32, 33, 128, 256, 257, 300})
    for (const int64_t channels : {1, 33}) one<float>({length, 2, channels, 4});
  for (const int64_t length : {0, 1, 7, 63, 65, 150})
    for (const int64_t channels : {2, 32}) one<double>({length, 1, channels, 4, 0, 1});
  one<float>({20, 0, 5, 4});
  one<float>({20, 2, 0, 4});
}

TEST_CASE("cuda_bodies: layouts") {
  for (const Layout layout : {kLbd, kBld, kBdl, kPadded}) {
    one<float>({75, 2, 35, 4, 0, 1, layout, true, true, true});
    one<bfloat16>({140, 1, 34, 4, 1, 4, layout, true, false, true});
    one<float16>({70, 2, 31, 4, 2, 3, layout, false, false, true});
    one<double>({70, 2, 33, 4, 0, 2, layout, true, true, true});
  }
}

TEST_CASE("cuda_bodies: groups") {
  for (const int64_t states : {1, 2, 3, 4, 5, 8, 16, 64})
    for (const int direction : {0, 1, 2}) {
      const bool state = direction != 2;
      one<float>({states < 16 ? 270 : 40, 1, 3, states, direction, 1, kLbd, true, state, true});
    }
  one<double>({70, 1, 2, 64, 1, 4, kBdl, true, true, true});
  one<bfloat16>({140, 2, 3, 16, 2, 0, kBld, true, false, false});
}

TEST_CASE("cuda_bodies: options") {
  for (int activation = 0; activation <= 4; activation++)
    for (const int direction : {0, 1, 2})
      for (const bool mask : {false, true}) {
        one<float>({130, 1, 5, 4, direction, activation, kLbd, !mask, false, mask});
        one<float>({130, 2, 3, 2, direction, activation, kBdl, mask, direction != 2, mask});
      }
  for (const int direction : {0, 1, 2})
    for (const int64_t truncation : {1, 3, 40, 129, 200, 1000}) {
      one<float>({200, 1, 3, 4, direction, 1, kLbd, true, false, true, truncation});
      one<double>({200, 1, 2, 5, direction, 0, kBdl, true, false, true, truncation});
    }
}

// States are close to 1 (decay far below 0) and close to 0, over several segments.
TEST_CASE("cuda_bodies: long_memory") {
  for (const double decay : {-7.0, 0.0, 8.0}) {
    Config c{1500, 1, 2, 4, 0, 1, kLbd, true, true, true};
    c.decay = decay, c.slack = 4;  // a memory of 1500 steps: q is rounded once, and taken to the power of up to 31
    one<float>(c);
    c.direction = 1, c.layout = kBdl;
    one<float>(c);
    c.direction = 2, c.state = false;
    one<float>(c);
    c.direction = 0, c.truncation = 300, c.layout = kBld;
    one<float>(c);
  }
}

// One segment has several tiles where there are blocks enough without cutting time.
TEST_CASE("cuda_bodies: one_segment") {
  const int64_t before = Emulator::get().launches;
  Config c{600, 128, 1, 4, 0, 0, kBld, true, false, false};
  one<float>(c);
  // coefficients, scan; coefficients, adjoint scan, gradients
  CHECK(Emulator::get().launches - before == 5, "%ld launches", long(Emulator::get().launches - before));
  c.activation = 1, c.states = 5, c.mask = true, c.state = true, c.length = 280;
  one<float>(c);
}

// Threads run in any order between barriers and give the same bits. A missing barrier shows here.
template <typename T>
void orders(const Config& c) {
  Case<T> first(c, 5);
  first.run();
  for (const Order order : {Order::kDescending, Order::kShuffled}) {
    Config other = c;
    other.order = order;
    Case<T> a(other, 5);
    a.run();
    CHECK(a.y.data.equals(first.y.data) && a.dx.data.equals(first.dx.data) && a.ddamping.equals(first.ddamping) &&
              a.ddecay.equals(first.ddecay) && a.dexpansion.equals(first.dexpansion) &&
              a.dprojection.equals(first.dprojection) && a.dresidual.equals(first.dresidual) &&
              (!c.state || (a.final_state.equals(first.final_state) && a.dstate.equals(first.dstate))),
          "%s: another order of threads gives another result", c.name().c_str());
  }
  Emulator::get().order = Order::kAscending;
}

TEST_CASE("cuda_bodies: order_of_threads") {
  for (const int64_t states : {3, 4, 9})
    for (const int direction : {0, 1, 2}) {
      orders<float>({700, 1, 3, states, direction, 1, kBdl, true, direction != 2, true});
      orders<double>({150, 1, 3, states, direction, 0, kLbd, true, direction != 2, false});
    }
}

// A sequence in two calls gives the same as in one.
TEST_CASE("cuda_bodies: carried_state") {
  for (const int64_t cut : {1, 40, 299}) {
    const Config c{300, 1, 6, 4, 0, 0, kLbd, true, true, false};
    Case<float> whole(c, 3);
    whole.run();
    Case<float> head(c, 3), tail(c, 3);
    head.c.length = cut, tail.c.length = 300 - cut;
    head.run();
    for (int64_t i = 0; i < tail.state.size(); i++) tail.state[i] = head.final_state[i];
    for (int64_t t = cut; t < 300; t++)
      for (int64_t d = 0; d < 6; d++) tail.x.at(t - cut, 0, d) = whole.x.at(t, 0, d);
    tail.run();
    Worst y, state;
    for (int64_t t = 0; t < 300; t++)
      for (int64_t d = 0; d < 6; d++)
        y.add(t < cut ? head.y.at(t, 0, d) : tail.y.at(t - cut, 0, d), whole.y.at(t, 0, d));
    for (int64_t i = 0; i < whole.state.size(); i++) state.add(tail.final_state[i], whole.final_state[i]);
    CHECK(y.relative() < 1e-6 && state.relative() < 1e-6, "cut at %ld: %.3g, %.3g", long(cut), y.relative(),
          state.relative());
  }
}

// NaNs in padding stay there: only the residual term sees them. Infinities do not travel back in time.
TEST_CASE("cuda_bodies: not_finite") {
  const Config c{100, 1, 3, 4, 0, 0, kBdl, false, false, true};
  Case<float> a(c, 9), clean(c, 9);
  for (int64_t t = 0; t < 100; t++) {
    if (!a.mask[t]) continue;
    for (int64_t d = 0; d < 3; d++) a.x.at(t, 0, d) = std::nanf(""), clean.x.at(t, 0, d) = 0;
  }
  a.run(), clean.run();
  CHECK(a.y.data.equals(clean.y.data) && a.dx.data.equals(clean.dx.data) && a.ddecay.equals(clean.ddecay),
        "padding reaches the result");
  Config open = c;
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
TEST_CASE("cuda_bodies: expanded_gradient") {
  const Config c{150, 2, 33, 4, 0, 1};
  Case<float> a(c, 4), b(c, 4);
  for (int64_t i = 0; i < a.grad.data.size(); i++) a.grad.data[i] = 1.5f;
  b.grad.data[0] = 1.5f;
  b.grad.time = b.grad.batch = b.grad.channel = 0;
  a.run(), b.run();
  CHECK(a.dx.data.equals(b.dx.data) && a.ddamping.equals(b.ddamping), "an expanded gradient differs");
}

// Returns the shared memory of the largest launch, in bytes: two blocks of 4 states must fit into a multiprocessor.
TEST_CASE("cuda_bodies: shared_memory") {
  const auto largest = [](const Config& c, bool backward) {
    Case<float> a(c, 1);
    FastasrEmaScan s = a.scan();
    FastasrEmaScanGrads g = a.grads();
    Buffer<unsigned char> workspace(backward ? fastasr_cuda_ema_scan_backward_workspace(&s, &g)
                                             : fastasr_cuda_ema_scan_forward_workspace(&s));
    s.workspace = workspace.data();
    Emulator::get().largest_shared = 0;
    backward ? fastasr_cuda_ema_scan_backward(&s, &g, nullptr)
             : fastasr_cuda_ema_scan_forward(&s, a.y.view(), nullptr, nullptr);
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
    const int64_t got = largest({270, 1, 1, e.states, e.direction, 1}, e.backward);
    CHECK(got == e.bytes, "%ld states, direction %d, %s: %ld bytes, expected %ld", long(e.states), e.direction,
          e.backward ? "backward" : "forward", long(got), long(e.bytes));
  }
}

}  // namespace
}  // namespace fastasr::test
