// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/simd/kernels.h"

// One block of ema_scan has up to 32 time steps of up to 64 channels, in buffers of C that lie in the first cache. A
// row holds kEmaLanes channels of one step; arrays over states hold N such rows.
namespace fastasr::cpu {

inline constexpr int64_t kEmaLanes = 64, kEmaSteps = 32;
// The products of this many steps are summed in C before the sum goes on in double.
inline constexpr int64_t kEmaChain = 8;

// The form in which the kernels hold the decay q. In float it is d = 1 - q = p sigmoid(alpha): close to q = 1 the
// difference matters, and h - d h costs no more than q h. In double it is q, rounded as the definition rounds it.
FASTASR_INLINE double ema_log_decay(float d) { return std::log1p(-static_cast<double>(d)); }
FASTASR_INLINE double ema_log_decay(double q) { return std::log(q); }
FASTASR_INLINE float ema_decayed(float h, float d) { return h - d * h; }
FASTASR_INLINE double ema_decayed(double h, double q) { return q * h; }

// Computes, per state and lane: h(t) = g(t) + in x(t) [- late x(t-K)], g(t+1) = q h(t); y(t) += out h(t).
template <typename C>
struct EmaConvolution {
  const C *x, *x_late;                          // [steps][64]; x_late is null unless truncated
  const C *decay, *low, *in, *out, *late_gain;  // [N][64]; low: of complex numbers in double
  C *y, *g, *last;  // y [steps][64]; g [N][64], carried on; last [N][64]: h of the last step, or null
  const C* other;   // [steps][64] or null: then sum [N][64] = sum over steps of h(t) other(t)
  C* sum;
  bool start;  // y begins at 0
  bool real;   // `in` has no imaginary part
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

// `real` works as above. For `complex`, arrays over states hold a row of real and a row of imaginary parts for each; x
// and y are real, y(t) += Re(out h(t)), and sum takes the real part and leaves its other rows alone. The decay is 1 - q
// in float. In double it is q, and `low` is what rounding took from q: an error of 1e-16 per step would grow to 1e-13
// in a slow scan.
template <typename C>
struct EmaBlocks {
  EmaBlock<C> real, complex;
};

}  // namespace fastasr::cpu
