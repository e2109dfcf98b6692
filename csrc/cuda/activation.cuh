// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/number.cuh"

// The activations of ema_scan and their derivatives, in float or double. The codes are those of
// fastasr/ops/ema_scan.py.
namespace fastasr::cuda {

enum Activation { kIdentity = 0, kSilu = 1, kRelu = 2, kTanh = 3, kGelu = 4 };

template <typename C>
FASTASR_HD C sigmoid(C z) {
  return C(1) / (C(1) + exp(-z));
}

template <typename C>
FASTASR_HD C relu(C z) {
  return z < C(0) ? C(0) : z;  // a NaN passes
}
template <typename C>
FASTASR_HD C gauss_distribution(C z) {
  return C(0.5) * (C(1) + erf(z * C(0.70710678118654752440)));
}
template <typename C>
FASTASR_HD C silu_slope(C z) {
  const C s = sigmoid(z);
  return s * (C(1) + z * (C(1) - s));
}
template <typename C>
FASTASR_HD C tanh_slope(C z) {
  const C t = tanh(z);
  return C(1) - t * t;
}
template <typename C>
FASTASR_HD C gelu_slope(C z) {
  return gauss_distribution(z) + z * C(0.39894228040143267794) * exp(C(-0.5) * z * z);
}

// Computes v = act(v), n values at a time, with one choice for all of them.
template <int n, typename C>
FASTASR_HD void activate(int kind, C (&v)[n]) {
  const auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < n; i++) v[i] = f(v[i]);
  };
  if (kind == kSilu) each([](C z) { return z * sigmoid(z); });
  if (kind == kRelu) each([](C z) { return relu(z); });
  if (kind == kTanh) each([](C z) { return tanh(z); });
  if (kind == kGelu) each([](C z) { return z * gauss_distribution(z); });
}

// Computes v = v act'(z).
template <int n, typename C>
FASTASR_HD void chain(int kind, const C (&z)[n], C (&v)[n]) {
  const auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < n; i++) v[i] *= f(z[i]);
  };
  if (kind == kSilu) each([](C z) { return silu_slope(z); });
  if (kind == kRelu) each([](C z) { return z > C(0) ? C(1) : C(0); });
  if (kind == kTanh) each([](C z) { return tanh_slope(z); });
  if (kind == kGelu) each([](C z) { return gelu_slope(z); });
}

}  // namespace fastasr::cuda
