// SPDX-License-Identifier: Apache-2.0
#include "cpu/ema/ema_scan.h"

#include <algorithm>
#include <complex>

#include "tests/check.h"
#include "tests/parallel.h"

namespace fastasr::test {
namespace {

using cpu::EmaActivation;
using cpu::EmaDirection;
using Real = long double;
using Complex = std::complex<Real>;

// Time comes first and there is no activation: the tests of ema_scan cover those.
struct Options {
  int64_t length, batch, channels, states;
  int64_t truncation = 0;
  EmaDirection direction = EmaDirection::forward;
  bool state = false, mask = false, residual = true;

  int64_t halves() const { return direction == EmaDirection::bidirectional ? 2 : 1; }
  cpu::EmaShape shape() const {
    return {length, batch, channels, states, truncation, direction, EmaActivation::identity};
  }
};

Real sigmoid(Real z) { return 1 / (1 + std::exp(-z)); }

template <typename T>
struct Case {
  using C = compute_t<T>;
  Options o;
  Buffer<T> x, grad, y, dx;
  Buffer<C> alpha, delta, theta, gamma, residual, state, grad_state, final_state;
  Buffer<C> dalpha, ddelta, dtheta, dgamma, dresidual, dstate;
  Buffer<uint8_t> mask;

  explicit Case(const Options& options)
      : o(options),
        x(elements(), 1),
        grad(elements(), 3),
        y(elements(), 1),
        dx(elements(), 2),
        alpha(rows() * o.states, 1),
        delta(rows() * o.states),
        theta(rows()),
        gamma(2 * rows() * o.states),
        residual(o.channels),
        state(values()),
        grad_state(values()),
        final_state(values()),
        dalpha(rows() * o.states),
        ddelta(rows() * o.states),
        dtheta(rows()),
        dgamma(2 * rows() * o.states),
        dresidual(o.channels),
        dstate(values()),
        mask(o.batch * o.length) {
    Random random(static_cast<uint64_t>(o.length * 31 + o.channels * 7 + o.states));
    for (Buffer<T>* b : {&x, &grad}) b->fill(random);
    for (Buffer<C>* b : {&alpha, &delta, &theta, &gamma, &residual, &state, &grad_state}) b->fill(random);
    for (int64_t i = 0; i < mask.size(); i++) mask[i] = random.uniform() < 0.3;
  }
  int64_t elements() const { return o.length * o.batch * o.channels; }
  int64_t rows() const { return o.halves() * o.channels; }
  int64_t values() const { return 2 * o.batch * o.channels * o.states; }

