// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/ema_coefficients.cuh"

// ema_coefficients.cuh for Megalodon's complex average: p = σ(alpha), a = σ(delta), |q| = 1 - p a, the angle of state n
// (from 0) is (n + 1) σ(theta) 2π / N, b = p, c = gamma / √N. The parameters stand in the fields `damping` (alpha),
// `decay` (delta), `expansion` (theta, one per row) and `projection` (gamma, real and imaginary parts).
namespace fastasr::cuda {

struct ComplexEmaCoefficients {
  double p, a, s, radius, angle;
  Complex<double> turn, q, q_less_one, c, log, log_low;
};

template <typename C>
FASTASR_HD ComplexEmaCoefficients complex_ema_coefficients(C alpha, C delta, C theta, C gamma_re, C gamma_im, int64_t n,
                                                           int64_t states) {
  ComplexEmaCoefficients k;
  k.p = sigmoid(static_cast<double>(alpha));
  k.a = sigmoid(static_cast<double>(delta));
  k.s = sigmoid(static_cast<double>(theta));
  k.radius = 1 - k.p * k.a;
  k.angle = static_cast<double>(n + 1) * (k.s * (6.283185307179586477 / static_cast<double>(states)));
  // the angle in turns: 1 / 2π in two parts, the product in two parts
  const double turns = k.angle * 0.15915494309189535;
  k.log = {k.radius > 0 ? log1p(-k.p * k.a) * 1.44269504088896340736 : -1e30, turns};
  k.log_low = {0, fma(k.angle, 0.15915494309189535, -turns) + k.angle * -9.839338337591243e-18};
  k.turn = power(Complex<double>{0, turns}, k.log_low, 1.0);
  k.q = {k.radius * k.turn.re, k.radius * k.turn.im};
  // (|q| - 1) - 2 |q| sin^2(angle / 2): without cancellation
  const double half = sinpi(turns);
  k.q_less_one = {-k.p * k.a - 2 * k.radius * half * half, k.q.im};
  const double scale = 1 / sqrt(static_cast<double>(states));
  k.c = {scale * static_cast<double>(gamma_re), scale * static_cast<double>(gamma_im)};
  return k;
}

template <typename P>
FASTASR_HD ComplexEmaCoefficients complex_ema_coefficients(const P* alpha, const P* delta, const P* theta,
                                                           const P* gamma, int64_t row, int64_t n, int64_t states) {
  const int64_t i = row * states + n;
  return complex_ema_coefficients(alpha[i], delta[i], theta[row], gamma[2 * i], gamma[2 * i + 1], n, states);
}

// Each padded state and channel has one thread.
template <typename C, typename P>
FASTASR_KERNEL(kFlatThreads, 1)
prepare_complex_coefficients(CoefficientParameters<C, P> p) {
  constexpr int kStates = StateTraits<Complex<C>>::kStates;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  const int64_t size = static_cast<int64_t>(p.groups) * kStates * p.channels;
  if (at >= size) return;
  const int64_t channel = at % p.channels, state = at / p.channels;
  const int64_t n = state % (p.groups_each * kStates);
  const int64_t row = channel + state / (p.groups_each * kStates) * p.channels;
  if (p.residual != nullptr && state == 0)
    p.out[kCoefficients * 2 * size + channel] = static_cast<C>(p.residual[channel]);
  const bool given = n < p.states;
  ComplexEmaCoefficients k{};
  if (given) k = complex_ema_coefficients(p.damping, p.decay, p.expansion, p.projection, row, n, p.states);
  const double late = static_cast<double>(p.truncation), rows = p.warp_rows;
  const Complex<double> none{0, 0};
  const auto put = [&](int kind, Complex<double> v) {
    p.out[kind * 2 * size + at] = static_cast<C>(v.re);
    p.out[(kind * 2 + 1) * size + at] = static_cast<C>(v.im);
  };
  const auto to_the = [&](double steps) { return given ? power(k.log, k.log_low, steps) : none; };
  const auto times = [](double f, Complex<double> v) { return Complex<double>{f * v.re, f * v.im}; };
  put(kQ, k.q);
  put(kWeight, times(k.p, k.c));
  put(kIn, {k.p, 0});
  put(kOut, k.c);
  put(kLog, k.log);
  // the part of the turns that rounding to C takes away
  const double stored = static_cast<double>(static_cast<C>(k.log.im));
  put(kLogLow, {0, k.log.im - stored + k.log_low.im});
  put(kQLessOne, k.q_less_one);
  put(kQRows, to_the(rows));
  put(kSlopeRows, times(rows, to_the(rows - 1)));
  if (p.truncation) {
    put(kDelayed, to_the(late));
    put(kDelayedSlope, times(late, to_the(late - 1)));
  }
}

// Does what finish_gradients does for complex numbers, which are all derivatives, d loss = Re(derivative · change),
// until they are written. The gradient of a state's angle goes to p.by_angle, which add_angles adds up.
template <typename C>
FASTASR_KERNEL(256, 1)
finish_complex_gradients(GradientParameters<C> p) {
  using Z = Complex<double>;
  constexpr int kStates = StateTraits<Complex<C>>::kStates;
  FASTASR_DYNAMIC_SHARED(memory);
  double* const shared = reinterpret_cast<double*>(memory);  // [4][8][32]
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t channel_blocks = (p.channels + 31) / 32, all = static_cast<int64_t>(p.groups) * kStates;
  const int64_t channel = blockIdx.x % channel_blocks * 32 + lane, state = blockIdx.x / channel_blocks;
  const int64_t rows = p.groups * 8 + 1;
  const int64_t first = state < all ? state / kStates * 8 + state % kStates * 2 : rows - 1;
  const int kinds = state < all ? 4 : 1;  // real and imaginary parts of u, and of f four rows on
  double sums[4] = {0, 0, 0, 0};
  if (channel < p.channels)
    for (int64_t i = warp; i < p.blocks; i += 8)
#pragma unroll
      for (int kind = 0; kind < 4; kind++)
        if (kind < kinds) sums[kind] += p.parts[(i * rows + first + kind / 2 * 4 + kind % 2) * p.channels + channel];
#pragma unroll
  for (int kind = 0; kind < 4; kind++) shared[(kind * 8 + warp) * 32 + lane] = sums[kind];
  __syncthreads();
  if (warp != 0 || channel >= p.channels) return;
#pragma unroll
  for (int kind = 0; kind < 4; kind++) {
    sums[kind] = 0;
    for (int w = 0; w < 8; w++) sums[kind] += shared[(kind * 8 + w) * 32 + lane];
  }
  if (state == all) {
    if (p.dresidual != nullptr) p.dresidual[channel] = static_cast<C>(sums[0]);
    return;
  }
  const int64_t n = state % (p.groups_each * kStates), direction = state / (p.groups_each * kStates);
  if (n >= p.states) return;
  const int64_t row = channel + direction * p.channels, i = row * p.states + n;
  const ComplexEmaCoefficients k =
      complex_ema_coefficients(p.damping, p.decay, p.expansion, p.projection, row, n, p.states);
  const Z sum_u{sums[0], sums[1]}, sum_f{sums[2], sums[3]};
  Z dc{k.p * sum_u.re, k.p * sum_u.im}, dq = multiply(Z{k.p * k.c.re, k.p * k.c.im}, sum_f);
  double dp = multiply(k.c, sum_u).re;
  if (p.state != nullptr || p.grad_state != nullptr) {
    const double length = static_cast<double>(p.length);
    const Z all_steps = power(k.log, k.log_low, length), less_one = power(k.log, k.log_low, length - 1);
    const Z slope{length * less_one.re, length * less_one.im};
    for (int64_t b = 0; b < p.batch; b++) {
      const int64_t at = ((b * p.channels + channel) * p.states + n) * 2;
      const int64_t from = ((b * p.groups + state / kStates) * 8 + state % kStates * 2) * p.channels + channel;
      const auto read = [&](const C* values, int64_t i, int64_t pitch) {
        return Z{static_cast<double>(values[i]), static_cast<double>(values[i + pitch])};
      };
      const Z h = p.state != nullptr ? read(p.state, at, 1) : Z{0, 0};
      const Z g = p.grad_state != nullptr ? conjugate(read(p.grad_state, at, 1)) : Z{0, 0};
      // d/dh and d/dq of Σ_t g'_t q^(t+1), t from 0
      Z before{0, 0}, before_slope{0, 0};
      if (p.finals != nullptr) {
        const Z u = read(p.finals, from, p.channels), f = read(p.finals, from + 4 * p.channels, p.channels);
        before = multiply(k.q, u);
        before_slope = multiply_add(k.q, f, u);
      }
      dc = multiply_add(h, before, dc);
      dq = multiply_add(multiply(k.c, h), before_slope, multiply_add(multiply(g, slope), h, dq));
      if (p.input_finals != nullptr) {
        const Z u = read(p.input_finals, from, p.channels), f = read(p.input_finals, from + 4 * p.channels, p.channels);
        dp += multiply(g, u).re;
        dq = multiply_add(Z{k.p * g.re, k.p * g.im}, f, dq);
      }
      if (p.dstate != nullptr) {
        const Z d = multiply_add(k.c, before, multiply(g, all_steps));
        p.dstate[at] = static_cast<C>(d.re), p.dstate[at + 1] = static_cast<C>(-d.im);
      }
    }
  }
  const Z turned = multiply(dq, k.turn);
  const double scale = 1 / sqrt(static_cast<double>(p.states));
  p.ddamping[i] = static_cast<C>((dp - turned.re * k.a) * k.p * (1 - k.p));
  p.ddecay[i] = static_cast<C>(-turned.re * k.p * k.a * (1 - k.a));
  p.dprojection[2 * i] = static_cast<C>(scale * dc.re), p.dprojection[2 * i + 1] = static_cast<C>(-scale * dc.im);
  p.by_angle[i] = -static_cast<double>(n + 1) * turned.im * k.radius;
}

template <typename C>
struct AngleParameters {
  int64_t rows, states;
  const double* by_angle;  // (rows, states)
  const C* theta;          // (rows)
  C* dtheta;
};

// Each row has one thread.
template <typename C>
FASTASR_KERNEL(kFlatThreads, 1)
add_angles(AngleParameters<C> p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  if (row >= p.rows) return;
  double sum = 0;
  for (int64_t n = 0; n < p.states; n++) sum += p.by_angle[row * p.states + n];
  const double s = sigmoid(static_cast<double>(p.theta[row]));
  p.dtheta[row] = static_cast<C>(sum * s * (1 - s) * (6.283185307179586477 / static_cast<double>(p.states)));
}

template <typename C>
FASTASR_KERNEL(kFlatThreads, 1)
complex_scan_step(StepParameters<C> p) {
  using Z = Complex<double>;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  if (at >= p.batch * p.channels) return;
  const int64_t batch = at / p.channels, channel = at % p.channels;
  double x = 0, sum = 0;  // in double: a step is bound by its launch
  if (p.length > 0) {
    x = static_cast<double>(load_one<C>(p.x.type, p.x.data, batch * p.x.batch + channel * p.x.channel));
    if (p.residual != nullptr) sum = static_cast<double>(p.residual[channel]) * x;
    if (p.mask != nullptr && p.mask[batch]) x = 0;
  }
  for (int direction = 0; direction < p.directions; direction++)
    for (int64_t n = 0; n < p.states; n++) {
      const int64_t i = 2 * (at * p.states + n), row = channel + direction * p.channels;
      Z h{0, 0};
      if (p.state != nullptr) h = {static_cast<double>(p.state[i]), static_cast<double>(p.state[i + 1])};
      if (p.length > 0) {
        const ComplexEmaCoefficients k =
            complex_ema_coefficients(p.damping, p.decay, p.expansion, p.projection, row, n, p.states);
        h = multiply_add(k.q, h, Z{k.p * x, 0});
        sum = add_output(sum, k.c, h);
      }
      if (p.final_state != nullptr)
        p.final_state[i] = static_cast<C>(h.re), p.final_state[i + 1] = static_cast<C>(h.im);
    }
  if (p.length > 0) {
    C y[1] = {static_cast<C>(sum)};
    activate<1>(p.activation, y);
    store_one(p.y.type, const_cast<void*>(p.y.data), batch * p.y.batch + channel * p.y.channel, y[0]);
  }
}

}  // namespace fastasr::cuda
