// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/activation.cuh"
#include "cuda/scan_tile.cuh"

// From the parameters to the scan's coefficients, and from the scan's sums to the gradients of the parameters:
//   real     p = σ(damping), a = σ(decay), q = 1 - p a, b = p expansion, c = projection / √N
//   complex  p = σ(alpha), a = σ(delta), |q| = 1 - p a, the angle of state n (from 0) is (n + 1) σ(theta) 2π / N, b =
//   p,
//            c = gamma / √N
// and weight = b c. They are computed in double, once per state, and rounded once. The complex parameters stand in the
// fields `damping` (alpha), `decay` (delta), `expansion` (theta, one per row) and `projection` (gamma, real and
// imaginary parts).
namespace fastasr::cuda {

// log2 of 1 - p a; a large negative number where that is 0, so that 0 times it is 0
FASTASR_HD double log2_radius(double p, double a) {
  return 1 - p * a > 0 ? log1p(-p * a) * 1.44269504088896340736 : -1e30;
}

template <typename Z>
struct EmaCoefficients {
  double p, a, b, q, c;

  template <typename Parameters>
  FASTASR_HD static EmaCoefficients of(const Parameters& from, int64_t row, int64_t n) {
    const int64_t i = row * from.states + n;
    EmaCoefficients k;
    k.p = sigmoid(static_cast<double>(from.damping[i]));
    k.a = sigmoid(static_cast<double>(from.decay[i]));
    k.b = k.p * static_cast<double>(from.expansion[i]);
    k.q = 1 - k.p * k.a;
    k.c = static_cast<double>(from.projection[i]) / sqrt(static_cast<double>(from.states));
    return k;
  }
  FASTASR_HD double q_less_one() const { return -p * a; }
  FASTASR_HD double log() const { return log2_radius(p, a); }
  template <typename C>
  FASTASR_HD double log_low() const {
    return 0;
  }
};

template <>
struct EmaCoefficients<Complex<double>> {
  double p, a, b, radius, angle, turns;
  Complex<double> turn, q, c;

