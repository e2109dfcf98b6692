// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/math/elementary.h"
#include "cpu/simd/kernels.h"

// The activations that kernels apply, numbered as in fastasr/ops/_activation.py, and their derivatives.
namespace fastasr::cpu {

enum class Activation : int { identity = 0, silu = 1, relu = 2, tanh = 3, gelu = 4 };
constexpr int kActivations = 5;

// Returns sigmoid(x) and sigmoid(-x); neither is computed as one minus the other, which would cancel.
template <typename C>
FASTASR_INLINE void sigmoid_pair(C x, C* positive, C* negative) {
  const C e = exp_nonpositive(x < 0 ? x : -x), d = 1 + e, larger = 1 / d, smaller = e / d;
  *positive = x < 0 ? smaller : larger;
  *negative = x < 0 ? larger : smaller;
}

// exactly 0 far out, where callers multiply it by x
template <typename C>
FASTASR_INLINE C sigmoid(C x) {
  const C e = exp_or_zero(x < 0 ? x : -x);
  return (x < 0 ? e : C(1)) / (1 + e);
}

FASTASR_INLINE float tanh(float x) {
  const float e = exp_nonpositive(x < 0 ? 2 * x : -2 * x), u = x * x;
  float p =
      -3.58452002e-4f;  // (tanh(x) - x) / x^3 below 1, to 4.6e-9 of tanh(x): nearer to 0 the other form loses digits
  p = p * u + 2.30136467e-3f;
  p = p * u + -7.94610661e-3f;
  p = p * u + 2.14866567e-2f;
  p = p * u + -5.38798012e-2f;
  p = p * u + 1.33323446e-1f;
  p = p * u + -3.33332956e-1f;
  const float large = 1 - 2 * e / (1 + e);
  return u < 1 ? x + x * u * p : x < 0 ? -large : large;
}
FASTASR_INLINE double tanh(double x) { return std::tanh(x); }

// Returns the normal distribution's cumulative function (relative error 3e-7 in either tail) and its density.
FASTASR_INLINE void normal_pair(float x, float* cumulative, float* density) {
  const float t = x < 0 ? -x : x, e = exp_or_zero(-0.5f * x * x), u = 1 / (1 + 0.4f * t);
  float p = -3.96011658e-2f;  // the tail over e
  p = p * u + 2.00602097e-1f;
  p = p * u + -3.73684850e-1f;
  p = p * u + 2.50974918e-1f;
  p = p * u + -1.23865632e-2f;
  p = p * u + 1.58416807e-1f;
  p = p * u + 1.55786572e-1f;
  p = p * u + 1.59904189e-1f;
  p = p * u + -1.19876988e-5f;
  const float tail = e * p;
  *cumulative = x < 0 ? tail : 1 - tail;
  *density = e * 0.398942280f;
}
FASTASR_INLINE void normal_pair(double x, double* cumulative, double* density) {
  *cumulative = 0.5 * std::erfc(-x * 0.70710678118654752440);
  *density = std::exp(-0.5 * x * x) * 0.39894228040143267794;
}

// Returns the value, and the derivative in *slope. e is exactly 0 far out, so silu and gelu of -inf are NaN, as torch's
// are.
template <Activation A, typename C>
FASTASR_INLINE C activate(C x, C* slope) {
  if constexpr (A == Activation::silu) {
    const C e = exp_or_zero(x < 0 ? x : -x), d = 1 + e;
    *slope = (x < 0 ? e : C(1)) / d * (1 + x * ((x < 0 ? C(1) : e) / d));
    return (x < 0 ? x * e : x) / d;  // one rounding less than x times the sigmoid
  } else if constexpr (A == Activation::relu) {
    *slope = x > 0 ? C(1) : C(0);
    return x < 0 ? C(0) : x;  // keeps a NaN
  } else if constexpr (A == Activation::tanh) {
    const C y = tanh(x), e = exp_nonpositive(x < 0 ? 2 * x : -2 * x), d = 1 + e;
    *slope = x * x < C(0.7) ? 1 - y * y : 4 * e / (d * d);  // sech^2 where 1 - y^2 cancels
    return y;
  } else if constexpr (A == Activation::gelu) {
    C cumulative, density;
    normal_pair(x, &cumulative, &density);
    *slope = cumulative + x * density;
    return x * cumulative;
  } else {
    *slope = 1;
    return x;
  }
}
template <Activation A, typename C>
FASTASR_INLINE C activate(C x) {
  C slope;
  return activate<A>(x, &slope);
}

template <typename C>
struct ActivationKernels {
  bool (*values)(int activation, C* x, int64_t n);
  bool (*gradients)(int activation, const C* grad, const C* x, C* dx, C* sums, int64_t n);
  bool (*values_and_slopes)(int activation, C* x, C* slope, int64_t n);
};

// Computes x[i] = act(x[i]) over a buffer of the compute type, and with slope also slope[i] = act'(x[i]);
// activation_gradients computes dx[i] = grad[i] act'(x[i]), which may lie in grad or x, and adds it to sums[i] unless
// that is null. They return false and do nothing if no activation has this number.
template <typename C>
FASTASR_INLINE bool activate(int activation, C* x, int64_t n) {
  return kernels<ActivationKernels<C>>().values(activation, x, n);
}
template <typename C>
FASTASR_INLINE bool activation_gradients(int activation, const C* grad, const C* x, C* dx, C* sums, int64_t n) {
  return kernels<ActivationKernels<C>>().gradients(activation, grad, x, dx, sums, n);
}
template <typename C>
FASTASR_INLINE bool activate_with_slope(int activation, C* x, C* slope, int64_t n) {
  return kernels<ActivationKernels<C>>().values_and_slopes(activation, x, slope, n);
}

// Computes y = act(t) of a row, whose t is written by fill(t): to y where that has the compute type, else to `room`.
template <typename T, typename F, typename C = compute_t<T>>
FASTASR_INLINE void put_activated(int activation, T* y, C* room, int64_t n, const F& fill) {
  C* t = room;
  if constexpr (std::is_same_v<T, C>) t = y;
  fill(t);
  activate(activation, t, n);
  if constexpr (!std::is_same_v<T, C>) convert(t, y, n);
}

}  // namespace fastasr::cpu
