// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <complex>
#include <vector>

#include "cpu/ema/ema_scan.h"

// The differences between the real and the complex average: how the coefficients come from the parameters, how the
// gradients of the parameters come from those of the coefficients, and the arithmetic of states outside of blocks.
// Arrays over states hold `width` rows of 64 channels for each: the number, or its real and its imaginary part.
namespace fastasr::cpu {

// The coefficients of one tile, [N][width][64] each. `low` is what `decay` lost by rounding, `polar` its radius and
// angle: both exist for complex numbers in double alone and are null otherwise. late = in q^K and slope = in K q^(K-1)
// exist in truncated scans alone. `real` says that `in` has no imaginary part.
template <typename P>
struct EmaArrays {
  P decay, in, out, low, polar, late, slope;
  bool real;
};
template <typename C>
using EmaWeights = EmaArrays<const C*>;

// Calls are few: through a table the scans are compiled once for both.
template <typename C>
struct EmaNumbers {
  int64_t width;
  bool precise;  // there are low and polar

  virtual const EmaBlock<C>& block() const = 0;
  // Packs m channels from row `first` on. In the unit form, b becomes a factor of c.
  virtual void pack(const EmaParameters<C>& p, int64_t first, int64_t m, int64_t states, bool unit,
                    const EmaArrays<C*>& to) const = 0;
  virtual void pack_late(double k, int64_t states, const EmaArrays<C*>& a) const = 0;
  // h = q h
  virtual void decay(const EmaWeights<C>& w, C* h, int64_t states) const = 0;
  // Computes out = g q^n + local, where out may be g; with v, also v and g's share in it.
  virtual void carry(const EmaWeights<C>& w, int64_t states, double n, const C* g, const C* local, C* out, const C* v,
                     const C* local_v, C* out_v) const = 0;
  // Turns the gradient of a state into its derivative, or back.
  virtual void conjugate(C* h, int64_t states) const = 0;
  // sum += a b
  virtual void add_products(const C* a, const C* b, double* sum, int64_t states) const = 0;
  // of_h and of_v are the sums of g h and g v, of_b is the gradient of b, and `direct` is what the final state adds to
  // the gradient of q. The unit form has neither of the last two.
  virtual void finish(const EmaParameters<C>& p, int64_t first, int64_t m, int64_t states, bool unit,
                      const double* of_h, const double* of_v, const double* of_b, const double* direct,
                      const EmaGradients<C>& gradients) const = 0;

 protected:
  constexpr EmaNumbers(int64_t width_, bool precise_) : width(width_), precise(precise_) {}
};

template <typename C>
struct RealNumbers final : EmaNumbers<C> {
  constexpr RealNumbers() : EmaNumbers<C>(1, false) {}

  const EmaBlock<C>& block() const override { return kernels<EmaBlocks<C>>().real; }

  void pack(const EmaParameters<C>& p, int64_t first, int64_t m, int64_t states, bool unit,
            const EmaArrays<C*>& to) const override {
    const int64_t at = first * states;
    std::vector<C> natural(static_cast<size_t>(3 * m * states));
    C *nd = natural.data(), *nb = nd + m * states, *nc = nb + m * states;
    kernels<EmaTile<C>>().coefficients(p.damping + at, p.decay + at, p.expansion + at, p.projection + at,
                                       1.0 / std::sqrt(static_cast<double>(states)), nd, nb, nc, m * states);
    for (int64_t n = 0; n < states; n++)
      for (int64_t j = 0; j < m; j++) {
        const int64_t from = j * states + n, i = n * kEmaLanes + j;
        to.decay[i] = nd[from];
        to.in[i] = unit ? C(1) : nb[from];
        to.out[i] = unit ? nb[from] * nc[from] : nc[from];
      }
  }
  void pack_late(double k, int64_t states, const EmaArrays<C*>& a) const override {
    for (int64_t i = 0; i < states * kEmaLanes; i++) {
      const double log_q = ema_log_decay(a.decay[i]), gain = static_cast<double>(a.in[i]);
      a.late[i] = static_cast<C>(gain * std::exp(k * log_q));
      a.slope[i] = static_cast<C>(gain * k * (k > 1 ? std::exp((k - 1) * log_q) : 1.0));
    }
  }

