// SPDX-License-Identifier: Apache-2.0
#include <complex>

#include "cpu/ema/ema_scan.h"
#include "tests/check.h"
#include "tests/ema_case.h"
#include "tests/parallel.h"

namespace fastasr::test {
namespace {

using Real = long double;
using Complex = std::complex<Real>;

// Time comes first and there is no activation: the tests of ema_scan cover those.
template <typename T>
void run(ComplexEmaCase<T>& c, const cpu::Parallel& parallel) {
  const EmaOptions& o = c.o;
  const cpu::EmaShape shape{o.length,
                            o.batch,
                            o.channels,
                            o.states,
                            o.truncation,
                            cpu::EmaDirection(o.direction),
                            cpu::EmaActivation::identity};
  const cpu::ComplexEmaParameters<compute_t<T>> p{
      c.alpha, c.delta, c.theta, c.gamma, c.if_residual(c.residual), c.if_state(c.state), c.mask_or_null()};
  const cpu::EmaStrides s{o.batch * o.channels, o.channels, 1};
  cpu::kernels<cpu::EmaForward<T>>().complex(shape, p, c.x.data, s, c.y.data, s, c.if_state(c.final_state), parallel);
  cpu::kernels<cpu::EmaBackward<T>>().complex(
      shape, p, c.x.data, s, c.grad.data, s, c.if_state(c.grad_state), c.dx.data, s,
      {c.dalpha, c.ddelta, c.dtheta, c.dgamma, c.if_residual(c.dresidual), c.if_state(c.dstate)}, parallel);
}

// Holds a value and the size of the sum behind it.
struct ComplexSum {
  Complex value = 0;
  Real size = 0;
  void add(Complex term, Real of) { value += term, size += of; }
};

// Computes one channel at a time, all in long double, with the derivatives of docs/ops/complex_ema_scan.md.
template <typename T>
void compare(ComplexEmaCase<T>& c) {
  const EmaOptions& o = c.o;
  const int64_t L = o.length, N = o.states, taps = o.truncation > 0 ? std::min(o.truncation, L) : L;
  const Real root = 1 / std::sqrt(Real(N)), turn = 2 * std::acos(Real(-1)) / Real(N);
  const Real loose = sizeof(compute_t<T>) == 8 ? 8192 : 256;
  for (int64_t d = 0; d < o.channels; d++) {
    const Real omega = o.residual ? c.residual(d) : 0;
    Sum of_residual;
    std::vector<Sum> y(size_t(o.batch * L)), dx(y);
    for (int64_t b = 0; b < o.batch; b++)
      for (int64_t t = 0; t < L; t++) {
        y[b * L + t].add(omega * c.x(t, b, d));
        dx[b * L + t].add(omega * c.grad(t, b, d));
        of_residual.add(c.grad(t, b, d) * c.x(t, b, d));
      }
    for (int64_t half = 0; half < o.halves(); half++) {
      const int64_t row = half * o.channels + d;
      const Real s = logistic(c.theta(row));
      Sum dtheta;
      for (int64_t n = 0; n < N; n++) {
        const int64_t i = row * N + n;
        const Real p = logistic(c.alpha(i)), a = logistic(c.delta(i)), r = 1 - p * a;
        const Complex phase = std::polar(Real(1), Real(n + 1) * s * turn), q = r * phase;
        const Complex w = root * Complex(c.gamma(2 * i), c.gamma(2 * i + 1));
        const Complex q_k = std::pow(q, int(taps)), slope = Real(taps) * std::pow(q, int(taps - 1));
        ComplexSum dc, dq;
        Sum dp;
        for (int64_t b = 0; b < o.batch; b++) {
          const auto input = [&](int64_t k) -> Real {
            const int64_t t = o.time(half, k);
            return k < 0 || (o.mask && c.mask[b * L + t]) ? 0 : c.x(t, b, d);
          };
          const int64_t j = 2 * ((b * o.channels + d) * N + n);
          Complex h = o.state ? Complex(c.state(j), c.state(j + 1)) : 0, v = 0;
          Real h_size = std::abs(h), v_size = 0;
          std::vector<Complex> vs;
          Reals v_sizes;
          for (int64_t k = 0; k < L; k++) {
            const int64_t t = o.time(half, k);
            const Real x = input(k), late = input(k - taps), g = c.grad(t, b, d);
            v = q * v + h - slope * p * late;
            v_size = r * v_size + h_size + std::abs(slope) * p * std::fabs(late);
            h = q * h + p * (x - q_k * late);
            h_size = r * h_size + p * (std::fabs(x) + std::abs(q_k) * std::fabs(late));
            y[b * L + t].add((w * h).real(), std::abs(w) * h_size);
            dc.add(g * h, std::fabs(g) * h_size);
            dq.add(w * g * v, std::abs(w * g) * v_size);
            vs.push_back(v), v_sizes.push_back(v_size);
          }
          if (o.state) {
            EXPECT(c.final_state, j, h.real(), loose * h_size);
            EXPECT(c.final_state, j + 1, h.imag(), loose * h_size);
          }
          Complex e = o.state ? Complex(c.grad_state(j), -c.grad_state(j + 1)) : 0;
          Real e_size = std::abs(e);
          if (o.state && L > 0) dq.add(e * vs.back(), e_size * v_sizes.back());
          for (int64_t k = L; k-- > 0;) {
            const int64_t t = o.time(half, k);
            const Real g = c.grad(t, b, d), late = k + taps < L ? c.grad(o.time(half, k + taps), b, d) : 0;
            const Complex lambda = e + w * (g - q_k * late);
            const Real size = e_size + std::abs(w) * (std::fabs(g) + std::abs(q_k) * std::fabs(late));
            dp.add((lambda * input(k)).real(), size * std::fabs(input(k)));
            if (!(o.mask && c.mask[b * L + t])) dx[b * L + t].add((p * lambda).real(), p * size);
            e = q * lambda, e_size = r * size;
          }
          if (o.state) {
            EXPECT(c.dstate, j, e.real(), loose * e_size);
            EXPECT(c.dstate, j + 1, -e.imag(), loose * e_size);
          }
        }
        const Real dr = (dq.value * phase).real(), pp = p * (1 - p), aa = a * (1 - a);
        dtheta.add(-Real(n + 1) * (dq.value * q).imag(), Real(n + 1) * dq.size * r);
        EXPECT(c.dgamma, 2 * i, root * dc.value.real(), loose * root * dc.size);
        EXPECT(c.dgamma, 2 * i + 1, -root * dc.value.imag(), loose * root * dc.size);
        EXPECT(c.ddelta, i, -dr * p * aa, loose * dq.size * p * aa);
        EXPECT(c.dalpha, i, (dp.value - dr * a) * pp, loose * (dp.size + dq.size * a) * pp);
      }
      const Real ss = turn * s * (1 - s);
      EXPECT(c.dtheta, row, dtheta.value * ss, loose * dtheta.size * ss);
    }
    for (int64_t b = 0; b < o.batch; b++)
      for (int64_t t = 0; t < L; t++) {
        EXPECT(c.y.data, c.y.index(t, b, d), y[b * L + t].value, loose * y[b * L + t].size);
        EXPECT(c.dx.data, c.dx.index(t, b, d), dx[b * L + t].value, loose * dx[b * L + t].size);
      }
    if (o.residual) EXPECT(c.dresidual, d, of_residual.value, loose * of_residual.size);
  }
}

template <typename T>
void values(const EmaOptions& o) {
  INFO(Type<T>::name, " ", o.text());
  ComplexEmaCase<T> c(o), again(o);
  run(c, kSerial);
  compare(c);
  run(again, kScattered);
  c.each_result(again, [&](const char* name, auto& a, auto& b) {
    CHECK(a.equals(b), "the split of the tasks changes %s", name);
  });
}

}  // namespace

TEST_CASE("complex_ema_scan") {
  const auto options = [](int64_t length, int64_t batch, int64_t channels, int64_t states, int64_t truncation = 0,
                          int direction = kForward, bool state = false, bool mask = false, bool residual = true) {
    return EmaOptions{length, batch, channels, states, truncation, direction, kIdentity, kLbd, state, mask, residual};
  };
  for_each_type([&]<typename T>() {
    values<T>(options(37, 2, 5, 4));
    values<T>(options(70, 3, 65, 1));
    values<T>(options(33, 2, 64, 5, 0, kReverse, true, true));
    values<T>(options(40, 1, 17, 3, 0, kForward, true));
    values<T>(options(65, 2, 20, 6, 0, kBidirectional, false, true));
    values<T>(options(100, 2, 18, 4, 7, kForward, false, true));
    values<T>(options(90, 2, 9, 3, 64, kBidirectional));
    values<T>(options(20, 2, 3, 2, 1, kReverse, false, false, false));
    values<T>(options(9, 1, 3, 64, 0, kForward, true, false, false));
    values<T>(options(1, 2, 3, 4, 0, kForward, true));
    values<T>(options(0, 2, 3, 4, 0, kForward, true));
    values<T>(options(5, 0, 3, 4));
    values<T>(options(5, 2, 0, 4));
  });
  // long and narrow: cut in time
  values<float>(options(4500, 1, 3, 2, 0, kForward, true));
  values<double>(options(4501, 1, 2, 3, 0, kReverse, true, true));
  values<double>(options(4200, 1, 1, 2, 300, kBidirectional));
}

}  // namespace fastasr::test
