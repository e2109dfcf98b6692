// SPDX-License-Identifier: Apache-2.0
#include "cpu/ema/ema_scan.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/math/elementary.h"

namespace fastasr::cpu {
namespace {

// --- activations and their derivatives

// exactly 0 far out, where slopes multiply it by z
FASTASR_INLINE float sigmoid(float z) {
  const float e = exp_or_zero(-std::fabs(z)), r = 1.0f / (1.0f + e);
  return z >= 0.0f ? r : e * r;
}
FASTASR_INLINE double sigmoid(double z) {
  const double e = std::exp(-std::fabs(z)), r = 1.0 / (1.0 + e);
  return z >= 0.0 ? r : e * r;
}

FASTASR_INLINE float hyperbolic_tangent(float z) {
  // close to 0, where the quotient of exponentials loses digits, an odd polynomial (error 1.7e-8)
  const float a = std::fabs(z), s = z * z, e = exp_nonpositive(-2.0f * a), far = 1.0f - 2.0f * e / (1.0f + e);
  float p = 2.0605025e-3f;
  p = p * s + -8.11333116e-3f;
  p = p * s + 2.16893107e-2f;
  p = p * s + -5.39481491e-2f;
  p = p * s + 1.33332506e-1f;
  p = p * s + -3.33333313e-1f;
  return a < 0.7f ? z + z * s * p : (z < 0.0f ? -far : far);
}
FASTASR_INLINE double hyperbolic_tangent(double z) { return std::tanh(z); }

// Computes 1 - tanh(z)^2, far from 0 without its cancellation.
FASTASR_INLINE float tangent_slope(float z) {
  const float e = exp_nonpositive(-2.0f * std::fabs(z)), r = 1.0f / (1.0f + e), t = hyperbolic_tangent(z);
  return std::fabs(z) < 0.7f ? 1.0f - t * t : 4.0f * e * r * r;
}
FASTASR_INLINE double tangent_slope(double z) {
  const double e = std::exp(-2.0 * std::fabs(z)), r = 1.0 / (1.0 + e);
  return 4.0 * e * r * r;
}

// Returns the normal distribution function; `density` becomes its density. Within 1.5 of 0 it is an odd polynomial
// (2.7e-9), beyond it e^(-z^2/2) times a polynomial in 1 / (1 + 0.4 |z|) (4.7e-8).
FASTASR_INLINE float normal(float z, float* density) {
  const float a = std::fabs(z), s = z * z, e = exp_or_zero(-0.5f * s), t = 1.0f / (1.0f + 0.4f * a);
  float p = 4.11555955e-7f;
  p = p * s + -8.71830381e-6f;
  p = p * s + 1.14356390e-4f;
  p = p * s + -1.18648849e-3f;
  p = p * s + 9.97324131e-3f;
  p = p * s + -6.64903350e-2f;
  p = p * s + 3.98942279e-1f;
  float tail = 6.87603531e-2f;
  tail = tail * t + -1.88205718e-1f;
  tail = tail * t + 1.07303574e-1f;
  tail = tail * t + 5.44751680e-2f;
  tail = tail * t + 1.39312577e-1f;
  tail = tail * t + 1.59054591e-1f;
  tail = tail * t + 1.59598389e-1f;
  tail = tail * t * e;
  *density = 3.98942280e-1f * e;
  return a < 1.5f ? 0.5f + z * p : (z < 0.0f ? tail : 1.0f - tail);
}
FASTASR_INLINE double normal(double z, double* density) {
  *density = 0.3989422804014326779 * std::exp(-0.5 * z * z);
  return 0.5 * std::erfc(-0.7071067811865475244 * z);
}

template <EmaActivation kind, typename C>
FASTASR_INLINE C activation(C z) {
  if constexpr (kind == EmaActivation::silu) return z * sigmoid(z);
  if constexpr (kind == EmaActivation::relu) return z < 0 ? C(0) : z;
  if constexpr (kind == EmaActivation::tanh) return hyperbolic_tangent(z);
  if constexpr (kind == EmaActivation::gelu) {
    C density;
    return z * normal(z, &density);
  }
  return z;
}

template <EmaActivation kind, typename C>
FASTASR_INLINE C slope(C z) {
  if constexpr (kind == EmaActivation::silu) {
    const C s = sigmoid(z);
    return s * (C(1) + z * (C(1) - s));
  }
  if constexpr (kind == EmaActivation::relu) return z > 0 ? C(1) : C(0);
  if constexpr (kind == EmaActivation::tanh) return tangent_slope(z);
  if constexpr (kind == EmaActivation::gelu) {
    C density;
    const C below = normal(z, &density);
    return below + z * density;
  }
  return C(1);
}

// Each activation has its own function: several polynomials inlined into one function would spill.
template <EmaActivation kind, typename C>
__attribute__((noinline)) void activate_as(C* __restrict z, const C* __restrict x, const C* __restrict residual,
                                           int64_t steps, int64_t lanes) {
  for (int64_t s = 0; s < steps; s++, z += kEmaLanes, x += kEmaLanes) {
    if (residual) {
#pragma omp simd
      for (int64_t j = 0; j < lanes; j++) z[j] = activation<kind>(z[j] + residual[j] * x[j]);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < lanes; j++) z[j] = activation<kind>(z[j]);
    }
  }
}

template <EmaActivation kind, typename C>
__attribute__((noinline)) void activate_backward_as(C* __restrict z, const C* __restrict x,
                                                    const C* __restrict residual, const C* __restrict dy, int64_t steps,
                                                    int64_t lanes) {
  for (int64_t s = 0; s < steps; s++, z += kEmaLanes, x += kEmaLanes, dy += kEmaLanes) {
    if (residual) {
#pragma omp simd
      for (int64_t j = 0; j < lanes; j++) z[j] = dy[j] * slope<kind>(z[j] + residual[j] * x[j]);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < lanes; j++) z[j] = dy[j] * slope<kind>(z[j]);
    }
  }
}

