// SPDX-License-Identifier: Apache-2.0
// Included by ema_scan_block_body.h once per instruction set: the block of complex_ema_scan, two states at a time.
//
// A state is two vectors, its real and its imaginary part. Two states are 14 multiply-adds per step, a little more than
// the latency of the three that a state waits for.

// q h of state n, from q as ema_scan_block.h defines it for complex numbers
#define FASTASR_TURNED_RE(n, r, i) \
  (kDifference<C> ? (r) - d[n] * (r) + e[n] * (i) : d_low[n] * (r) - e_low[n] * (i) + d[n] * (r) - e[n] * (i))
#define FASTASR_TURNED_IM(n, r, i) \
  (kDifference<C> ? (i) - d[n] * (i) - e[n] * (r) : d_low[n] * (i) + e_low[n] * (r) + d[n] * (i) + e[n] * (r))
#define FASTASR_LOAD_LOW(n, i)  \
  if constexpr (kDifference<C>) \
    d_low[n] = e_low[n] = V{};  \
  else                          \
    d_low[n] = FASTASR_AT(a.low + (i)), e_low[n] = FASTASR_AT(a.low + (i) + kPart)

// kTurned: what enters is complex; else the imaginary part of `in` is 0.
template <typename C, int kStates, bool kLate, bool kOther, bool kStart, bool kTurned>
FASTASR_TARGET void complex_convolution_group(const EmaConvolution<C>& a, int64_t first) {
  using V = typename Lanes<C>::vector;
  constexpr int64_t kPart = kEmaLanes, kState = 2 * kEmaLanes;
  const int64_t at = first * kState, end = a.steps * kEmaLanes;
  for (int64_t j = 0; j < a.lanes; j += Lanes<C>::count) {
    V gr[kStates], gi[kStates], hr[kStates], hi[kStates], d[kStates], e[kStates], in[kStates], in_i[kStates];
    V cr[kStates], ci[kStates], late[kStates], late_i[kStates], sum[kStates], d_low[kStates], e_low[kStates];
#pragma GCC unroll 2
    for (int n = 0; n < kStates; n++) {
      const int64_t i = at + n * kState + j;
      gr[n] = FASTASR_AT(a.g + i), gi[n] = FASTASR_AT(a.g + i + kPart), d[n] = FASTASR_AT(a.decay + i);
      e[n] = FASTASR_AT(a.decay + i + kPart), in[n] = FASTASR_AT(a.in + i), cr[n] = FASTASR_AT(a.out + i);
      ci[n] = FASTASR_AT(a.out + i + kPart), hr[n] = V{}, hi[n] = V{}, sum[n] = V{};
      FASTASR_LOAD_LOW(n, i);
      if constexpr (kTurned) in_i[n] = FASTASR_AT(a.in + i + kPart);
      if constexpr (kLate) late[n] = FASTASR_AT(a.late_gain + i), late_i[n] = FASTASR_AT(a.late_gain + i + kPart);
    }
    for (int64_t t = j; t < end; t += kEmaLanes) {
      const V x = FASTASR_AT(a.x + t);
      V y = V{}, x_late = V{}, other = V{};  // the group's sum first, then to that of the groups before: less rounding
      if constexpr (kLate) x_late = FASTASR_AT(a.x_late + t);
      if constexpr (kOther) other = FASTASR_AT(a.other + t);
#pragma GCC unroll 2
      for (int n = 0; n < kStates; n++) {
        hr[n] = gr[n] + in[n] * x, hi[n] = gi[n];
        if constexpr (kTurned) hi[n] += in_i[n] * x;
        if constexpr (kLate) hr[n] -= late[n] * x_late, hi[n] -= late_i[n] * x_late;
        y += cr[n] * hr[n];
        y -= ci[n] * hi[n];
        if constexpr (kOther) sum[n] += hr[n] * other;
        gr[n] = FASTASR_TURNED_RE(n, hr[n], hi[n]);
        gi[n] = FASTASR_TURNED_IM(n, hr[n], hi[n]);
      }
      if constexpr (!kStart) y += FASTASR_AT(a.y + t);
      FASTASR_TO(a.y + t) = y;
    }
#pragma GCC unroll 2
    for (int n = 0; n < kStates; n++) {
      const int64_t i = at + n * kState + j;
      FASTASR_TO(a.g + i) = gr[n], FASTASR_TO(a.g + i + kPart) = gi[n];
      if (a.last) FASTASR_TO(a.last + i) = hr[n], FASTASR_TO(a.last + i + kPart) = hi[n];
      if constexpr (kOther) FASTASR_TO(a.sum + i) = sum[n];
    }
  }
}