  void run(const cpu::Parallel& parallel) {
    const cpu::ComplexEmaParameters<C> p{alpha.data(),
                                         delta.data(),
                                         theta.data(),
                                         gamma.data(),
                                         o.residual ? residual.data() : nullptr,
                                         o.state ? state.data() : nullptr,
                                         o.mask ? mask.data() : nullptr};
    const cpu::EmaStrides s{o.batch * o.channels, o.channels, 1};
    cpu::kernels<cpu::EmaForward<T>>().complex(o.shape(), p, x.data(), s, y.data(), s,
                                               o.state ? final_state.data() : nullptr, parallel);
    cpu::kernels<cpu::EmaBackward<T>>().complex(
        o.shape(), p, x.data(), s, grad.data(), s, o.state ? grad_state.data() : nullptr, dx.data(), s,
        {dalpha.data(), ddelta.data(), dtheta.data(), dgamma.data(), o.residual ? dresidual.data() : nullptr,
         o.state ? dstate.data() : nullptr},
        parallel);
  }
  bool intact() const {
    return y.intact() && dx.intact() && final_state.intact() && dalpha.intact() && ddelta.intact() && dtheta.intact() &&
           dgamma.intact() && dresidual.intact() && dstate.intact();
  }
};

// Holds a value and the size of the sum behind it.
struct Sum {
  Complex value = 0;
  Real size = 0;
  void add(Complex term, Real of) { value += term, size += of; }
};

// Computes one channel at a time, all in long double, with the derivatives of docs/ops/complex_ema_scan.md.
template <typename T>
void compare(Case<T>& c) {
  const Options& o = c.o;
  const int64_t L = o.length, N = o.states, taps = o.truncation > 0 ? std::min(o.truncation, L) : L;
  const Real root = 1 / std::sqrt(Real(N)), turn = 2 * std::acos(Real(-1)) / Real(N);
  const Real loose = sizeof(compute_t<T>) == 8 ? 8192 : 256;
  const auto check = [&](const char* what, auto got, Real expected, Real size, int64_t i) {
    CHECK(close(got, expected, loose * size),
          "%s %s, %ldx%ldx%ld N %ld K %ld direction %d, %ld: expected %.9Lg, got %.9g", Type<T>::name, what, long(L),
          long(o.batch), long(o.channels), long(N), long(o.truncation), int(o.direction), long(i), expected,
          static_cast<double>(value(got)));
  };
  const auto at = [&](int64_t t, int64_t b, int64_t d) { return (t * o.batch + b) * o.channels + d; };
  for (int64_t d = 0; d < o.channels; d++) {
    const Real omega = o.residual ? value(c.residual[d]) : 0;
    Sum of_residual;
    std::vector<Sum> y(size_t(o.batch * L)), dx(y.size());
    for (int64_t b = 0; b < o.batch; b++)
      for (int64_t t = 0; t < L; t++) {
        const Real x = value(c.x[at(t, b, d)]), g = value(c.grad[at(t, b, d)]);
        y[size_t(b * L + t)].add(omega * x, std::fabs(omega * x));
        dx[size_t(b * L + t)].add(omega * g, std::fabs(omega * g));
        of_residual.add(g * x, std::fabs(g * x));
      }
    for (int64_t half = 0; half < o.halves(); half++) {
      const bool back = half == 1 || o.direction == EmaDirection::reverse;
      const int64_t row = half * o.channels + d;
      const Real s = sigmoid(value(c.theta[row]));
      Sum dtheta;
      for (int64_t n = 0; n < N; n++) {
        const int64_t i = row * N + n;
        const Real p = sigmoid(value(c.alpha[i])), a = sigmoid(value(c.delta[i])), r = 1 - p * a;
        const Complex phase = std::polar(Real(1), Real(n + 1) * s * turn), q = r * phase;
        const Complex w = root * Complex(value(c.gamma[2 * i]), value(c.gamma[2 * i + 1]));
        const Complex q_k = std::pow(q, int(taps)), slope = Real(taps) * std::pow(q, int(taps - 1));
        Sum dc, dq, dp;
        for (int64_t b = 0; b < o.batch; b++) {
          const auto input = [&](int64_t k) -> Real {
            const int64_t t = back ? L - 1 - k : k;
            return k < 0 || (o.mask && c.mask[b * L + t]) ? 0 : value(c.x[at(t, b, d)]);
          };
          const int64_t j = 2 * ((b * o.channels + d) * N + n);
          Complex h = o.state ? Complex(value(c.state[j]), value(c.state[j + 1])) : 0, v = 0;
          Real h_size = std::abs(h), v_size = 0;
          std::vector<Complex> vs;
          std::vector<Real> v_sizes;
          for (int64_t k = 0; k < L; k++) {
            const int64_t t = back ? L - 1 - k : k;
            const Real x = input(k), late = input(k - taps), g = value(c.grad[at(t, b, d)]);
            v = q * v + h - slope * p * late;
            v_size = r * v_size + h_size + std::abs(slope) * p * std::fabs(late);
            h = q * h + p * (x - q_k * late);
            h_size = r * h_size + p * (std::fabs(x) + std::abs(q_k) * std::fabs(late));
            y[size_t(b * L + t)].add((w * h).real(), std::abs(w) * h_size);
            dc.add(g * h, std::fabs(g) * h_size);
            dq.add(w * g * v, std::abs(w * g) * v_size);
            vs.push_back(v), v_sizes.push_back(v_size);
          }
          if (!o.state) {
            h = 0, h_size = 0;
          } else {
            check("final state", c.final_state[j], h.real(), h_size, n);
            check("final state", c.final_state[j + 1], h.imag(), h_size, n);
          }
          Complex e = o.state ? Complex(value(c.grad_state[j]), -value(c.grad_state[j + 1])) : 0;
          Real e_size = std::abs(e);
          if (o.state && L > 0) dq.add(e * vs.back(), e_size * v_sizes.back());
          for (int64_t k = L; k-- > 0;) {
            const int64_t t = back ? L - 1 - k : k, u = back ? t - taps : t + taps;
            const Real g = value(c.grad[at(t, b, d)]), late = k + taps < L ? Real(value(c.grad[at(u, b, d)])) : 0;
            const Complex lambda = e + w * (g - q_k * late);
            const Real size = e_size + std::abs(w) * (std::fabs(g) + std::abs(q_k) * std::fabs(late));
            dp.add((lambda * input(k)).real(), size * std::fabs(input(k)));
            if (!(o.mask && c.mask[b * L + t])) dx[size_t(b * L + t)].add((p * lambda).real(), p * size);
            e = q * lambda, e_size = r * size;
          }
          if (o.state) {
            check("dstate", c.dstate[j], e.real(), e_size, n);
            check("dstate", c.dstate[j + 1], -e.imag(), e_size, n);
          }
        }
        const Real dr = (dq.value * phase).real(), pp = p * (1 - p), aa = a * (1 - a);
        dtheta.add(-Real(n + 1) * (dq.value * q).imag(), Real(n + 1) * dq.size * r);
        check("dgamma", c.dgamma[2 * i], root * dc.value.real(), root * dc.size, i);
        check("dgamma", c.dgamma[2 * i + 1], -root * dc.value.imag(), root * dc.size, i);
        check("ddelta", c.ddelta[i], -dr * p * aa, dq.size * p * aa, i);
        check("dalpha", c.dalpha[i], (dp.value.real() - dr * a) * pp, (dp.size + dq.size * a) * pp, i);
      }
      const Real ss = turn * s * (1 - s);
      check("dtheta", c.dtheta[row], dtheta.value.real() * ss, dtheta.size * ss, row);
    }
    for (int64_t b = 0; b < o.batch; b++)
      for (int64_t t = 0; t < L; t++) {
        const Sum &z = y[size_t(b * L + t)], &e = dx[size_t(b * L + t)];
        check("y", c.y[at(t, b, d)], z.value.real(), z.size, t);
        check("dx", c.dx[at(t, b, d)], e.value.real(), e.size, t);
      }
    if (o.residual) check("dresidual", c.dresidual[d], of_residual.value.real(), of_residual.size, d);
  }
}

template <typename T>
void values(const Options& o) {
  Case<T> c(o), again(o);
  c.run(kSerial);
  CHECK(c.intact(), "%s wrote outside, %ld steps", Type<T>::name, long(o.length));
  compare(c);
  again.run(kScattered);
  bool same = c.y.equals(again.y) && c.dx.equals(again.dx) && c.dalpha.equals(again.dalpha) &&
              c.ddelta.equals(again.ddelta) && c.dtheta.equals(again.dtheta) && c.dgamma.equals(again.dgamma);
  if (o.residual) same = same && c.dresidual.equals(again.dresidual);
  if (o.state) same = same && c.final_state.equals(again.final_state) && c.dstate.equals(again.dstate);
  CHECK(same, "%s: the split of the tasks changes the result, %ld steps", Type<T>::name, long(o.length));
}

}  // namespace

TEST_CASE("complex_ema_scan") {
  using enum EmaDirection;
  for_each_type([]<typename T>() {
    values<T>({37, 2, 5, 4});
    values<T>({70, 3, 65, 1});
    values<T>({33, 2, 64, 5, 0, reverse, true, true});
    values<T>({40, 1, 17, 3, 0, forward, true});
    values<T>({65, 2, 20, 6, 0, bidirectional, false, true});
    values<T>({100, 2, 18, 4, 7, forward, false, true});
    values<T>({90, 2, 9, 3, 64, bidirectional});
    values<T>({20, 2, 3, 2, 1, reverse, false, false, false});
    values<T>({9, 1, 3, 64, 0, forward, true, false, false});
    values<T>({1, 2, 3, 4, 0, forward, true});
    for (const Options& empty : {Options{0, 2, 3, 4, 0, forward, true}, Options{5, 0, 3, 4}, Options{5, 2, 0, 4}})
      values<T>(empty);
  });
  // long and narrow: cut in time
  values<float>({4500, 1, 3, 2, 0, forward, true});
  values<double>({4501, 1, 2, 3, 0, reverse, true, true});
  values<double>({4200, 1, 1, 2, 300, bidirectional});
}

}  // namespace fastasr::test