// --- tensors and buffers

template <typename T>
void load_rows(const void* tensor, int64_t at, int64_t step, int64_t channel, const uint8_t* __restrict mask,
               int64_t mask_step, int64_t steps, int64_t channels, int64_t lanes, compute_t<T>* __restrict buffer) {
  using C = compute_t<T>;
  const T* __restrict p = static_cast<const T*>(tensor) + at;
  if (channel == 1) {
    for (int64_t s = 0; s < steps; s++) {
      const T* __restrict row = p + s * step;
      // prefetches the same row of the next block: rows lie kilobytes apart, which the hardware does not foresee
      const uintptr_t next =
          reinterpret_cast<uintptr_t>(row) + static_cast<uintptr_t>(kEmaSteps * step * int64_t(sizeof(T)));
      for (int64_t i = 0; i < channels * int64_t(sizeof(T)); i += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(next + static_cast<uintptr_t>(i)));
      copy_row<kEmaLanes>(row, buffer + s * kEmaLanes, channels);
    }
  } else {
    for (int64_t j = 0; j < channels; j++) {
      const T* __restrict row = p + j * channel;
      for (int64_t s = 0; s < steps; s++) buffer[s * kEmaLanes + j] = load(row[s * step]);
    }
  }
  for (int64_t s = 0; s < steps; s++) {
    C* __restrict out = buffer + s * kEmaLanes;
    for (int64_t j = channels; j < lanes; j++) out[j] = 0;
    if (mask && mask[s * mask_step])
      for (int64_t j = 0; j < channels; j++) out[j] = 0;
  }
}

template <typename T>
void store_rows(const compute_t<T>* __restrict buffer, void* tensor, int64_t at, int64_t step, int64_t channel,
                int64_t steps, int64_t channels) {
  T* __restrict p = static_cast<T*>(tensor) + at;
  if (channel == 1) {
    for (int64_t s = 0; s < steps; s++) copy_row<kEmaLanes>(buffer + s * kEmaLanes, p + s * step, channels);
  } else {
    for (int64_t j = 0; j < channels; j++) {
      T* __restrict row = p + j * channel;
      for (int64_t s = 0; s < steps; s++) store(&row[s * step], buffer[s * kEmaLanes + j]);
    }
  }
}

// --- coefficients

// Returns e^x for |x| <= 300, beyond which the argument is clamped; its relative error of 2e-10 suffices for float.
template <typename C>
FASTASR_INLINE double exponential(double x) {
  if constexpr (sizeof(C) == 8) return std::exp(x);
  x = x < -300.0 ? -300.0 : x;
  x = x > 300.0 ? 300.0 : x;
  const double t = x * 1.4426950408889634074, shifted = t + 0x1.8p52, f = t - (shifted - 0x1.8p52);
  double p = 1.3215486790144307e-6;
  p = p * f + 1.5252733804059841e-5;
  p = p * f + 1.5403530393381608e-4;
  p = p * f + 1.3333558146428443e-3;
  p = p * f + 9.6181291076284772e-3;
  p = p * f + 5.5504108664821580e-2;
  p = p * f + 2.4022650695910071e-1;
  p = p * f + 6.9314718055994531e-1;
  p = p * f + 1.0;
  int64_t i;
  std::memcpy(&i, &shifted, 8);
  i = static_cast<int64_t>((static_cast<uint64_t>(i) << 52) + 0x3ff0000000000000ull);
  double power;
  std::memcpy(&power, &i, 8);
  return p * power;
}

