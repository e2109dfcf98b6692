// SPDX-License-Identifier: Apache-2.0
#include "cpu/ema/ema_scan.h"

#include <algorithm>
#include <string>

#include "tests/check.h"
#include "tests/parallel.h"

namespace fastasr::test {
namespace {

using cpu::EmaActivation;
using cpu::EmaDirection;
using cpu::EmaShape;
using cpu::EmaStrides;
using Real = long double;

struct Options {
  int64_t length, batch, channels, states;
  int64_t truncation = 0;
  EmaDirection direction = EmaDirection::forward;
  EmaActivation activation = EmaActivation::identity;
  int layout = 0;  // LBD, BLD, BDL
  bool state = false, mask = false, residual = true;

  std::string text() const {
    char out[200];
    std::snprintf(out, sizeof out, "%ldx%ldx%ld N %ld K %ld direction %d activation %d layout %d%s%s", long(length),
                  long(batch), long(channels), long(states), long(truncation), int(direction), int(activation), layout,
                  state ? " state" : "", mask ? " mask" : "");
    return out;
  }
  int64_t halves() const { return direction == EmaDirection::bidirectional ? 2 : 1; }
  EmaStrides strides() const {
    if (layout == 0) return {batch * channels, channels, 1};
    if (layout == 1) return {channels, length * channels, 1};
    return {1, channels * length, length};
  }
  EmaShape shape() const { return {length, batch, channels, states, truncation, direction, activation}; }
};

Real sigmoid(Real z) { return 1 / (1 + std::exp(-z)); }
Real activated(Real z, EmaActivation a) {
  if (a == EmaActivation::silu) return z * sigmoid(z);
  if (a == EmaActivation::relu) return z > 0 ? z : 0;
  if (a == EmaActivation::tanh) return std::tanh(z);
  if (a == EmaActivation::gelu) return z * std::erfc(-z * std::sqrt(0.5L)) / 2;
  return z;
}
Real slope(Real z, EmaActivation a) {
  if (a == EmaActivation::silu) return sigmoid(z) * (1 + z * (1 - sigmoid(z)));
  if (a == EmaActivation::relu) return z > 0 ? 1 : 0;
  if (a == EmaActivation::tanh) return 1 - std::tanh(z) * std::tanh(z);
  if (a == EmaActivation::gelu)
    return std::erfc(-z * std::sqrt(0.5L)) / 2 + z * std::exp(-z * z / 2) * 0.39894228040143267794L;
  return 1;
}

template <typename T>
struct Case {
  using C = compute_t<T>;
  Options o;
  Buffer<T> x, grad, y, dx;
  Buffer<C> damping, decay, expansion, projection, residual, state, grad_state, final_state;
  Buffer<C> ddamping, ddecay, dexpansion, dprojection, dresidual, dstate;
  Buffer<uint8_t> mask;

