// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/activation.cuh"
#include "cuda/scan_tile.cuh"

// From Mega's parameters to the scan's coefficients, and from the scan's sums to the gradients of the parameters:
//   p = σ(δ), a = σ(α), q = 1 - p a, b = p β, c = γ / √N, weight = b c.
// They are computed in double, once per state, and rounded once.
namespace fastasr::cuda {

struct EmaCoefficients {
  double p, a, q, b, c;
};

template <typename C>
FASTASR_HD EmaCoefficients ema_coefficients(C damping, C decay, C expansion, C projection, int64_t states) {
  EmaCoefficients k;
  k.p = sigmoid(static_cast<double>(damping));
  k.a = sigmoid(static_cast<double>(decay));
  k.q = 1 - k.p * k.a;
  k.b = k.p * static_cast<double>(expansion);
  k.c = static_cast<double>(projection) / sqrt(static_cast<double>(states));
  return k;
}

// log2 q; a large negative number where q is 0, so that 0 times it is 0
FASTASR_HD double ema_log2(const EmaCoefficients& k) {
  return k.q > 0 ? log1p(-k.p * k.a) * 1.44269504088896340736 : -1e30;
}

template <typename C, typename P>
struct CoefficientParameters {
  int64_t channels, states, truncation;
  int warp_rows;  // steps that a warp of the scan takes
  int groups, groups_each;
  const P *damping, *decay, *expansion, *projection;  // (rows, states)
  const P* residual;                                  // (channels) or null
  C* out;                                             // [kind][state][channel], then the residual weights
};

constexpr int kFlatThreads = 128;

// Each padded state and channel has one thread.
template <typename C, typename P>
FASTASR_KERNEL(kFlatThreads, 1)
prepare_coefficients(CoefficientParameters<C, P> p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  const int64_t size = static_cast<int64_t>(p.groups) * 4 * p.channels;
  if (at >= size) return;
  const int64_t channel = at % p.channels, state = at / p.channels;
  const int64_t n = state % (p.groups_each * 4), row = channel + state / (p.groups_each * 4) * p.channels;
  EmaCoefficients k{0, 0, 0, 0, 0};
  if (p.residual != nullptr && state == 0) p.out[kCoefficients * size + channel] = static_cast<C>(p.residual[channel]);
  if (n < p.states) {
    const int64_t i = row * p.states + n;
    k = ema_coefficients(p.damping[i], p.decay[i], p.expansion[i], p.projection[i], p.states);
  }
  const double log = ema_log2(k), late = static_cast<double>(p.truncation), rows = p.warp_rows;
  p.out[kQ * size + at] = static_cast<C>(k.q);
  p.out[kWeight * size + at] = static_cast<C>(k.b * k.c);
  p.out[kIn * size + at] = static_cast<C>(k.b);
  p.out[kOut * size + at] = static_cast<C>(k.c);
  p.out[kLog * size + at] = static_cast<C>(log);
  p.out[kLogLow * size + at] = C(0);
  p.out[kQLessOne * size + at] = static_cast<C>(-k.p * k.a);
  p.out[kQRows * size + at] = static_cast<C>(exp2(rows * log));
  p.out[kSlopeRows * size + at] = static_cast<C>(rows * exp2((rows - 1) * log));
  if (p.truncation) {
    p.out[kDelayed * size + at] = static_cast<C>(exp2(late * log));
    p.out[kDelayedSlope * size + at] = static_cast<C>(late * exp2((late - 1) * log));
  }
}

// Turns ends[segment] (from zero) into the states before each segment, in place.
template <typename C>
struct CarryParameters {
  int64_t batch, channels, segments, segment_length;
  int groups, groups_each, values;  // real numbers per group: 4 (u) or 8 (u and f)
  unsigned reversed;
  const C* coefficients;
  C* carry;  // [segment][batch][group][value][channel]
};

// Each batch row, state and channel has one thread.
template <typename Q>
FASTASR_KERNEL(kFlatThreads, 1)
carry_segments(CarryParameters<typename StateTraits<Q>::Real> p) {
  using C = typename StateTraits<Q>::Real;
  constexpr int kStates = StateTraits<Q>::kStates, kParts = StateTraits<Q>::kParts;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  const int64_t states = static_cast<int64_t>(p.groups) * kStates, size = states * p.channels;
  if (at >= p.batch * size) return;
  const int64_t channel = at % p.channels, state = at / p.channels % states, batch = at / p.channels / states;
  const int64_t group = state / kStates;
  const auto coefficient = [&](int kind) {
    return read_state(p.coefficients + kind * kParts * size + state * p.channels + channel, size, Q());
  };
  const Q log = coefficient(kLog), low = kParts == 1 ? zero(Q()) : coefficient(kLogLow);
  const C length = static_cast<C>(p.segment_length);
  const Q q = power(log, low, length), slope = multiply(from_real(length, Q()), power(log, low, length - C(1)));
  const int64_t pitch = p.batch * p.groups * p.values * p.channels;
  const bool reverse = p.reversed >> (group / p.groups_each) & 1u;
  C* u = p.carry + ((batch * p.groups + group) * p.values + state % kStates * kParts) * p.channels + channel;
  const int64_t step = reverse ? -pitch : pitch;
  if (reverse) u += (p.segments - 1) * pitch;
  Q before_u = zero(Q()), before_f = zero(Q());
  for (int64_t i = 0; i < p.segments; i++) {
    const Q end_u = read_state(u, p.channels, Q());
    write_state(u, p.channels, before_u);
    if (p.values == 8) {
      C* const f = u + 4 * p.channels;
      const Q end_f = read_state(f, p.channels, Q());
      write_state(f, p.channels, before_f);
      before_f = multiply_add(q, before_f, multiply_add(slope, before_u, end_f));
    }
    before_u = multiply_add(q, before_u, end_u);
    u += step;
  }
}

template <typename C>
struct GradientParameters {
  int64_t length, batch, channels, states, blocks;  // blocks: rows of parts (segments x batch), 0 where L or B is 0
  int groups, groups_each;
  const C *damping, *decay, *expansion, *projection;
  const C *state, *grad_state;  // or null
  const double* parts;          // [block][group x 8 + 1][channel]
  const C* finals;              // of the adjoint scan, [batch][group][8][channel], or null
  const C* input_finals;        // of the same scan over x, or null
  C *ddamping, *ddecay, *dexpansion, *dprojection, *dresidual, *dstate;
  double* by_angle;  // complex numbers: [row][state], else null
};

// Each block (32 channels, state) adds the parts in a fixed order, in double; its first warp then applies the chain
// rule. The state behind the last one stands for the residual weight.
template <typename C>
FASTASR_KERNEL(256, 1)
finish_gradients(GradientParameters<C> p) {
  FASTASR_DYNAMIC_SHARED(memory);
  double* const shared = reinterpret_cast<double*>(memory);  // [2][8][32]
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t channel_blocks = (p.channels + 31) / 32, all = static_cast<int64_t>(p.groups) * 4;
  const int64_t channel = blockIdx.x % channel_blocks * 32 + lane, state = blockIdx.x / channel_blocks;
  const int64_t rows = p.groups * 8 + 1;
  const int64_t row = state < all ? state / 4 * 8 + state % 4 : rows - 1;
  double sum_u = 0, sum_f = 0;
  if (channel < p.channels) {
#pragma unroll 4
    for (int64_t i = warp; i < p.blocks; i += 8) {
      sum_u += p.parts[(i * rows + row) * p.channels + channel];
      if (state < all) sum_f += p.parts[(i * rows + row + 4) * p.channels + channel];
    }
  }
  shared[warp * 32 + lane] = sum_u;
  shared[(8 + warp) * 32 + lane] = sum_f;
  __syncthreads();
  if (warp != 0 || channel >= p.channels) return;
  sum_u = sum_f = 0;
  for (int w = 0; w < 8; w++) sum_u += shared[w * 32 + lane], sum_f += shared[(8 + w) * 32 + lane];
  if (state == all) {
    if (p.dresidual != nullptr) p.dresidual[channel] = static_cast<C>(sum_u);
    return;
  }
  const int64_t n = state % (p.groups_each * 4), direction = state / (p.groups_each * 4);
  if (n >= p.states) return;
  const int64_t i = (channel + direction * p.channels) * p.states + n;
  const EmaCoefficients k = ema_coefficients(p.damping[i], p.decay[i], p.expansion[i], p.projection[i], p.states);
  double dq = k.b * k.c * sum_f, db = k.c * sum_u, dc = k.b * sum_u;
  if (p.state != nullptr || p.grad_state != nullptr) {
    const double log = ema_log2(k), length = static_cast<double>(p.length);
    const double all_steps = exp2(length * log), slope = length * exp2((length - 1) * log);
    for (int64_t b = 0; b < p.batch; b++) {
      const int64_t at = (b * p.channels + channel) * p.states + n;
      const int64_t from = ((b * p.groups + state / 4) * 8 + state % 4) * p.channels + channel;
      const double h = p.state != nullptr ? static_cast<double>(p.state[at]) : 0;
      const double g = p.grad_state != nullptr ? static_cast<double>(p.grad_state[at]) : 0;
      // d/dh and d/dq of Σ_t g'_t q^(t+1), t from 0
      double before = 0, before_slope = 0;
      if (p.finals != nullptr) {
        const double u = static_cast<double>(p.finals[from]), f = static_cast<double>(p.finals[from + 4 * p.channels]);
        before = k.q * u;
        before_slope = k.q * f + u;
      }
      dc += h * before;
      dq += k.c * h * before_slope + g * slope * h;
      if (p.input_finals != nullptr) {
        db += g * static_cast<double>(p.input_finals[from]);
        dq += g * k.b * static_cast<double>(p.input_finals[from + 4 * p.channels]);
      }
      if (p.dstate != nullptr) p.dstate[at] = static_cast<C>(k.c * before + g * all_steps);
    }
  }
  p.ddamping[i] = static_cast<C>((db * static_cast<double>(p.expansion[i]) - dq * k.a) * k.p * (1 - k.p));
  p.ddecay[i] = static_cast<C>(-dq * k.p * k.a * (1 - k.a));
  p.dexpansion[i] = static_cast<C>(db * k.p);
  p.dprojection[i] = static_cast<C>(dc / sqrt(static_cast<double>(p.states)));
}

// Runs one step or none (length 0 or 1): a thread per batch row and channel, all states, in one launch.
template <typename C>
struct StepParameters {
  ScanView x, y;
  int64_t length, batch, channels, states;
  int directions, activation;
  const C *damping, *decay, *expansion, *projection, *residual, *state;
  const unsigned char* mask;  // (batch, 1) or null
  C* final_state;             // or null
};

template <typename C>
FASTASR_KERNEL(kFlatThreads, 1)
scan_step(StepParameters<C> p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  if (at >= p.batch * p.channels) return;
  const int64_t batch = at / p.channels, channel = at % p.channels;
  double x = 0, sum = 0;  // in double: a step is bound by its launch
  if (p.length > 0) {
    x = static_cast<double>(load_one<C>(p.x.type, p.x.data, batch * p.x.batch + channel * p.x.channel));
    if (p.residual != nullptr) sum = static_cast<double>(p.residual[channel]) * x;
    if (p.mask != nullptr && p.mask[batch]) x = 0;
  }
  for (int direction = 0; direction < p.directions; direction++) {
    const int64_t row = (channel + direction * p.channels) * p.states;
    for (int64_t n = 0; n < p.states; n++) {
      double h = p.state != nullptr ? static_cast<double>(p.state[at * p.states + n]) : 0;
      if (p.length > 0) {
        const int64_t i = row + n;
        const EmaCoefficients k = ema_coefficients(p.damping[i], p.decay[i], p.expansion[i], p.projection[i], p.states);
        h = k.q * h + k.b * x;
        sum += k.c * h;
      }
      if (p.final_state != nullptr) p.final_state[at * p.states + n] = static_cast<C>(h);
    }
  }
  if (p.length > 0) {
    C y[1] = {static_cast<C>(sum)};
    activate<1>(p.activation, y);
    store_one(p.y.type, const_cast<void*>(p.y.data), batch * p.y.batch + channel * p.y.channel, y[0]);
  }
}

}  // namespace fastasr::cuda