template <typename C>
void coefficients(const C* __restrict damping, const C* __restrict decay, const C* __restrict expansion,
                  const C* __restrict projection, double scale, C* __restrict q, C* __restrict b, C* __restrict c,
                  int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const double p = 1.0 / (1.0 + exponential<C>(-static_cast<double>(damping[i])));
    const double a = 1.0 / (1.0 + exponential<C>(-static_cast<double>(decay[i])));
    if constexpr (sizeof(C) == 8) {
      volatile double product = p * a;  // rounded, as in the definition, and not fused with the subtraction
      q[i] = 1.0 - product;
    } else {
      q[i] = static_cast<C>(p * a);  // 1 - q, see ema_log_decay
    }
    b[i] = static_cast<C>(p * static_cast<double>(expansion[i]));
    c[i] = static_cast<C>(scale * static_cast<double>(projection[i]));
  }
}

template <typename C>
void coefficients_backward(const C* __restrict damping, const C* __restrict decay, const C* __restrict expansion,
                           double scale, const double* __restrict dq, const double* __restrict db,
                           const double* __restrict dc, C* __restrict ddamping, C* __restrict ddecay,
                           C* __restrict dexpansion, C* __restrict dprojection, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const double x = static_cast<double>(damping[i]), y = static_cast<double>(decay[i]);
    const double p = 1.0 / (1.0 + exponential<C>(-x)), a = 1.0 / (1.0 + exponential<C>(-y));
    // 1 - p and 1 - a: in float more exact than by subtraction, in double rounded as in the definition
    const double p1 = sizeof(C) == 8 ? 1.0 - p : 1.0 / (1.0 + exponential<C>(x));
    const double a1 = sizeof(C) == 8 ? 1.0 - a : 1.0 / (1.0 + exponential<C>(y));
    ddamping[i] = static_cast<C>((db[i] * static_cast<double>(expansion[i]) - dq[i] * a) * p * p1);
    ddecay[i] = static_cast<C>(-dq[i] * p * a * a1);
    dexpansion[i] = static_cast<C>(db[i] * p);
    dprojection[i] = static_cast<C>(dc[i] * scale);
  }
}

template <typename C>
void finish_gradient(C* __restrict dx, const C* __restrict dy, const C* __restrict residual,
                     const uint8_t* __restrict mask, int64_t mask_step, int64_t steps, int64_t lanes) {
  for (int64_t s = 0; s < steps; s++, dx += kEmaLanes, dy += kEmaLanes) {
    if (mask && mask[s * mask_step])
      for (int64_t j = 0; j < lanes; j++) dx[j] = 0;
    if (residual) {
#pragma omp simd
      for (int64_t j = 0; j < lanes; j++) dx[j] += residual[j] * dy[j];
    }
  }
}

template <typename C>
void add_products(const C* __restrict a, const C* __restrict b, double* __restrict sum, int64_t steps, int64_t lanes) {
  for (int64_t s = 0; s < steps; s += kEmaChain) {  // short chains of floats, added in double
    const int64_t chain = std::min(kEmaChain, steps - s);
    alignas(64) C part[kEmaLanes] = {};
    for (int64_t k = 0; k < chain; k++, a += kEmaLanes, b += kEmaLanes) {
#pragma omp simd
      for (int64_t j = 0; j < lanes; j++) part[j] += a[j] * b[j];
    }
#pragma omp simd
    for (int64_t j = 0; j < lanes; j++) sum[j] += static_cast<double>(part[j]);
  }
}

template <typename C>
void fold(const C* __restrict part, double* __restrict sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) sum[i] += static_cast<double>(part[i]);
}

template <typename C>
void activate(C* z, const C* x, const C* residual, EmaActivation activation, int64_t steps, int64_t lanes) {
  using enum EmaActivation;
  constexpr decltype(&activate_as<identity, C>) by_kind[] = {
      activate_as<identity, C>, activate_as<silu, C>, activate_as<relu, C>, activate_as<tanh, C>, activate_as<gelu, C>};
  by_kind[static_cast<int>(activation)](z, x, residual, steps, lanes);
}