  explicit Case(const Options& options)
      : o(options),
        x(elements(), 1),
        grad(elements(), 3),
        y(elements(), 1),
        dx(elements(), 2),
        damping(parameters(), 1),
        decay(parameters()),
        expansion(parameters()),
        projection(parameters()),
        residual(o.channels),
        state(states()),
        grad_state(states()),
        final_state(states()),
        ddamping(parameters()),
        ddecay(parameters()),
        dexpansion(parameters()),
        dprojection(parameters()),
        dresidual(o.channels),
        dstate(states()),
        mask(o.batch * o.length) {
    Random random(static_cast<uint64_t>(o.length * 31 + o.channels * 7 + o.states));
    for (Buffer<T>* b : {&x, &grad}) b->fill(random);
    for (Buffer<C>* b : {&damping, &decay, &expansion, &projection, &residual, &state, &grad_state}) b->fill(random);
    for (int64_t i = 0; i < mask.size(); i++) mask[i] = random.uniform() < 0.3;
  }
  int64_t elements() const { return o.length * o.batch * o.channels; }
  int64_t parameters() const { return o.halves() * o.channels * o.states; }
  int64_t states() const { return o.batch * o.channels * o.states; }
  int64_t at(int64_t t, int64_t b, int64_t d) const {
    const EmaStrides s = o.strides();
    return t * s.time + b * s.batch + d * s.channel;
  }
  cpu::EmaParameters<C> arguments() {
    return {damping.data(),
            decay.data(),
            expansion.data(),
            projection.data(),
            o.residual ? residual.data() : nullptr,
            o.state ? state.data() : nullptr,
            o.mask ? mask.data() : nullptr};
  }
  void run(const cpu::Parallel& parallel) {
    const auto p = arguments();
    cpu::kernels<cpu::EmaForward<T>>().real(o.shape(), p, x.data(), o.strides(), y.data(), o.strides(),
                                            o.state ? final_state.data() : nullptr, parallel);
    cpu::kernels<cpu::EmaBackward<T>>().real(
        o.shape(), p, x.data(), o.strides(), grad.data(), o.strides(), o.state ? grad_state.data() : nullptr, dx.data(),
        o.strides(),
        {ddamping.data(), ddecay.data(), dexpansion.data(), dprojection.data(), o.residual ? dresidual.data() : nullptr,
         o.state ? dstate.data() : nullptr},
        parallel);
  }
  bool intact() const {
    return y.intact() && dx.intact() && final_state.intact() && ddamping.intact() && ddecay.intact() &&
           dexpansion.intact() && dprojection.intact() && dresidual.intact() && dstate.intact();
  }
};

// Holds a value and the size of the sum behind it.
struct Sum {
  Real value = 0, size = 0;
  void add(Real term, Real of) { value += term, size += of; }
};

// Computes one channel of one row, all in long double. Kernels are k_j = sum over n of c b q^j, and their derivatives.
template <typename T>
void compare(Case<T>& c) {
  const Options& o = c.o;
  const int64_t L = o.length, N = o.states, taps = o.truncation > 0 ? std::min(o.truncation, L) : L;
  const Real root = 1 / std::sqrt(Real(N)), loose = sizeof(compute_t<T>) == 8 ? 4096 : 128;
  const auto check = [&](const char* what, auto got, const Sum& expected, int64_t i) {
    CHECK(close(got, expected.value, loose * expected.size), "%s %s, %s, %ld: expected %.9Lg, got %.9g", Type<T>::name,
          what, o.text().c_str(), long(i), expected.value, static_cast<double>(value(got)));
  };
  for (int64_t d = 0; d < o.channels; d++) {
    std::vector<Sum> of_q(size_t(o.halves() * N)), of_b(of_q.size()), of_c(of_q.size());
    Sum of_residual;
    const Real omega = o.residual ? value(c.residual[d]) : 0;
    for (int64_t b = 0; b < o.batch; b++) {
      std::vector<Sum> z(size_t(L), Sum{}), dx(size_t(L), Sum{});
      std::vector<Real> in(size_t(L), 0), g(size_t(L), 0);
      struct State {
        std::vector<Real> h, h_size, v, v_size;
      };
      std::vector<State> states(of_q.size());
      for (int64_t t = 0; t < L; t++) {
        const Real v = value(c.x[c.at(t, b, d)]);
        in[size_t(t)] = o.mask && c.mask[b * L + t] ? 0 : v;
        z[size_t(t)].add(omega * v, std::fabs(omega * v));
      }
      for (int64_t half = 0; half < o.halves(); half++) {
        const bool back = half == 1 || o.direction == EmaDirection::reverse;
        for (int64_t n = 0; n < N; n++) {
          const int64_t i = (half * o.channels + d) * N + n;
          const Real p = sigmoid(value(c.damping[i])), q = 1 - p * sigmoid(value(c.decay[i]));
          const Real beta = p * value(c.expansion[i]), gamma = root * value(c.projection[i]);
          State& s = states[size_t(half * N + n)];
          const Real h0 = o.state ? value(c.state[(b * o.channels + d) * N + n]) : 0;
          Real h = h0, h_size = std::fabs(h0), v = 0, v_size = 0;
          const Real q_k = std::pow(q, Real(taps)), slope_k = Real(taps) * std::pow(q, Real(taps - 1));
          for (int64_t k = 0; k < L; k++) {
            const Real x = in[size_t(back ? L - 1 - k : k)];
            const Real late = k >= taps ? in[size_t(back ? L - 1 - k + taps : k - taps)] : 0;
            v = q * v + h - slope_k * beta * late;
            v_size = q * v_size + h_size + std::fabs(slope_k * beta * late);
            h = q * h + beta * (x - q_k * late);
            h_size = q * h_size + std::fabs(beta) * (std::fabs(x) + std::fabs(q_k * late));
            s.h.push_back(h), s.h_size.push_back(h_size), s.v.push_back(v), s.v_size.push_back(v_size);
            z[size_t(back ? L - 1 - k : k)].add(gamma * h, std::fabs(gamma) * h_size);
          }
          if (o.state) check("final state", c.final_state[(b * o.channels + d) * N + n], {h, h_size}, n);
        }
      }
      for (int64_t t = 0; t < L; t++) {
        const Sum& s = z[size_t(t)];
        check("y", c.y[c.at(t, b, d)], {activated(s.value, o.activation), s.size}, t);
        const Real dy = value(c.grad[c.at(t, b, d)]), x = value(c.x[c.at(t, b, d)]);
        // the error of z shifts the slope
        g[size_t(t)] = dy * slope(s.value, o.activation);
        of_residual.add(g[size_t(t)] * x, std::fabs(dy * x) * (1 + s.size));
        dx[size_t(t)].add(omega * g[size_t(t)], std::fabs(omega * dy) * (1 + s.size));
      }
      for (int64_t half = 0; half < o.halves(); half++) {
        const bool back = half == 1 || o.direction == EmaDirection::reverse;
        for (int64_t n = 0; n < N; n++) {
          const int64_t i = (half * o.channels + d) * N + n, j = half * N + n;
          const Real p = sigmoid(value(c.damping[i])), q = 1 - p * sigmoid(value(c.decay[i]));
          const Real beta = p * value(c.expansion[i]), gamma = root * value(c.projection[i]);
          const State& s = states[size_t(j)];
          const int64_t at_state = (b * o.channels + d) * N + n;
          Real e = o.state ? value(c.grad_state[at_state]) : 0, e_size = std::fabs(e);
          if (o.state && L > 0) of_q[size_t(j)].add(e * s.v.back(), std::fabs(e) * s.v_size.back());
          const Real q_k = std::pow(q, Real(taps));
          for (int64_t k = L; k-- > 0;) {
            const int64_t t = back ? L - 1 - k : k;
            const auto size_of = [&](int64_t u) {
              return std::fabs(Real(value(c.grad[c.at(u, b, d)]))) * (1 + z[size_t(u)].size);
            };
            const Real gs = size_of(t);
            of_c[size_t(j)].add(g[size_t(t)] * s.h[size_t(k)], gs * s.h_size[size_t(k)]);
            of_q[size_t(j)].add(gamma * g[size_t(t)] * s.v[size_t(k)], std::fabs(gamma) * gs * s.v_size[size_t(k)]);
            Real late = 0, late_size = 0;
            if (k + taps < L) {
              const int64_t u = back ? L - 1 - k - taps : k + taps;
              late = q_k * g[size_t(u)], late_size = q_k * size_of(u);
            }
            const Real lambda = e + gamma * (g[size_t(t)] - late);
            const Real lambda_size = e_size + std::fabs(gamma) * (gs + late_size);
            of_b[size_t(j)].add(lambda * in[size_t(t)], lambda_size * std::fabs(in[size_t(t)]));
            if (!(o.mask && c.mask[b * L + t])) dx[size_t(t)].add(beta * lambda, std::fabs(beta) * lambda_size);
            e = q * lambda, e_size = q * lambda_size;
          }
          if (o.state) check("dstate", c.dstate[at_state], {e, e_size}, n);
        }
      }
      for (int64_t t = 0; t < L; t++) check("dx", c.dx[c.at(t, b, d)], dx[size_t(t)], t);
    }
    if (o.residual) check("dresidual", c.dresidual[d], of_residual, d);
    for (int64_t half = 0; half < o.halves(); half++)
      for (int64_t n = 0; n < N; n++) {
        const int64_t i = (half * o.channels + d) * N + n;
        const size_t j = size_t(half * N + n);
        const Real p = sigmoid(value(c.damping[i])), a = sigmoid(value(c.decay[i])), beta = value(c.expansion[i]);
        const Real pp = p * (1 - p), aa = a * (1 - a);
        check("dprojection", c.dprojection[i], {of_c[j].value * root, of_c[j].size * root}, i);
        check("dexpansion", c.dexpansion[i], {of_b[j].value * p, of_b[j].size * p}, i);
        check("ddecay", c.ddecay[i], {-of_q[j].value * p * aa, of_q[j].size * p * aa}, i);
        check(
            "ddamping", c.ddamping[i],
            {(of_b[j].value * beta - of_q[j].value * a) * pp, (of_b[j].size * std::fabs(beta) + of_q[j].size * a) * pp},
            i);
      }
  }
}

template <typename T>
void values(const Options& o) {
  Case<T> c(o), again(o);
  c.run(kSerial);
  CHECK(c.intact(), "%s wrote outside, %s", Type<T>::name, o.text().c_str());
  compare(c);
  again.run(kScattered);
  bool same = c.y.equals(again.y) && c.dx.equals(again.dx) && c.ddamping.equals(again.ddamping) &&
              c.ddecay.equals(again.ddecay) && c.dexpansion.equals(again.dexpansion) &&
              c.dprojection.equals(again.dprojection);
  if (o.residual) same = same && c.dresidual.equals(again.dresidual);
  if (o.state) same = same && c.final_state.equals(again.final_state) && c.dstate.equals(again.dstate);
  CHECK(same, "%s: the split of the tasks changes the result, %s", Type<T>::name, o.text().c_str());
}

// Compares the path of one step with the general one.
template <typename T>
void step(Options o) {
  o.length = 1;
  Case<T> c(o), other(o);
  c.run(kSerial);
  cpu::kernels<cpu::EmaStep<T>>().run(o.shape(), other.arguments(), other.x.data(), o.strides(), other.y.data(),
                                      o.strides(), o.state ? other.final_state.data() : nullptr);
  CHECK(other.y.intact() && other.final_state.intact(), "%s step wrote outside, %s", Type<T>::name, o.text().c_str());
  std::swap(c.y, other.y);
  if (o.state) std::swap(c.final_state, other.final_state);
  compare(c);
}

}  // namespace

TEST_CASE("ema_scan") {
  using enum EmaDirection;
  using A = EmaActivation;
  for_each_type([]<typename T>() {
    values<T>({37, 2, 5, 4});
    values<T>({70, 3, 65, 1, 0, forward, A::silu, 1});
    values<T>({33, 2, 64, 5, 0, reverse, A::gelu, 2, true, true});
    values<T>({40, 1, 17, 4, 0, forward, A::tanh, 0, true});
    values<T>({65, 2, 20, 6, 0, bidirectional, A::relu, 0, false, true});
    values<T>({64, 1, 15, 3, 0, bidirectional, A::identity, 2, false, true});
    values<T>({100, 2, 18, 4, 7, forward, A::silu, 0, false, true});
    values<T>({150, 1, 7, 2, 40, reverse, A::identity, 1});
    values<T>({90, 2, 9, 3, 64, bidirectional, A::gelu, 2});
    values<T>({20, 2, 3, 2, 1, forward, A::identity, 0, false, false, false});
    values<T>({9, 1, 3, 64, 0, forward, A::silu, 0, true, false, false});
    values<T>({1, 2, 3, 4, 0, bidirectional, A::silu});
    for (const Options& empty : {Options{0, 2, 3, 4, 0, forward, A::silu, 0, true}, Options{5, 0, 3, 4},
                                 Options{5, 2, 0, 4, 0, bidirectional}})
      values<T>(empty);
    for (const int64_t states : {1, 3, 4, 16}) {
      step<T>({1, 3, 70, states, 0, forward, A::silu, 0, true, false});
      step<T>({1, 2, 7, states, 0, reverse, A::identity, 2, true, true});
      step<T>({1, 1, 65, states, 0, forward, A::gelu, 1, false, false, false});
    }
  });
  // long and narrow: cut in time
  values<float>({4500, 1, 3, 2, 0, forward, A::silu, 0, true});
  values<float>({4500, 1, 2, 4, 0, bidirectional, A::gelu, 0, false, true});
  values<double>({4501, 1, 2, 3, 0, reverse, A::identity, 2, true, true});
  values<double>({4200, 1, 1, 2, 300, bidirectional, A::silu, 1});
}

}  // namespace fastasr::test