  void decay(const EmaWeights<C>& w, C* h, int64_t states) const override {
    for (int64_t i = 0; i < states * kEmaLanes; i++) h[i] = ema_decayed(h[i], w.decay[i]);
  }
  void carry(const EmaWeights<C>& w, int64_t states, double n, const C* g, const C* local, C* out, const C* v,
             const C* local_v, C* out_v) const override {
    for (int64_t i = 0; i < states * kEmaLanes; i++) {
      const double log_q = ema_log_decay(w.decay[i]), before = static_cast<double>(g[i]);
      const double power = std::exp(n * log_q), one_less = n == 1 ? 1.0 : std::exp((n - 1) * log_q);
      if (v)
        out_v[i] =
            static_cast<C>(power * static_cast<double>(v[i]) + n * one_less * before + static_cast<double>(local_v[i]));
      out[i] = static_cast<C>(power * before + static_cast<double>(local[i]));
    }
  }
  void conjugate(C*, int64_t) const override {}
  void add_products(const C* a, const C* b, double* sum, int64_t states) const override {
    for (int64_t i = 0; i < states * kEmaLanes; i++) sum[i] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  }

  void finish(const EmaParameters<C>& p, int64_t first, int64_t m, int64_t states, bool unit, const double* of_h,
              const double* of_v, const double* of_b, const double* direct,
              const EmaGradients<C>& gradients) const override {
    const int64_t at = first * states;
    const double scale = 1.0 / std::sqrt(static_cast<double>(states));
    std::vector<double> natural(static_cast<size_t>(3 * m * states));
    std::vector<C> coefficients(static_cast<size_t>(3 * m * states));
    C *d = coefficients.data(), *b = d + m * states, *c = b + m * states;
    kernels<EmaTile<C>>().coefficients(p.damping + at, p.decay + at, p.expansion + at, p.projection + at, scale, d, b,
                                       c, m * states);
    double *dq = natural.data(), *db = dq + m * states, *dc = db + m * states;
    for (int64_t j = 0; j < m; j++)
      for (int64_t s = 0; s < states; s++) {
        const int64_t i = s * kEmaLanes + j, to = j * states + s;
        const double bi = static_cast<double>(b[to]), ci = static_cast<double>(c[to]);
        dc[to] = unit ? bi * of_h[i] : of_h[i];
        db[to] = unit ? ci * of_h[i] : of_b[i];
        dq[to] = unit ? bi * ci * of_v[i] : ci * of_v[i] + direct[i];
      }
    kernels<EmaTile<C>>().coefficients_backward(p.damping + at, p.decay + at, p.expansion + at, scale, dq, db, dc,
                                                gradients.damping + at, gradients.decay + at, gradients.expansion + at,
                                                gradients.projection + at, m * states);
  }
};

// The four parameters are alpha, delta, theta and gamma.
template <typename C>
struct ComplexNumbers final : EmaNumbers<C> {
  static constexpr bool kPrecise = sizeof(C) == 8;
  using Z = std::complex<double>;

  constexpr ComplexNumbers() : EmaNumbers<C>(2, kPrecise) {}

  const EmaBlock<C>& block() const override { return kernels<EmaBlocks<C>>().complex; }

  static double sigmoid(double z) { return 1.0 / (1.0 + std::exp(-z)); }
  // Returns 1 - sigmoid(z): in double as the definition rounds it, else without its cancellation.
  static double less_sigmoid(double z) { return kPrecise ? 1.0 - sigmoid(z) : sigmoid(-z); }
  // The angle of a channel's first state; the others' are multiples of it.
  static double step_of_angle(const EmaParameters<C>& p, int64_t channel, int64_t states) {
    return sigmoid(static_cast<double>(p.expansion[channel])) * (kTurn / static_cast<double>(states));
  }

