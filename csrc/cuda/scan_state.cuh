// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "cuda/number.cuh"

// Arithmetic of a scan's states. A state type has the operations below; the scan kernel is written in them, so that
// real and complex states share it.
namespace fastasr::cuda {

template <typename Q>
struct StateTraits {
  using Real = Q;
  static constexpr int kParts = 1;   // real numbers in a state
  static constexpr int kStates = 4;  // states that a thread holds at a time
  // whether a step takes u + ((q - 1) u + s), not q u + s, in the adjoint scan as in the others
  static constexpr bool kDifference = false;
};

template <typename C>
struct Complex {
  C re, im;
};

// A rounded q turns too little or too much, and a slow turn is far below 1, so the difference is used.
template <typename C>
struct StateTraits<Complex<C>> {
  using Real = C;
  static constexpr int kParts = 2;
  static constexpr int kStates = 2;
  static constexpr bool kDifference = true;
};

// The type of a state that is computed in double.
template <typename Q>
using Wide = std::conditional_t<StateTraits<Q>::kParts == 1, double, Complex<double>>;

template <typename C>
FASTASR_HD C multiply(C a, C b) {
  return a * b;
}
// s a for a real s
template <typename C>
FASTASR_HD C scaled(C s, C a) {
  return s * a;
}
// a b + c
template <typename C>
FASTASR_HD C multiply_add(C a, C b, C c) {
  return a * b + c;
}
// Returns sum + Re(w u).
template <typename C>
FASTASR_HD C add_output(C sum, C w, C u) {
  return sum + w * u;
}
// Returns sum + x u for a real x.
template <typename C>
FASTASR_HD C add_scaled(C sum, C x, C u) {
  return sum + x * u;
}
// Returns q^n from log2 q; log2 0 is given as a large negative number, so that q^0 is 1 there too.
template <typename C>
FASTASR_HD C power(C log, C, C n) {
  return exp2(n * log);
}
template <typename C>
FASTASR_HD C zero(C) {
  return C(0);
}
template <typename C>
FASTASR_HD C from_real(C s, C) {
  return s;
}
template <typename C>
FASTASR_HD C add(C a, C b) {
  return a + b;
}
template <typename C>
FASTASR_HD C real_part(C q) {
  return q;
}
// the parts of a state lie `pitch` numbers apart
template <typename C>
FASTASR_HD C read_state(const C* p, int64_t, C) {
  return *p;
}
template <typename C>
FASTASR_HD void write_state(C* p, int64_t, C v) {
  *p = v;
}
template <typename C>
FASTASR_HD double widen(C q) {
  return static_cast<double>(q);
}
template <typename C>
FASTASR_HD C narrow(double q) {
  return static_cast<C>(q);
}

// from the gradient of a state to its derivative, d loss = Re(derivative · change), and back
template <typename C>
FASTASR_HD C conjugate(C q) {
  return q;
}

template <typename C>
FASTASR_HD Complex<C> multiply(Complex<C> a, Complex<C> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <typename C>
FASTASR_HD Complex<C> scaled(C s, Complex<C> a) {
  return {s * a.re, s * a.im};
}
template <typename C>
FASTASR_HD Complex<C> multiply_add(Complex<C> a, Complex<C> b, Complex<C> c) {
  return {c.re + a.re * b.re - a.im * b.im, c.im + a.re * b.im + a.im * b.re};
}
template <typename C>
FASTASR_HD C add_output(C sum, Complex<C> w, Complex<C> u) {
  return sum + w.re * u.re - w.im * u.im;
}
template <typename C>
FASTASR_HD Complex<C> add_scaled(Complex<C> sum, C x, Complex<C> u) {
  return {sum.re + x * u.re, sum.im + x * u.im};
}
// The logarithm is log2 |q| and the angle in turns, `low` what the turns lack by rounding: whole turns are removed
// before the rest is rounded.
template <typename C>
FASTASR_HD Complex<C> power(Complex<C> log, Complex<C> low, C n) {
  const C whole = rint(n * log.im), angle = C(2) * (fma(n, log.im, -whole) + n * low.im), radius = exp2(n * log.re);
  return {radius * cospi(angle), radius * sinpi(angle)};
}
template <typename C>
FASTASR_HD Complex<C> zero(Complex<C>) {
  return {C(0), C(0)};
}
template <typename C>
FASTASR_HD Complex<C> from_real(C s, Complex<C>) {
  return {s, C(0)};
}
template <typename C>
FASTASR_HD Complex<C> add(Complex<C> a, Complex<C> b) {
  return {a.re + b.re, a.im + b.im};
}
template <typename C>
FASTASR_HD C real_part(Complex<C> q) {
  return q.re;
}
template <typename C>
FASTASR_HD Complex<C> read_state(const C* p, int64_t pitch, Complex<C>) {
  return {p[0], p[pitch]};
}
template <typename C>
FASTASR_HD void write_state(C* p, int64_t pitch, Complex<C> v) {
  p[0] = v.re, p[pitch] = v.im;
}
template <typename C>
FASTASR_HD Complex<double> widen(Complex<C> q) {
  return {static_cast<double>(q.re), static_cast<double>(q.im)};
}
template <typename C>
FASTASR_HD Complex<C> narrow(Complex<double> q) {
  return {static_cast<C>(q.re), static_cast<C>(q.im)};
}
template <typename C>
FASTASR_HD Complex<C> conjugate(Complex<C> q) {
  return {q.re, -q.im};
}

}  // namespace fastasr::cuda