  template <typename Parameters>
  FASTASR_HD static EmaCoefficients of(const Parameters& from, int64_t row, int64_t n) {
    const int64_t i = row * from.states + n;
    EmaCoefficients k;
    k.p = k.b = sigmoid(static_cast<double>(from.damping[i]));
    k.a = sigmoid(static_cast<double>(from.decay[i]));
    k.radius = 1 - k.p * k.a;
    const double first = sigmoid(static_cast<double>(from.expansion[row]));
    k.angle = static_cast<double>(n + 1) * (first * (6.283185307179586477 / static_cast<double>(from.states)));
    k.turns = k.angle * 0.15915494309189535;
    k.turn = power(Complex<double>{0, k.turns}, k.log_low<double>(), 1.0);
    k.q = scaled(k.radius, k.turn);
    const double scale = 1 / sqrt(static_cast<double>(from.states));
    k.c = {scale * static_cast<double>(from.projection[2 * i]),
           scale * static_cast<double>(from.projection[2 * i + 1])};
    return k;
  }
  // (|q| - 1) - 2 |q| sin^2(angle / 2): without cancellation
  FASTASR_HD Complex<double> q_less_one() const {
    const double half = sinpi(turns);
    return {-p * a - 2 * radius * half * half, q.im};
  }
  FASTASR_HD Complex<double> log() const { return {log2_radius(p, a), turns}; }
  // what the turns lack: 1 / 2π has two parts, the product has two parts, and rounding to C takes one away
  template <typename C>
  FASTASR_HD Complex<double> log_low() const {
    const double low = fma(angle, 0.15915494309189535, -turns) + angle * -9.839338337591243e-18;
    return {0, turns - static_cast<double>(static_cast<C>(turns)) + low};
  }
};

template <typename C, typename P>
struct CoefficientParameters {
  int64_t channels, states, truncation;
  int warp_rows;  // steps that a warp of the scan takes
  int groups, groups_each;
  const P *damping, *decay, *expansion, *projection;  // (rows, states)
  const P* residual;                                  // (channels) or null
  C* out;                                             // [kind][state][part][channel], then the residual weights
};

constexpr int kFlatThreads = 128;

// Each padded state and channel has one thread.
template <typename Q, typename P>
FASTASR_KERNEL(kFlatThreads, 1)
prepare_coefficients(CoefficientParameters<typename StateTraits<Q>::Real, P> p) {
  using C = typename StateTraits<Q>::Real;
  using Z = Wide<Q>;
  constexpr int kStates = StateTraits<Q>::kStates, kParts = StateTraits<Q>::kParts;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  const int64_t size = static_cast<int64_t>(p.groups) * kStates * p.channels;
  if (at >= size) return;
  const int64_t channel = at % p.channels, state = at / p.channels;
  const int64_t n = state % (p.groups_each * kStates);
  const int64_t row = channel + state / (p.groups_each * kStates) * p.channels;
  if (p.residual != nullptr && state == 0)
    p.out[kCoefficients * kParts * size + channel] = static_cast<C>(p.residual[channel]);
  const bool given = n < p.states;
  EmaCoefficients<Z> k{};
  if (given) k = EmaCoefficients<Z>::of(p, row, n);
  const Z log = k.log(), low = k.template log_low<double>();
  const double late = static_cast<double>(p.truncation), rows = p.warp_rows;
  const auto put = [&](int kind, Z v) { write_state(p.out + kind * kParts * size + at, size, narrow<C>(v)); };
  const auto to_the = [&](double steps) { return given ? power(log, low, steps) : zero(Z()); };
  put(kQ, k.q);
  put(kWeight, scaled(k.b, k.c));
  put(kIn, from_real(k.b, Z()));
  put(kOut, k.c);
  put(kLog, log);
  put(kLogLow, k.template log_low<C>());
  put(kQLessOne, k.q_less_one());
  put(kQRows, to_the(rows));
  put(kSlopeRows, scaled(rows, to_the(rows - 1)));
  if (p.truncation) {
    put(kDelayed, to_the(late));
    put(kDelayedSlope, scaled(late, to_the(late - 1)));
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
  const C* finals;              // u and f at the end of the adjoint scan, [batch][group][8][channel], or null
  const C* input_finals;        // u and f at the end of the same scan over x, or null
  C *ddamping, *ddecay, *dexpansion, *dprojection, *dresidual, *dstate;
  double* by_angle;  // complex numbers: [row][state], else null
};

// Each block (32 channels, state) adds the parts in a fixed order, in double; its first warp then applies the chain
// rule. The state behind the last one stands for the residual weight. Complex numbers are all derivatives, d loss =
// Re(derivative · change), until they are written; the gradient of a state's angle goes to p.by_angle.
template <typename Q>
FASTASR_KERNEL(256, 1)
finish_gradients(GradientParameters<typename StateTraits<Q>::Real> p) {
  using C = typename StateTraits<Q>::Real;
  using Z = Wide<Q>;
  constexpr int kStates = StateTraits<Q>::kStates, kParts = StateTraits<Q>::kParts, kKinds = 2 * kParts;
  FASTASR_DYNAMIC_SHARED(memory);
  double* const shared = reinterpret_cast<double*>(memory);  // [kKinds][8][32]
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t channel_blocks = (p.channels + 31) / 32, all = static_cast<int64_t>(p.groups) * kStates;
  const int64_t channel = blockIdx.x % channel_blocks * 32 + lane, state = blockIdx.x / channel_blocks;
  const int64_t rows = p.groups * 8 + 1;
  const int64_t first = state < all ? state / kStates * 8 + state % kStates * kParts : rows - 1;
  const int kinds = state < all ? kKinds : 1;  // the parts of u, and of f four rows on
  double sums[kKinds] = {};
  if (channel < p.channels) {
#pragma unroll(kParts == 1 ? 4 : 1)
    for (int64_t i = warp; i < p.blocks; i += 8)
#pragma unroll
      for (int kind = 0; kind < kKinds; kind++)
        if (kind < kinds)
          sums[kind] += p.parts[(i * rows + first + kind / kParts * 4 + kind % kParts) * p.channels + channel];
  }
#pragma unroll
  for (int kind = 0; kind < kKinds; kind++) shared[(kind * 8 + warp) * 32 + lane] = sums[kind];
  __syncthreads();
  if (warp != 0 || channel >= p.channels) return;
#pragma unroll
  for (int kind = 0; kind < kKinds; kind++) {
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
  const auto k = EmaCoefficients<Z>::of(p, row, n);
  const Z sum_u = read_state(sums, 1, Z()), sum_f = read_state(sums + kParts, 1, Z());
  Z dq = multiply(scaled(k.b, k.c), sum_f), dc = scaled(k.b, sum_u);
  double db = real_part(multiply(k.c, sum_u));
  if (p.state != nullptr || p.grad_state != nullptr) {
    const Z log = k.log(), low = k.template log_low<double>();
    const double length = static_cast<double>(p.length);
    const Z all_steps = power(log, low, length), slope = scaled(length, power(log, low, length - 1));
    const auto read = [&](const C* values, int64_t pitch) { return widen(read_state(values, pitch, Q())); };
    for (int64_t b = 0; b < p.batch; b++) {
      const int64_t at = ((b * p.channels + channel) * p.states + n) * kParts;
      const int64_t from = ((b * p.groups + state / kStates) * 8 + state % kStates * kParts) * p.channels + channel;
      const Z h = p.state != nullptr ? read(p.state + at, 1) : zero(Z());
      const Z g = p.grad_state != nullptr ? conjugate(read(p.grad_state + at, 1)) : zero(Z());
      // d/dh and d/dq of Σ_t g'_t q^(t+1), t from 0
      Z before = zero(Z()), before_slope = zero(Z());
      if (p.finals != nullptr) {
        const Z u = read(p.finals + from, p.channels), f = read(p.finals + from + 4 * p.channels, p.channels);
        before = multiply(k.q, u);
        before_slope = multiply_add(k.q, f, u);
      }
      dc = multiply_add(h, before, dc);
      dq = multiply_add(multiply(k.c, h), before_slope, multiply_add(multiply(g, slope), h, dq));
      if (p.input_finals != nullptr) {
        const C* const input = p.input_finals + from;
        db += real_part(multiply(g, read(input, p.channels)));
        dq = multiply_add(scaled(k.b, g), read(input + 4 * p.channels, p.channels), dq);
      }
      if (p.dstate != nullptr)
        write_state(p.dstate + at, 1, narrow<C>(conjugate(multiply_add(k.c, before, multiply(g, all_steps)))));
    }
  }
  double dp, dradius;
  if constexpr (kParts == 1) {
    dp = db * static_cast<double>(p.expansion[i]), dradius = dq;
    p.dexpansion[i] = static_cast<C>(db * k.p);
  } else {
    const Z turned = multiply(dq, k.turn);
    dp = db, dradius = turned.re;
    p.by_angle[i] = -static_cast<double>(n + 1) * turned.im * k.radius;
  }
  p.ddamping[i] = static_cast<C>((dp - dradius * k.a) * k.p * (1 - k.p));
  p.ddecay[i] = static_cast<C>(-dradius * k.p * k.a * (1 - k.a));
  const double scale = 1 / sqrt(static_cast<double>(p.states));
  write_state(p.dprojection + kParts * i, 1, narrow<C>(scaled(scale, conjugate(dc))));
}

template <typename C>
struct AngleParameters {
  int64_t rows, states;
  const double* by_angle;  // (rows, states)
  const C* theta;          // (rows)
  C* dtheta;
};

// Adds up the gradients of the angles. Each row has one thread.
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

template <typename Q>
FASTASR_KERNEL(kFlatThreads, 1)
scan_step(StepParameters<typename StateTraits<Q>::Real> p) {
  using C = typename StateTraits<Q>::Real;
  using Z = Wide<Q>;
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
      const int64_t i = (at * p.states + n) * StateTraits<Q>::kParts;
      Z h = p.state != nullptr ? widen(read_state(p.state + i, 1, Q())) : zero(Z());
      if (p.length > 0) {
        const auto k = EmaCoefficients<Z>::of(p, channel + direction * p.channels, n);
        h = multiply_add(k.q, h, from_real(k.b * x, Z()));
        sum = add_output(sum, k.c, h);
      }
      if (p.final_state != nullptr) write_state(p.final_state + i, 1, narrow<C>(h));
    }
  if (p.length > 0) {
    C y[1] = {static_cast<C>(sum)};
    activate<1>(p.activation, y);
    store_one(p.y.type, const_cast<void*>(p.y.data), batch * p.y.batch + channel * p.y.channel, y[0]);
  }
}

}  // namespace fastasr::cuda