  struct Coefficients {
    double p, a, radius, angle;
  };
  // Returns the coefficients of state n (from 0) of one channel.
  static Coefficients coefficients(const EmaParameters<C>& p, int64_t channel, int64_t n, int64_t states, double step) {
    const int64_t i = channel * states + n;
    Coefficients k{sigmoid(static_cast<double>(p.damping[i])), sigmoid(static_cast<double>(p.decay[i])), 0, 0};
    volatile double product = k.p * k.a;  // rounded, and not fused with the subtraction
    k.radius = 1.0 - product;
    k.angle = static_cast<double>(n + 1) * step;
    return k;
  }

  void pack(const EmaParameters<C>& p, int64_t first, int64_t m, int64_t states, bool unit,
            const EmaArrays<C*>& to) const override {
    const double scale = 1.0 / std::sqrt(static_cast<double>(states));
    double step[kEmaLanes];
    for (int64_t j = 0; j < m; j++) step[j] = step_of_angle(p, first + j, states);
    for (int64_t n = 0; n < states; n++)
      for (int64_t j = 0; j < m; j++) {
        const Coefficients k = coefficients(p, first + j, n, states, step[j]);
        const C* gamma = p.projection + ((first + j) * states + n) * 2;
        const double gain = unit ? k.p * scale : scale;
        const int64_t re = 2 * n * kEmaLanes + j, im = re + kEmaLanes;
        if constexpr (!kPrecise) {
          // 1 - q = (1 - |q|) + 2 |q| sin^2(angle / 2) - i |q| sin(angle): without cancellation
          const double sine = std::sin(0.5 * k.angle), cosine = std::cos(0.5 * k.angle);
          to.decay[re] = static_cast<C>(k.p * k.a + 2.0 * k.radius * sine * sine);
          to.decay[im] = static_cast<C>(-2.0 * k.radius * sine * cosine);
        } else {
          const long double r = k.radius * std::cos(static_cast<long double>(k.angle));
          const long double i = k.radius * std::sin(static_cast<long double>(k.angle));
          to.decay[re] = static_cast<C>(r), to.low[re] = static_cast<C>(r - to.decay[re]), to.polar[re] = k.radius;
          to.decay[im] = static_cast<C>(i), to.low[im] = static_cast<C>(i - to.decay[im]), to.polar[im] = k.angle;
        }
        to.in[re] = unit ? C(1) : static_cast<C>(k.p);
        to.in[im] = 0;
        to.out[re] = static_cast<C>(gain * static_cast<double>(gamma[0]));
        to.out[im] = static_cast<C>(gain * static_cast<double>(gamma[1]));
      }
  }
  void pack_late(double k, int64_t states, const EmaArrays<C*>& a) const override {
    each(states, [&](int64_t re, int64_t im) {
      const Z gain = at(a.in, re, im);
      put(gain * power(a.decay, a.polar, re, im, k), a.late, re, im);
      put(gain * k * power(a.decay, a.polar, re, im, k - 1), a.slope, re, im);
    });
  }

  void decay(const EmaWeights<C>& w, C* h, int64_t states) const override {
    each(states, [&](int64_t re, int64_t im) {
      const C r = h[re], i = h[im], d = w.decay[re], e = w.decay[im];
      if constexpr (!kPrecise) {
        h[re] = r - d * r + e * i;
        h[im] = i - d * i - e * r;
      } else {
        h[re] = w.low[re] * r - w.low[im] * i + d * r - e * i;
        h[im] = w.low[re] * i + w.low[im] * r + d * i + e * r;
      }
    });
  }
  void carry(const EmaWeights<C>& w, int64_t states, double n, const C* g, const C* local, C* out, const C* v,
             const C* local_v, C* out_v) const override {
    each(states, [&](int64_t re, int64_t im) {
      const Z before = at(g, re, im), q_n = power(w.decay, w.polar, re, im, n);
      if (v)
        put(q_n * at(v, re, im) + n * power(w.decay, w.polar, re, im, n - 1) * before + at(local_v, re, im), out_v, re,
            im);
      put(q_n * before + at(local, re, im), out, re, im);
    });
  }
  void conjugate(C* h, int64_t states) const override {
    each(states, [&](int64_t, int64_t im) { h[im] = -h[im]; });
  }
  void add_products(const C* a, const C* b, double* sum, int64_t states) const override {
    each(states, [&](int64_t re, int64_t im) {
      const Z product = at(a, re, im) * at(b, re, im);
      sum[re] += product.real(), sum[im] += product.imag();
    });
  }

