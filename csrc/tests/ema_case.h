// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <utility>

#include "tests/check.h"

// The options, operands and results of the EMA scans, for the kernels of the CPU and of CUDA alike.
namespace fastasr::test {

enum Direction : int { kForward, kReverse, kBidirectional };
enum ActivationNumber : int { kIdentity, kSilu, kRelu, kTanh, kGelu };
enum Layout { kLbd, kBld, kBdl, kPadded };  // kPadded: as kBld, with gaps between rows

struct EmaOptions {
  int64_t length, batch, channels, states;
  int64_t truncation = 0;
  int direction = kForward, activation = kIdentity;
  Layout layout = kLbd;
  bool state = false, mask = false, residual = true;
  double decay = 0;  // mean of the decay parameters before the sigmoid

  std::string text() const {
    return formatted("%ldx%ldx%ld N %ld K %ld direction %d activation %d layout %d%s%s", long(length), long(batch),
                     long(channels), long(states), long(truncation), direction, activation, layout,
                     state ? " state" : "", mask ? " mask" : "");
  }
  int64_t halves() const { return direction == kBidirectional ? 2 : 1; }
  int64_t rows() const { return halves() * channels; }
  int64_t elements() const { return length * batch * channels; }
  // Returns the time of step k of a half.
  int64_t time(int64_t half, int64_t k) const { return half == 1 || direction == kReverse ? length - 1 - k : k; }
};

// Holds a sequence tensor in one of the layouts.
template <typename T>
struct Sequence {
  Buffer<T> data;
  int64_t time, batch, channel;
  Sequence(const EmaOptions& o, Layout layout, int64_t offset) : data(size(o, layout), offset) {
    const int64_t row = o.channels + (layout == kPadded ? 3 : 0);
    time = layout == kLbd ? o.batch * row : layout == kBdl ? 1 : row;
    batch = layout == kLbd ? row : row * o.length;
    channel = layout == kBdl ? o.length : 1;
  }
  static int64_t size(const EmaOptions& o, Layout layout) {
    return o.length * o.batch * (o.channels + (layout == kPadded ? 3 : 0));
  }
  int64_t index(int64_t t, int64_t b, int64_t d) const { return t * time + b * batch + d * channel; }
  T& at(int64_t t, int64_t b, int64_t d) { return data[index(t, b, d)]; }
  long double operator()(int64_t t, int64_t b, int64_t d) { return value(at(t, b, d)); }
  template <typename View>
  View view() {
    return {data, time, batch, channel};
  }
};

template <typename T>
struct EmaCase {
  using C = compute_t<T>;
  EmaOptions o;
  Random random;
  int64_t parameters = o.rows() * o.states, states = o.batch * o.channels * o.states;
  Sequence<T> x, grad, y, dx;
  Buffer<C> damping{parameters, 1}, decay{parameters}, expansion{parameters}, projection{parameters},
      residual{o.channels}, state{states}, grad_state{states}, final_state{states};
  Buffer<C> ddamping{parameters}, ddecay{parameters}, dexpansion{parameters}, dprojection{parameters},
      dresidual{o.channels}, dstate{states};
  Buffer<uint8_t> mask{o.batch * o.length};

