// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// Complex EMA. Per channel, p = sigmoid(alpha), |q| = 1 - p sigmoid(delta), the angle of q_n is n sigmoid(theta) 2 pi /
// N for n = 1 ... N, c = gamma / sqrt(N): h_n(t) = q_n h_n(t-1) + p_n x_t, y_t = act(Re sum_n c_n h_n(t) + residual
// x_t). Derivatives in docs/ops/complex_ema_scan.md. Shapes, strides and tasks are those of ema_scan.
namespace fastasr::cpu {

template <typename C>
struct ComplexEmaParameters {
  const C *alpha, *delta;  // (D, N); (2 D, N) when bidirectional
  const C* theta;          // (D)
  const C* gamma;          // (D, N, 2): real and imaginary parts
  const C* residual;       // (D), or null
  const C* state;          // (B, D, N, 2), or null
  const uint8_t* mask;     // (B, L), nonzero: padding; or null
};

template <typename C>
struct ComplexEmaGradients {
  C *alpha, *delta, *theta, *gamma;
  C* residual;  // null where there is none
  C* state;
};

}  // namespace fastasr::cpu