  void finish(const EmaParameters<C>& p, int64_t first, int64_t m, int64_t states, bool unit, const double* of_h,
              const double* of_v, const double* of_b, const double* direct,
              const EmaGradients<C>& gradients) const override {
    const double scale = 1.0 / std::sqrt(static_cast<double>(states));
    for (int64_t j = 0; j < m; j++) {
      const double theta = static_cast<double>(p.expansion[first + j]), step = step_of_angle(p, first + j, states);
      double dangle = 0;
      for (int64_t n = 0; n < states; n++) {
        const Coefficients k = coefficients(p, first + j, n, states, step);
        const int64_t re = 2 * n * kEmaLanes + j, im = re + kEmaLanes, i = (first + j) * states + n;
        const Z turn(std::cos(k.angle), std::sin(k.angle));
        const Z c(scale * static_cast<double>(p.projection[2 * i]),
                  scale * static_cast<double>(p.projection[2 * i + 1]));
        const Z h(of_h[re], of_h[im]), v(of_v[re], of_v[im]);
        const Z dc = unit ? k.p * h : h;
        const double dp = unit ? (c * h).real() : of_b[re];
        const Z dq = (unit ? k.p * c * v : c * v + Z(direct[re], direct[im])) * turn;
        const double dradius = dq.real();
        dangle -= static_cast<double>(n + 1) * (dq.imag() * k.radius);
        const double p1 = less_sigmoid(static_cast<double>(p.damping[i]));
        const double a1 = less_sigmoid(static_cast<double>(p.decay[i]));
        gradients.damping[i] = static_cast<C>((dp - dradius * k.a) * k.p * p1);
        gradients.decay[i] = static_cast<C>(-dradius * k.p * k.a * a1);
        gradients.projection[2 * i] = static_cast<C>(scale * dc.real());
        gradients.projection[2 * i + 1] = static_cast<C>(-scale * dc.imag());
      }
      gradients.expansion[first + j] = static_cast<C>(dangle * step * less_sigmoid(theta));
    }
  }

 private:
  static constexpr double kTurn = 6.283185307179586477;

  template <typename F>
  static void each(int64_t states, const F& f) {
    for (int64_t n = 0; n < states; n++)
      for (int64_t j = 0; j < kEmaLanes; j++) f(2 * n * kEmaLanes + j, (2 * n + 1) * kEmaLanes + j);
  }
  static Z at(const C* p, int64_t re, int64_t im) { return {static_cast<double>(p[re]), static_cast<double>(p[im])}; }
  static void put(Z z, C* p, int64_t re, int64_t im) {
    p[re] = static_cast<C>(z.real()), p[im] = static_cast<C>(z.imag());
  }
  // Computes q^n: in float from q as the blocks hold it, in double from the radius and angle of the definition.
  static Z power(const C* d, const C* polar, int64_t re, int64_t im, double n) {
    if (n == 0) return 1;
    if constexpr (kPrecise) {  // n times the angle, rounded to double, would have an error of 1e-14 at 100 steps
      const long double turned = static_cast<long double>(n) * static_cast<long double>(polar[im]);
      const double radius = std::pow(polar[re], n);
      return {radius * static_cast<double>(std::cos(turned)), radius * static_cast<double>(std::sin(turned))};
    }
    const double r = static_cast<double>(d[re]), i = static_cast<double>(d[im]);
    const double log_radius = 0.5 * std::log1p(std::max(-1.0, r * (r - 2.0) + i * i));
    return std::polar(std::exp(n * log_radius), n * std::atan2(-i, 1.0 - r));
  }
};

template <typename C>
const EmaNumbers<C>& ema_numbers(bool complex) {
  static constexpr RealNumbers<C> real;
  static constexpr ComplexNumbers<C> complex_;
  if (complex) return complex_;
  return real;
}

}  // namespace fastasr::cpu