  // mixed: not all tensors have the layout of x.
  EmaCase(const EmaOptions& options, uint64_t seed, bool mixed)
      : o(options),
        random(seed),
        x(o, o.layout, 1),
        grad(o, mixed && o.layout == kBdl ? kBld : o.layout, 3),
        y(o, mixed && o.layout == kPadded ? kLbd : o.layout, 1),
        dx(o, mixed && o.layout == kPadded ? kBdl : o.layout, 2) {
    x.data.fill(random), grad.data.fill(random), damping.fill(random), decay.fill(random, 1, o.decay);
    for (Buffer<C>* b : {&expansion, &projection, &residual, &state, &grad_state}) b->fill(random);
    for (int64_t i = 0; i < mask.size(); i++) mask[i] = random.uniform() < 0.3;
  }
  static uint64_t seed_of(const EmaOptions& o) {
    return static_cast<uint64_t>(o.length * 31 + o.channels * 7 + o.states);
  }
  C* if_residual(Buffer<C>& b) { return o.residual ? b.data() : nullptr; }
  C* if_state(Buffer<C>& b) { return o.state ? b.data() : nullptr; }
  uint8_t* mask_or_null() { return o.mask ? mask.data() : nullptr; }
  bool same_results(EmaCase& other) {
    return y.data.equals(other.y.data) && dx.data.equals(other.dx.data) && ddamping.equals(other.ddamping) &&
           ddecay.equals(other.ddecay) && dexpansion.equals(other.dexpansion) &&
           dprojection.equals(other.dprojection) && (!o.residual || dresidual.equals(other.dresidual)) &&
           (!o.state || (final_state.equals(other.final_state) && dstate.equals(other.dstate)));
  }
};

// Computes everything in long double, one channel of one row at a time, and calls check(name, got, expected sum, index)
// for each element of the results. Kernels are k_j = sum over n of c b q^j.
template <typename T, typename F>
void each_result(EmaCase<T>& c, const F& check) {
  using Real = long double;
  const EmaOptions& o = c.o;
  const int64_t L = o.length, N = o.states, taps = o.truncation > 0 ? std::min(o.truncation, L) : L;
  const Real root = 1 / std::sqrt(Real(N));
  struct Coefficients {
    Real p, a, q, beta, gamma, q_k, slope_k;
  };
  const auto coefficients = [&](int64_t i) -> Coefficients {
    const Real p = logistic(c.damping(i)), a = logistic(c.decay(i)), q = 1 - p * a;
    return {p,
            a,
            q,
            p * c.expansion(i),
            root * c.projection(i),
            std::pow(q, Real(taps)),
            Real(taps) * std::pow(q, Real(taps - 1))};
  };
  for (int64_t d = 0; d < o.channels; d++) {
    std::vector<Sum> of_q(size_t(o.halves() * N)), of_b(of_q), of_c(of_q);
    Sum of_residual;
    const Real omega = o.residual ? c.residual(d) : 0;
    for (int64_t b = 0; b < o.batch; b++) {
      std::vector<Sum> z(size_t(L), Sum{}), dx(z);
      Reals in(size_t(L), 0), g(in), g_size(in);
      struct State {
        std::vector<Sum> h, v;
      };
      std::vector<State> states(of_q.size());
      for (int64_t t = 0; t < L; t++) {
        in[t] = o.mask && c.mask[b * L + t] ? 0 : c.x(t, b, d);
        z[t].add(omega * c.x(t, b, d));
      }
      for (int64_t half = 0; half < o.halves(); half++)
        for (int64_t n = 0; n < N; n++) {
          const auto [p, a, q, beta, gamma, q_k, slope_k] = coefficients((half * o.channels + d) * N + n);
          const int64_t at_state = (b * o.channels + d) * N + n;
          State& s = states[half * N + n];
          Sum h, v;
          h.add(o.state ? c.state(at_state) : 0);
          for (int64_t k = 0; k < L; k++) {
            const Real x = in[o.time(half, k)], late = k >= taps ? in[o.time(half, k - taps)] : 0;
            v = {q * v.value + h.value - slope_k * beta * late, q * v.size + h.size + std::fabs(slope_k * beta * late)};
            h = {q * h.value + beta * (x - q_k * late),
                 q * h.size + std::fabs(beta) * (std::fabs(x) + std::fabs(q_k * late))};
            s.h.push_back(h), s.v.push_back(v);
            z[o.time(half, k)].add(gamma * h.value, std::fabs(gamma) * h.size);
          }
          if (o.state) check("final_state", c.final_state[at_state], h, at_state);
        }
      for (int64_t t = 0; t < L; t++) {
        const Activated out = activated(o.activation, z[t].value);
        check("y", c.y.at(t, b, d), Sum{out.value, z[t].size}, t);
        const Real dy = c.grad(t, b, d), x = c.x(t, b, d);
        g[t] = dy * out.slope, g_size[t] = std::fabs(dy) * (1 + z[t].size);  // the error of z shifts the slope
        of_residual.add(g[t] * x, g_size[t] * std::fabs(x));
        dx[t].add(omega * g[t], std::fabs(omega) * g_size[t]);
      }
      for (int64_t half = 0; half < o.halves(); half++)
        for (int64_t n = 0; n < N; n++) {
          const auto [p, a, q, beta, gamma, q_k, slope_k] = coefficients((half * o.channels + d) * N + n);
          const int64_t j = half * N + n, at_state = (b * o.channels + d) * N + n;
          const State& s = states[j];
          Sum e;
          e.add(o.state ? c.grad_state(at_state) : 0);
          if (o.state && L > 0) of_q[j].add(e.value * s.v.back().value, e.size * s.v.back().size);
          for (int64_t k = L; k-- > 0;) {
            const int64_t t = o.time(half, k);
            of_c[j].add(g[t] * s.h[k].value, g_size[t] * s.h[k].size);
            of_q[j].add(gamma * g[t] * s.v[k].value, std::fabs(gamma) * g_size[t] * s.v[k].size);
            const int64_t u = k + taps < L ? o.time(half, k + taps) : -1;
            const Real late = u < 0 ? 0 : q_k * g[u], late_size = u < 0 ? 0 : q_k * g_size[u];
            const Sum lambda{e.value + gamma * (g[t] - late), e.size + std::fabs(gamma) * (g_size[t] + late_size)};
            of_b[j].add(lambda.value * in[t], lambda.size * std::fabs(in[t]));
            if (!(o.mask && c.mask[b * L + t])) dx[t].add(beta * lambda.value, std::fabs(beta) * lambda.size);
            e = {q * lambda.value, q * lambda.size};
          }
          if (o.state) check("dstate", c.dstate[at_state], e, at_state);
        }
      for (int64_t t = 0; t < L; t++) check("dx", c.dx.at(t, b, d), dx[t], t);
    }
    if (o.residual) check("dresidual", c.dresidual[d], of_residual, d);
    for (int64_t half = 0; half < o.halves(); half++)
      for (int64_t n = 0; n < N; n++) {
        const int64_t i = (half * o.channels + d) * N + n;
        const Real p = logistic(c.damping(i)), a = logistic(c.decay(i)), beta = c.expansion(i);
        const Real pp = p * (1 - p), aa = a * (1 - a);
        const Sum of[] = {of_q[half * N + n], of_b[half * N + n], of_c[half * N + n]};
        check("dprojection", c.dprojection[i], Sum{of[2].value * root, of[2].size * root}, i);
        check("dexpansion", c.dexpansion[i], Sum{of[1].value * p, of[1].size * p}, i);
        check("ddecay", c.ddecay[i], Sum{-of[0].value * p * aa, of[0].size * p * aa}, i);
        check("ddamping", c.ddamping[i],
              Sum{(of[1].value * beta - of[0].value * a) * pp, (of[1].size * std::fabs(beta) + of[0].size * a) * pp},
              i);
      }
  }
}

// The complex scan. Numbers are drawn in float, so that float and double get the same.
template <typename T>
struct ComplexEmaCase {
  using C = compute_t<T>;
  EmaOptions o;
  Random random{7};
  int64_t parameters = o.rows() * o.states, states = 2 * o.batch * o.channels * o.states;
  Sequence<T> x{o, o.layout, 1}, grad{o, o.layout, 3}, y{o, o.layout, 1}, dx{o, o.layout, 2};
  Buffer<C> alpha{parameters, 1}, delta{parameters}, theta{o.rows()}, gamma{2 * parameters}, residual{o.channels},
      state{states}, grad_state{states}, final_state{states};
  Buffer<C> dalpha{parameters}, ddelta{parameters}, dtheta{o.rows()}, dgamma{2 * parameters}, dresidual{o.channels},
      dstate{states};
  Buffer<uint8_t> mask{o.batch * o.length};

