// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>

#include "cpu/ema/complex_ema_scan.h"
#include "cpu/ema/ema_scan_tile.h"

// Multi-head damped EMA. Per channel, p = sigmoid(damping), q = 1 - p sigmoid(decay), b = p expansion,
// c = projection / sqrt(N): h_n(t) = q_n h_n(t-1) + b_n x_t, y_t = act(sum_n c_n h_n(t) + residual x_t).
// Derivatives in docs/ops/ema_scan.md.
namespace fastasr::cpu {

enum class EmaDirection : int { forward, reverse, bidirectional };

struct EmaShape {
  int64_t length, batch, channels, states;
  int64_t truncation;  // taps that are kept; 0: all
  EmaDirection direction;
  EmaActivation activation;
};

// The strides of a tensor's time, batch and channel dimensions, in elements.
struct EmaStrides {
  int64_t time, batch, channel;
};

template <typename C>
struct EmaParameters {
  const C *damping, *decay, *expansion, *projection;  // (D, N); (2 D, N) when bidirectional
  const C* residual;                                  // (D), or null
  const C* state;                                     // (B, D, N), or null
  const uint8_t* mask;                                // (B, L), nonzero: padding; or null
};

template <typename C>
struct EmaParameterGradients {
  C *damping, *decay, *expansion, *projection;
  C* residual;  // null where there is none
  C* state;
};

// parallel(tasks, work, f) calls f(begin, end) over [0, tasks), in any split; work is the multiply-adds of a task.
using Parallel = std::function<void(int64_t, int64_t, const std::function<void(int64_t, int64_t)>&)>;

// Runs the passes of both averages. final_state (B, D, N) may be null, and so may grad_state. The result does not
// depend on how `parallel` splits the tasks.
template <typename T>
struct EmaForward {
  static constexpr bool kCompiledOnce = true;
  using C = compute_t<T>;
  void (*real)(const EmaShape& shape, const EmaParameters<C>& parameters, const T* x, EmaStrides x_strides, T* y,
               EmaStrides y_strides, C* final_state, const Parallel& parallel);
  void (*complex)(const EmaShape& shape, const ComplexEmaParameters<C>& parameters, const T* x, EmaStrides x_strides,
                  T* y, EmaStrides y_strides, C* final_state, const Parallel& parallel);
};

template <typename T>
struct EmaBackward {
  static constexpr bool kCompiledOnce = true;
  using C = compute_t<T>;
  void (*real)(const EmaShape& shape, const EmaParameters<C>& parameters, const T* x, EmaStrides x_strides,
               const T* grad, EmaStrides grad_strides, const C* grad_state, T* dx, EmaStrides dx_strides,
               const EmaParameterGradients<C>& gradients, const Parallel& parallel);
  void (*complex)(const EmaShape& shape, const ComplexEmaParameters<C>& parameters, const T* x, EmaStrides x_strides,
                  const T* grad, EmaStrides grad_strides, const C* grad_state, T* dx, EmaStrides dx_strides,
                  const ComplexEmaGradients<C>& gradients, const Parallel& parallel);
};

// Runs the forward of one time step of the real average, in one direction and without truncation.
template <typename T>
struct EmaStep {
  using C = compute_t<T>;
  void (*run)(const EmaShape& shape, const EmaParameters<C>& parameters, const T* x, EmaStrides x_strides, T* y,
              EmaStrides y_strides, C* final_state);
};

}  // namespace fastasr::cpu
