// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>

#include "cpu/simd/kernels.h"

// Damped exponential moving averages with N states per channel, h_n(t) = q_n h_n(t-1) + b_n x_t,
// y_t = act(Re sum_n c_n h_n(t) + residual x_t), with real or complex numbers:
//   real     p = sigmoid(damping), q = 1 - p sigmoid(decay), b = p expansion, c = projection / sqrt(N)
//   complex  p = sigmoid(alpha), |q| = 1 - p sigmoid(delta), the angle of q_n is n sigmoid(theta) 2 pi / N for
//            n = 1 ... N, b = p, c = gamma / sqrt(N)
// Derivatives in docs/ops/ema_scan.md and docs/ops/complex_ema_scan.md.
namespace fastasr::cpu {

enum class EmaDirection : int { forward, reverse, bidirectional };
enum class EmaActivation : int { identity, silu, relu, tanh, gelu };

struct EmaShape {
  int64_t length, batch, channels, states;
  int64_t truncation;  // taps that are kept; 0: all
  EmaDirection direction;
  EmaActivation activation;
  bool complex;
};

// The strides of a tensor's time, batch and channel dimensions, in elements.
struct EmaStrides {
  int64_t time, batch, channel;
};

// The complex average has alpha, delta, theta (D) and gamma (D, N, 2) for the four, and states (B, D, N, 2): the last
// dimension holds real and imaginary parts.
template <typename C>
struct EmaParameters {
  const C *damping, *decay, *expansion, *projection;  // (D, N); (2 D, N) when bidirectional
  const C* residual;                                  // (D), or null
  const C* state;                                     // (B, D, N), or null
  const uint8_t* mask;                                // (B, L), nonzero: padding; or null
};

template <typename C>
struct EmaGradients {
  C *damping, *decay, *expansion, *projection;
  C* residual;  // null where there is none
  C* state;
};

// parallel(tasks, work, f) calls f(begin, end) over [0, tasks), in any split; work is the multiply-adds of a task.
using Parallel = std::function<void(int64_t, int64_t, const std::function<void(int64_t, int64_t)>&)>;

// final_state (B, D, N) may be null, and so may grad_state. The result does not depend on how `parallel` splits the
// tasks.
template <typename T>
struct EmaScanKernels {
  static constexpr bool kCompiledOnce = true;
  using C = compute_t<T>;
  void (*forward)(const EmaShape& shape, const EmaParameters<C>& parameters, const T* x, EmaStrides x_strides, T* y,
                  EmaStrides y_strides, C* final_state, const Parallel& parallel);
  void (*backward)(const EmaShape& shape, const EmaParameters<C>& parameters, const T* x, EmaStrides x_strides,
                   const T* grad, EmaStrides grad_strides, const C* grad_state, T* dx, EmaStrides dx_strides,
                   const EmaGradients<C>& gradients, const Parallel& parallel);
};

// --------------------------------------------------------------------------- what the scans call per block of time
// A block has up to 32 time steps of up to 64 channels, in buffers of C that lie in the first cache. A row holds
// kEmaLanes channels of one step; arrays over states hold N such rows, of complex numbers a row of real and a row of
// imaginary parts for each.
inline constexpr int64_t kEmaLanes = 64, kEmaSteps = 32;
// The products of this many steps are summed in C before the sum goes on in double.
inline constexpr int64_t kEmaChain = 8;

// The form in which the kernels hold the decay q. In float it is d = 1 - q = p sigmoid(decay): close to q = 1 the
// difference matters, and h - d h costs no more than q h. In double it is q, rounded as the definition rounds it.
FASTASR_INLINE double ema_log_decay(float d) { return std::log1p(-static_cast<double>(d)); }
FASTASR_INLINE double ema_log_decay(double q) { return std::log(q); }
FASTASR_INLINE float ema_decayed(float h, float d) { return h - d * h; }
FASTASR_INLINE double ema_decayed(double h, double q) { return q * h; }

// Computes, per state and lane: h(t) = g(t) + in x(t) [- late x(t-K)], g(t+1) = q h(t); y(t) += Re(out h(t)).
template <typename C>
struct EmaConvolution {
  const C *x, *x_late;                          // [steps][64]; x_late is null unless truncated
  const C *decay, *low, *in, *out, *late_gain;  // [N][64]; low: of complex numbers in double
  C *y, *g, *last;  // y [steps][64]; g [N][64], carried on; last [N][64]: h of the last step, or null
  const C* other;   // [steps][64] or null: then sum [N][64] = sum over steps of Re(h(t)) other(t)
  C* sum;           // for complex numbers, only the rows of real parts are written
  bool start;       // y begins at 0
  bool real;        // `in` has no imaginary part
  int64_t steps, lanes, states;
};

// Computes h as above and v = dh/dq: dc = sum dy(t) h(t), dq = sum dy(t) v(t); v(t+1) = q v(t) + h(t), with truncation
// v(t) less late_slope x(t-K).
template <typename C>
struct EmaGradient {
  const C *x, *x_late, *dy;
  const C *decay, *low, *in, *late_gain, *late_slope;
  C *g, *v, *last_v;  // last_v: v of the last step
  C *dc, *dq;         // [N][64], overwritten
  int64_t steps, lanes, states;
};

template <typename C>
struct EmaBlock {
  void (*convolution)(const EmaConvolution<C>&);
  void (*gradient)(const EmaGradient<C>&);
};

// The decay of complex numbers is 1 - q in float. In double it is q, and `low` is what rounding took from q: an error
// of 1e-16 per step would grow to 1e-13 in a slow scan.
template <typename C>
struct EmaBlocks {
  EmaBlock<C> real, complex;
};

// Copies of a tensor of one dtype to and from buffers [steps][64] of C. With p the tensor's element `at`:
template <typename C>
struct EmaCopies {
  // buffer[s][j] = p[s step + j channel] for j < channels, 0 up to lanes and where mask[s mask_step] is set.
  void (*load)(const void* tensor, int64_t at, int64_t step, int64_t channel, const uint8_t* mask, int64_t mask_step,
               int64_t steps, int64_t channels, int64_t lanes, C* buffer);
  void (*store)(const C* buffer, void* tensor, int64_t at, int64_t step, int64_t channel, int64_t steps,
                int64_t channels);
};

// Scans take the copies as an argument: they are then compiled for C alone.
template <typename T>
struct EmaTensor {
  using C = compute_t<T>;
  EmaCopies<C> copies;
  // Runs the forward of one time step of the real average, in one direction and without truncation.
  void (*one_step)(const EmaShape& shape, const EmaParameters<C>& parameters, const T* x, EmaStrides x_strides, T* y,
                   EmaStrides y_strides, C* final_state);
};

template <typename C>
struct EmaTile {
  // z = act(z + residual x)
  void (*activate)(C* z, const C* x, const C* residual, EmaActivation activation, int64_t steps, int64_t lanes);
  // z = dy act'(z + residual x)
  void (*activate_backward)(C* z, const C* x, const C* residual, const C* dy, EmaActivation activation, int64_t steps,
                            int64_t lanes);
  // dx = dx where mask is not set, + residual dy
  void (*finish_gradient)(C* dx, const C* dy, const C* residual, const uint8_t* mask, int64_t mask_step, int64_t steps,
                          int64_t lanes);
  // sum[j] += sum over steps of a b, for at most kEmaSteps steps
  void (*add_products)(const C* a, const C* b, double* sum, int64_t steps, int64_t lanes);
  // sum += part
  void (*fold)(const C* part, double* sum, int64_t n);
  // Computes q (as ema_log_decay takes it), b = p expansion and c = scale projection from n values of each parameter.
  void (*coefficients)(const C* damping, const C* decay, const C* expansion, const C* projection, double scale, C* q,
                       C* b, C* c, int64_t n);
  // Computes the gradients of the parameters from those of q, b and c, which are in double.
  void (*coefficients_backward)(const C* damping, const C* decay, const C* expansion, double scale, const double* dq,
                                const double* db, const double* dc, C* ddamping, C* ddecay, C* dexpansion,
                                C* dprojection, int64_t n);
};

}  // namespace fastasr::cpu