  explicit ComplexEmaCase(const EmaOptions& options) : o(options) {
    const auto draw = [&](auto& b) {
      for (int64_t i = 0; i < b.size(); i++)
        b[i] = make<std::decay_t<decltype(b[0])>>(static_cast<float>(2 * random.uniform() - 1));
    };
    draw(x.data), draw(grad.data);
    for (Buffer<C>* b : {&alpha, &delta, &theta, &gamma, &residual, &state, &grad_state}) draw(*b);
    for (int64_t i = 0; i < mask.size(); i++) mask[i] = random.uniform() < 0.3;
  }
  C* if_residual(Buffer<C>& b) { return o.residual ? b.data() : nullptr; }
  C* if_state(Buffer<C>& b) { return o.state ? b.data() : nullptr; }
  uint8_t* mask_or_null() { return o.mask ? mask.data() : nullptr; }
  // Calls f(name, result, the other case's result) for each result that the options ask for.
  template <typename Other, typename F>
  void each_result(Other& other, const F& f) {
    f("y", y.data, other.y.data), f("dx", dx.data, other.dx.data), f("dalpha", dalpha, other.dalpha);
    f("ddelta", ddelta, other.ddelta), f("dtheta", dtheta, other.dtheta), f("dgamma", dgamma, other.dgamma);
    if (o.residual) f("dresidual", dresidual, other.dresidual);
    if (o.state) f("final_state", final_state, other.final_state), f("dstate", dstate, other.dstate);
  }
};

}  // namespace fastasr::test
