// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <complex>
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

// The four parameters, states and results are those of the real average, or of the complex one: alpha, delta, theta and
// gamma in the order of the real ones, real and imaginary parts as the last dimension.
template <typename T, bool complex = false>
struct EmaCase {
  using C = compute_t<T>;
  static constexpr int64_t kParts = complex ? 2 : 1;
  EmaOptions o;
  Random random;
  int64_t parameters = o.rows() * o.states, angles = complex ? o.rows() : parameters;
  int64_t states = kParts * o.batch * o.channels * o.states;
  Sequence<T> x, grad, y, dx;
  Buffer<C> damping{parameters, 1}, decay{parameters}, expansion{angles}, projection{kParts * parameters},
      residual{o.channels}, state{states}, grad_state{states}, final_state{states};
  Buffer<C> ddamping{parameters}, ddecay{parameters}, dexpansion{angles}, dprojection{kParts * parameters},
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
// for each element of the results. Kernels are k_j = Re sum over n of c b q^j. Complex numbers are derivatives D for
// which d loss = Re(D change), until they are compared.
template <typename T, bool complex, typename F>
void each_result(EmaCase<T, complex>& c, const F& check) {
  using Real = long double;
  using Z = std::conditional_t<complex, std::complex<Real>, Real>;
  struct Sized {
    Z value = 0;
    Real size = 0;
    void add(Z term, Real of) { value += term, size += of; }
  };
  constexpr int64_t kParts = complex ? 2 : 1;
  const EmaOptions& o = c.o;
  const int64_t L = o.length, N = o.states, taps = o.truncation > 0 ? std::min(o.truncation, L) : L;
  const Real root = 1 / std::sqrt(Real(N)), turn = 2 * std::acos(Real(-1)) / Real(N);
  const auto read = [](auto& from, int64_t i) -> Z {
    if constexpr (complex) return {from(2 * i), from(2 * i + 1)};
    return from(i);
  };
  // Checks number i; sign -1: the kernel writes its conjugate.
  const auto check_number = [&](const char* name, auto& got, int64_t i, const Sized& of, Real sign = 1) {
    check(name, got[kParts * i], Sum{std::real(of.value), of.size}, kParts * i);
    if constexpr (complex) check(name, got[2 * i + 1], Sum{sign * of.value.imag(), of.size}, 2 * i + 1);
  };
  struct Coefficients {
    Real p, a, radius, b;
    Z phase, q, w, q_k, slope_k;
  };
  const auto coefficients = [&](int64_t row, int64_t n) -> Coefficients {
    const int64_t i = row * N + n;
    const Real p = logistic(c.damping(i)), a = logistic(c.decay(i)), r = 1 - p * a;
    const Z w = root * read(c.projection, i);
    if constexpr (complex) {
      const Real angle = Real(n + 1) * logistic(c.expansion(row)) * turn, k = Real(taps);
      return {p,
              a,
              r,
              p,
              std::polar(Real(1), angle),
              std::polar(r, angle),
              w,
              std::polar(std::pow(r, k), k * angle),
              k * std::polar(std::pow(r, k - 1), (k - 1) * angle)};
    } else {
      return {p, a, r, p * c.expansion(i), 1, r, w, std::pow(r, Real(taps)), Real(taps) * std::pow(r, Real(taps - 1))};
    }
  };
  for (int64_t d = 0; d < o.channels; d++) {
    std::vector<Sized> of_q(size_t(o.halves() * N)), of_c(of_q);
    std::vector<Sum> of_b(of_q.size());
    Sum of_residual;
    const Real omega = o.residual ? c.residual(d) : 0;
    for (int64_t b = 0; b < o.batch; b++) {
      std::vector<Sum> z(size_t(L), Sum{}), dx(z);
      Reals in(size_t(L), 0), g(in), g_size(in);
      struct State {
        std::vector<Sized> h, v;
      };
      std::vector<State> states(of_q.size());
      for (int64_t t = 0; t < L; t++) {
        in[t] = o.mask && c.mask[b * L + t] ? 0 : c.x(t, b, d);
        z[t].add(omega * c.x(t, b, d));
      }
      for (int64_t half = 0; half < o.halves(); half++)
        for (int64_t n = 0; n < N; n++) {
          const Coefficients k = coefficients(half * o.channels + d, n);
          const int64_t at_state = (b * o.channels + d) * N + n;
          State& s = states[half * N + n];
          Sized h, v;
          if (o.state) h.add(read(c.state, at_state), std::abs(read(c.state, at_state)));
          for (int64_t step = 0; step < L; step++) {
            const Real x = in[o.time(half, step)], late = step >= taps ? in[o.time(half, step - taps)] : 0;
            v = {k.q * v.value + h.value - k.slope_k * k.b * late,
                 k.radius * v.size + h.size + std::abs(k.slope_k * k.b * late)};
            h = {k.q * h.value + k.b * (x - k.q_k * late),
                 k.radius * h.size + std::fabs(k.b) * (std::fabs(x) + std::abs(k.q_k * late))};
            s.h.push_back(h), s.v.push_back(v);
            z[o.time(half, step)].add(std::real(k.w * h.value), std::abs(k.w) * h.size);
          }
          if (o.state) check_number("final_state", c.final_state, at_state, h);
        }
      for (int64_t t = 0; t < L; t++) {
        const Activated out = activated(o.activation, z[t].value);
        check("y", c.y.at(t, b, d), Sum{out.value, z[t].size}, t);
        const Real dy = c.grad(t, b, d), x = c.x(t, b, d);
        // the error of z shifts the slope
        g[t] = dy * out.slope, g_size[t] = std::fabs(dy) * (o.activation == kIdentity ? 1 : 1 + z[t].size);
        of_residual.add(g[t] * x, g_size[t] * std::fabs(x));
        dx[t].add(omega * g[t], std::fabs(omega) * g_size[t]);
      }
      for (int64_t half = 0; half < o.halves(); half++)
        for (int64_t n = 0; n < N; n++) {
          const Coefficients k = coefficients(half * o.channels + d, n);
          const int64_t j = half * N + n, at_state = (b * o.channels + d) * N + n;
          const State& s = states[j];
          Sized e;
          if (o.state) {
            if constexpr (complex)
              e.value = std::conj(read(c.grad_state, at_state));
            else
              e.value = read(c.grad_state, at_state);
            e.size = std::abs(e.value);
            if (L > 0) of_q[j].add(e.value * s.v.back().value, e.size * s.v.back().size);
          }
          for (int64_t step = L; step-- > 0;) {
            const int64_t t = o.time(half, step), u = step + taps < L ? o.time(half, step + taps) : -1;
            of_c[j].add(g[t] * s.h[step].value, g_size[t] * s.h[step].size);
            of_q[j].add(k.w * g[t] * s.v[step].value, std::abs(k.w) * g_size[t] * s.v[step].size);
            const Z late = u < 0 ? Z(0) : k.q_k * g[u];
            const Real late_size = u < 0 ? 0 : std::abs(k.q_k) * g_size[u];
            const Sized lambda{e.value + k.w * (g[t] - late), e.size + std::abs(k.w) * (g_size[t] + late_size)};
            of_b[j].add(std::real(lambda.value) * in[t], lambda.size * std::fabs(in[t]));
            if (!(o.mask && c.mask[b * L + t])) dx[t].add(k.b * std::real(lambda.value), std::fabs(k.b) * lambda.size);
            e = {k.q * lambda.value, k.radius * lambda.size};
          }
          if (o.state) check_number("dstate", c.dstate, at_state, e, -1);
        }
      for (int64_t t = 0; t < L; t++) check("dx", c.dx.at(t, b, d), dx[t], t);
    }
    if (o.residual) check("dresidual", c.dresidual[d], of_residual, d);
    for (int64_t half = 0; half < o.halves(); half++) {
      const int64_t row = half * o.channels + d;
      Sum dtheta;
      for (int64_t n = 0; n < N; n++) {
        const int64_t i = row * N + n, j = half * N + n;
        const Coefficients k = coefficients(row, n);
        const Real beta = complex ? 1 : c.expansion(i), pp = k.p * (1 - k.p), aa = k.a * (1 - k.a);
        const Real dr = std::real(of_q[j].value * k.phase), size = of_q[j].size;
        check_number("dprojection", c.dprojection, i, {of_c[j].value * root, of_c[j].size * root}, -1);
        check("ddecay", c.ddecay[i], Sum{-dr * k.p * aa, size * k.p * aa}, i);
        check("ddamping", c.ddamping[i],
              Sum{(of_b[j].value * beta - dr * k.a) * pp, (of_b[j].size * std::fabs(beta) + size * k.a) * pp}, i);
        if constexpr (complex)
          dtheta.add(-Real(n + 1) * std::imag(of_q[j].value * k.q), Real(n + 1) * size * k.radius);
        else
          check("dexpansion", c.dexpansion[i], Sum{of_b[j].value * k.p, of_b[j].size * k.p}, i);
      }
      if constexpr (complex) {
        const Real s = logistic(c.expansion(row)), ss = turn * s * (1 - s);
        check("dexpansion", c.dexpansion[row], Sum{dtheta.value * ss, dtheta.size * ss}, row);
      }
    }
  }
}

}  // namespace fastasr::test