template <typename C, int kStates, bool kLate>
FASTASR_TARGET void complex_gradient_group(const EmaGradient<C>& a, int64_t first) {
  using V = typename Lanes<C>::vector;
  constexpr int64_t kPart = kEmaLanes, kState = 2 * kEmaLanes;
  const int64_t at = first * kState, end = a.steps * kEmaLanes;
  for (int64_t j = 0; j < a.lanes; j += Lanes<C>::count) {
    V gr[kStates], gi[kStates], vr[kStates], vi[kStates], d[kStates], e[kStates], in[kStates];
    V d_low[kStates], e_low[kStates], late[kStates], late_i[kStates], slope[kStates], slope_i[kStates];
    V c[kStates], c_i[kStates], q[kStates], q_i[kStates], last[kStates], last_i[kStates];
#pragma GCC unroll 2
    for (int n = 0; n < kStates; n++) {
      const int64_t i = at + n * kState + j;
      gr[n] = FASTASR_AT(a.g + i), gi[n] = FASTASR_AT(a.g + i + kPart);
      vr[n] = FASTASR_AT(a.v + i), vi[n] = FASTASR_AT(a.v + i + kPart);
      d[n] = FASTASR_AT(a.decay + i), e[n] = FASTASR_AT(a.decay + i + kPart), in[n] = FASTASR_AT(a.in + i);
      FASTASR_LOAD_LOW(n, i);
      c[n] = V{}, c_i[n] = V{}, q[n] = V{}, q_i[n] = V{}, last[n] = V{}, last_i[n] = V{};
      if constexpr (kLate) {
        late[n] = FASTASR_AT(a.late_gain + i), late_i[n] = FASTASR_AT(a.late_gain + i + kPart);
        slope[n] = FASTASR_AT(a.late_slope + i), slope_i[n] = FASTASR_AT(a.late_slope + i + kPart);
      }
    }
    for (int64_t t = j; t < end; t += kEmaLanes) {
      const V x = FASTASR_AT(a.x + t), dy = FASTASR_AT(a.dy + t);
      V x_late = V{};
      if constexpr (kLate) x_late = FASTASR_AT(a.x_late + t);
#pragma GCC unroll 2
      for (int n = 0; n < kStates; n++) {
        V r = gr[n] + in[n] * x, i = gi[n];
        if constexpr (kLate) {
          r -= late[n] * x_late, i -= late_i[n] * x_late;
          vr[n] -= slope[n] * x_late, vi[n] -= slope_i[n] * x_late;
        }
        c[n] += dy * r, c_i[n] += dy * i;
        q[n] += dy * vr[n], q_i[n] += dy * vi[n];
        last[n] = vr[n], last_i[n] = vi[n];
        vr[n] = FASTASR_TURNED_RE(n, last[n], last_i[n]) + r;
        vi[n] = FASTASR_TURNED_IM(n, last[n], last_i[n]) + i;
        gr[n] = FASTASR_TURNED_RE(n, r, i);
        gi[n] = FASTASR_TURNED_IM(n, r, i);
      }
    }
#pragma GCC unroll 2
    for (int n = 0; n < kStates; n++) {
      const int64_t i = at + n * kState + j, k = i + kPart;
      FASTASR_TO(a.g + i) = gr[n], FASTASR_TO(a.g + k) = gi[n];
      FASTASR_TO(a.v + i) = vr[n], FASTASR_TO(a.v + k) = vi[n];
      FASTASR_TO(a.last_v + i) = last[n], FASTASR_TO(a.last_v + k) = last_i[n];
      FASTASR_TO(a.dc + i) = c[n], FASTASR_TO(a.dc + k) = c_i[n];
      FASTASR_TO(a.dq + i) = q[n], FASTASR_TO(a.dq + k) = q_i[n];
    }
  }
}

// What enters is complex in the adjoint of a scan with a state, which is never truncated and the only one with a second
// factor.
template <typename C, int kStates, bool kStart>
FASTASR_TARGET void complex_convolution_of(const EmaConvolution<C>& a, int64_t first) {
  if (a.x_late)
    complex_convolution_group<C, kStates, true, false, kStart, false>(a, first);
  else if (a.other)
    complex_convolution_group<C, kStates, false, true, kStart, true>(a, first);
  else
    complex_convolution_group<C, kStates, false, false, kStart, true>(a, first);
}
template <typename C, int kStates>
FASTASR_TARGET void complex_convolution_from(const EmaConvolution<C>& a, int64_t first, bool start) {
  if (a.real && !a.x_late && !a.other)
    start ? complex_convolution_group<C, kStates, false, false, true, false>(a, first)
          : complex_convolution_group<C, kStates, false, false, false, false>(a, first);
  else
    start ? complex_convolution_of<C, kStates, true>(a, first) : complex_convolution_of<C, kStates, false>(a, first);
}

template <typename C>
FASTASR_TARGET void complex_convolution(const EmaConvolution<C>& a) {
  int64_t n = 0;
  for (; n + 2 <= a.states; n += 2) complex_convolution_from<C, 2>(a, n, a.start && n == 0);
  if (n < a.states) complex_convolution_from<C, 1>(a, n, a.start && n == 0);
}

template <typename C>
FASTASR_TARGET void complex_gradient(const EmaGradient<C>& a) {
  int64_t n = 0;
  for (; n + 2 <= a.states; n += 2)
    a.x_late ? complex_gradient_group<C, 2, true>(a, n) : complex_gradient_group<C, 2, false>(a, n);
  if (n < a.states) a.x_late ? complex_gradient_group<C, 1, true>(a, n) : complex_gradient_group<C, 1, false>(a, n);
}

template <typename C>
constexpr EmaBlock<C> kComplexBlock = {&complex_convolution<C>, &complex_gradient<C>};

#undef FASTASR_TURNED_RE
#undef FASTASR_TURNED_IM
#undef FASTASR_LOAD_LOW