template <typename C>
void activate_backward(C* z, const C* x, const C* residual, const C* dy, EmaActivation activation, int64_t steps,
                       int64_t lanes) {
  using enum EmaActivation;
  constexpr decltype(&activate_backward_as<identity, C>) by_kind[] = {
      activate_backward_as<identity, C>, activate_backward_as<silu, C>, activate_backward_as<relu, C>,
      activate_backward_as<tanh, C>, activate_backward_as<gelu, C>};
  by_kind[static_cast<int>(activation)](z, x, residual, dy, steps, lanes);
}

// --- one time step, as decoding takes it: states are read and written where they lie, (B, D, N), and nothing is packed

// Computes h = q h + b x and y = sum over n of c h, for channels of one row of the batch. N > 0 is known when compiled.
template <int N, typename C>
__attribute__((noinline)) void channels_of(const C* __restrict x, const C* __restrict q, const C* __restrict b,
                                           const C* __restrict c, const C* __restrict before, C* __restrict after,
                                           C* __restrict y, int64_t channels, int64_t states) {
  if constexpr (N > 0) {
#pragma omp simd
    for (int64_t j = 0; j < channels; j++) {
      C sum = 0;
      for (int n = 0; n < N; n++) {
        const int64_t i = j * N + n;
        const C h = ema_decayed(before[i], q[i]) + b[i] * x[j];
        after[i] = h;
        sum += c[i] * h;
      }
      y[j] = sum;
    }
  } else {
    for (int64_t j = 0; j < channels; j++) {
      C sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t n = 0; n < states; n++) {
        const int64_t i = j * states + n;
        const C h = ema_decayed(before[i], q[i]) + b[i] * x[j];
        after[i] = h;
        sum += c[i] * h;
      }
      y[j] = sum;
    }
  }
}

// Computes coefficients of a few channels at a time, which every row of the batch then uses.
constexpr int64_t kValues = 1024;

template <typename T>
void one_step(const EmaShape& shape, const EmaParameters<compute_t<T>>& p, const T* x, EmaStrides xs, T* y,
              EmaStrides ys, compute_t<T>* final_state) {
  using C = compute_t<T>;
  const EmaTile<C>& tile = kernels<EmaTile<C>>();
  const EmaCopies<C>& copies = kernels<EmaTensor<T>>().copies;
  const auto step = shape.states == 4 ? channels_of<4, C> : shape.states == 1 ? channels_of<1, C> : channels_of<0, C>;
  alignas(64) C q[kValues], b[kValues], c[kValues], before[kValues], after[kValues];
  alignas(64) C plain[kValues], masked[kValues], out[kValues];
  const int64_t states = shape.states, most = kValues / states;
  const double scale = 1.0 / std::sqrt(static_cast<double>(states));
  for (int64_t first = 0; first < shape.channels; first += most) {
    const int64_t channels = std::min(most, shape.channels - first), at = first * states, n = channels * states;
    tile.coefficients(p.damping + at, p.decay + at, p.expansion + at, p.projection + at, scale, q, b, c, n);
    if (!p.state) std::fill(before, before + n, C(0));
    for (int64_t row = 0; row < shape.batch; row++) {
      const int64_t state = row * shape.channels * states + at;
      for (int64_t j = 0; j < channels; j += kEmaLanes) {
        const int64_t m = std::min(kEmaLanes, channels - j);
        copies.load(x, row * xs.batch + (first + j) * xs.channel, xs.time, xs.channel, nullptr, 0, 1, m, m, plain + j);
      }
      const C* in = plain;
      if (p.mask && p.mask[row]) std::fill(masked, masked + channels, C(0)), in = masked;
      const C* h = p.state ? p.state + state : before;
      C* h_out = final_state ? final_state + state : after;
      step(in, q, b, c, h, h_out, out, channels, states);
      for (int64_t j = 0; j < channels; j += kEmaLanes) {
        const int64_t m = std::min(kEmaLanes, channels - j);
        tile.activate(out + j, plain + j, p.residual ? p.residual + first + j : nullptr, shape.activation, 1, m);
        copies.store(out + j, y, row * ys.batch + (first + j) * ys.channel, ys.time, ys.channel, 1, m);
      }
    }
  }
}

}  // namespace

FASTASR_KERNELS(EmaTensor, .copies = {.load = load_rows<T>, .store = store_rows<T>}, .one_step = one_step<T>)
FASTASR_KERNELS_COMPUTE(EmaTile, .activate = activate<T>, .activate_backward = activate_backward<T>,
                        .finish_gradient = finish_gradient<T>, .add_products = add_products<T>, .fold = fold<T>,
                        .coefficients = coefficients<T>, .coefficients_backward = coefficients_backward<T>)

}  // namespace fastasr::cpu
