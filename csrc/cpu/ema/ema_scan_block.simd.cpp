// SPDX-License-Identifier: Apache-2.0
#include "cpu/ema/ema_scan.h"

#include "cpu/simd/vectors.simd.h"

// States, coefficients and sums of a group stay in registers over all steps of a block. The kernel uses vector types
// because the compiler does not vectorise the outer loop over lanes when the inner one stores.
namespace fastasr::cpu {
namespace {

// Calls f<kStates>(first) for groups of at most kMost states.
template <int kMost, typename F>
FASTASR_INLINE void by_groups(int64_t states, const F& f) {
  int64_t n = 0;
  for (; n + kMost <= states; n += kMost) f.template operator()<kMost>(n);
  if constexpr (kMost > 2) {
    if (states - n == 3) f.template operator()<3>(n);
    if (states - n == 2) f.template operator()<2>(n);
  }
  if (states - n == 1) f.template operator()<1>(n);
}

// Float holds the decay as 1 - q, double as q.
template <typename C>
constexpr bool kDifference = sizeof(C) == 4;

template <typename C, int kStates, bool kLate, bool kOther, bool kStart>
void convolution_group(const EmaConvolution<C>& a, int64_t first) {
  using V = Vector<C>;
  const int64_t base = first * kEmaLanes, end = a.steps * kEmaLanes;
  for (int64_t j = 0; j < a.lanes; j += Lanes<C>::count) {
    V g[kStates], h[kStates], d[kStates], in[kStates], out[kStates], late[kStates], sum[kStates];
#pragma GCC unroll 4
    for (int n = 0; n < kStates; n++) {
      const int64_t i = base + n * kEmaLanes + j;
      g[n] = at(a.g + i), d[n] = at(a.decay + i), in[n] = at(a.in + i);
      out[n] = at(a.out + i), h[n] = V{}, sum[n] = V{};
      if constexpr (kLate) late[n] = at(a.late_gain + i);
    }
    for (int64_t t = j; t < end; t += kEmaLanes) {
      const V x = at(a.x + t);
      // the group's sum is added first, then that of earlier groups: less rounding
      V y = V{}, x_late = V{}, other = V{};
      if constexpr (kLate) x_late = at(a.x_late + t);
      if constexpr (kOther) other = at(a.other + t);
#pragma GCC unroll 4
      for (int n = 0; n < kStates; n++) {
        h[n] = g[n] + in[n] * x;
        if constexpr (kLate) h[n] -= late[n] * x_late;
        y += out[n] * h[n];
        if constexpr (kOther) sum[n] += h[n] * other;
        g[n] = kDifference<C> ? h[n] - d[n] * h[n] : d[n] * h[n];
      }
      if constexpr (!kStart) y += at(a.y + t);
      put(a.y + t, y);
    }
#pragma GCC unroll 4
    for (int n = 0; n < kStates; n++) {
      const int64_t i = base + n * kEmaLanes + j;
      put(a.g + i, g[n]);
      if (a.last) put(a.last + i, h[n]);
      if constexpr (kOther) put(a.sum + i, sum[n]);
    }
  }
}

template <typename C, int kStates, bool kLate>
void gradient_group(const EmaGradient<C>& a, int64_t first) {
  using V = Vector<C>;
  const int64_t base = first * kEmaLanes, end = a.steps * kEmaLanes;
  for (int64_t j = 0; j < a.lanes; j += Lanes<C>::count) {
    V g[kStates], v[kStates], d[kStates], in[kStates], late[kStates], slope[kStates], dc[kStates], dq[kStates];
    V last[kStates];
#pragma GCC unroll 4
    for (int n = 0; n < kStates; n++) {
      const int64_t i = base + n * kEmaLanes + j;
      g[n] = at(a.g + i), v[n] = at(a.v + i), d[n] = at(a.decay + i), in[n] = at(a.in + i);
      dc[n] = V{}, dq[n] = V{}, last[n] = V{};
      if constexpr (kLate) late[n] = at(a.late_gain + i), slope[n] = at(a.late_slope + i);
    }
    for (int64_t t = j; t < end; t += kEmaLanes) {
      const V x = at(a.x + t), dy = at(a.dy + t);
      V x_late = V{};
      if constexpr (kLate) x_late = at(a.x_late + t);
#pragma GCC unroll 4
      for (int n = 0; n < kStates; n++) {
        V h = g[n] + in[n] * x;
        if constexpr (kLate) h -= late[n] * x_late, v[n] -= slope[n] * x_late;
        dc[n] += dy * h;
        dq[n] += dy * v[n];
        last[n] = v[n];
        v[n] = (kDifference<C> ? v[n] - d[n] * v[n] : d[n] * v[n]) + h;
        g[n] = kDifference<C> ? h - d[n] * h : d[n] * h;
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < kStates; n++) {
      const int64_t i = base + n * kEmaLanes + j;
      put(a.g + i, g[n]), put(a.v + i, v[n]), put(a.last_v + i, last[n]);
      put(a.dc + i, dc[n]), put(a.dq + i, dq[n]);
    }
  }
}

template <typename C, int kStates>
void convolution_of(const EmaConvolution<C>& a, int64_t first, bool start) {
  if (a.x_late) {
    start ? convolution_group<C, kStates, true, false, true>(a, first)
          : convolution_group<C, kStates, true, false, false>(a, first);
  } else if (a.other) {
    start ? convolution_group<C, kStates, false, true, true>(a, first)
          : convolution_group<C, kStates, false, true, false>(a, first);
  } else {
    start ? convolution_group<C, kStates, false, false, true>(a, first)
          : convolution_group<C, kStates, false, false, false>(a, first);
  }
}

template <typename C, int kStates>
void gradient_of(const EmaGradient<C>& a, int64_t first) {
  a.x_late ? gradient_group<C, kStates, true>(a, first) : gradient_group<C, kStates, false>(a, first);
}

// This many states fit the registers of the instruction set.
constexpr int kGroup = kRegisters == 32 ? 4 : 2;

template <typename C>
void convolution(const EmaConvolution<C>& a) {
  by_groups<kGroup>(a.states,
                    [&]<int kStates>(int64_t first) { convolution_of<C, kStates>(a, first, a.start && first == 0); });
}

template <typename C>
void gradient(const EmaGradient<C>& a) {
  by_groups<kGroup>(a.states, [&]<int kStates>(int64_t first) { gradient_of<C, kStates>(a, first); });
}

// --------------------------------------------------------------------------- complex numbers
// A state is two vectors, its real and its imaginary part. Groups have two states: 14 multiply-adds per step, a little
// more than the latency of the three that a state waits for.
constexpr int kComplexGroup = 2;

// Computes q (r + i sqrt(-1)), from q as EmaBlocks defines it for complex numbers.
template <typename C>
FASTASR_INLINE Vector<C> turned_re(Vector<C> d, Vector<C> e, Vector<C> d_low, Vector<C> e_low, Vector<C> r,
                                   Vector<C> i) {
  return kDifference<C> ? r - d * r + e * i : d_low * r - e_low * i + d * r - e * i;
}
template <typename C>
FASTASR_INLINE Vector<C> turned_im(Vector<C> d, Vector<C> e, Vector<C> d_low, Vector<C> e_low, Vector<C> r,
                                   Vector<C> i) {
  return kDifference<C> ? i - d * i - e * r : d_low * i + e_low * r + d * i + e * r;
}
template <typename C>
FASTASR_INLINE Vector<C> low(const C* p, int64_t i) {
  if constexpr (kDifference<C>) return Vector<C>{};
  return at(p + i);
}

// kTurned says that the input coefficient is complex. Else its imaginary part is 0.
template <typename C, int kStates, bool kLate, bool kOther, bool kStart, bool kTurned>
void complex_convolution_group(const EmaConvolution<C>& a, int64_t first) {
  using V = Vector<C>;
  constexpr int64_t kPart = kEmaLanes, kState = 2 * kEmaLanes;
  const int64_t base = first * kState, end = a.steps * kEmaLanes;
  for (int64_t j = 0; j < a.lanes; j += Lanes<C>::count) {
    V gr[kStates], gi[kStates], hr[kStates], hi[kStates], d[kStates], e[kStates], in[kStates], in_i[kStates];
    V cr[kStates], ci[kStates], late[kStates], late_i[kStates], sum[kStates], d_low[kStates], e_low[kStates];
#pragma GCC unroll 2
    for (int n = 0; n < kStates; n++) {
      const int64_t i = base + n * kState + j;
      gr[n] = at(a.g + i), gi[n] = at(a.g + i + kPart), d[n] = at(a.decay + i);
      e[n] = at(a.decay + i + kPart), in[n] = at(a.in + i), cr[n] = at(a.out + i);
      ci[n] = at(a.out + i + kPart), hr[n] = V{}, hi[n] = V{}, sum[n] = V{};
      d_low[n] = low<C>(a.low, i), e_low[n] = low<C>(a.low, i + kPart);
      if constexpr (kTurned) in_i[n] = at(a.in + i + kPart);
      if constexpr (kLate) late[n] = at(a.late_gain + i), late_i[n] = at(a.late_gain + i + kPart);
    }
    for (int64_t t = j; t < end; t += kEmaLanes) {
      const V x = at(a.x + t);
      // the group's sum is added first, then that of earlier groups: less rounding
      V y = V{}, x_late = V{}, other = V{};
      if constexpr (kLate) x_late = at(a.x_late + t);
      if constexpr (kOther) other = at(a.other + t);
#pragma GCC unroll 2
      for (int n = 0; n < kStates; n++) {
        hr[n] = gr[n] + in[n] * x, hi[n] = gi[n];
        if constexpr (kTurned) hi[n] += in_i[n] * x;
        if constexpr (kLate) hr[n] -= late[n] * x_late, hi[n] -= late_i[n] * x_late;
        y += cr[n] * hr[n];
        y -= ci[n] * hi[n];
        if constexpr (kOther) sum[n] += hr[n] * other;
        gr[n] = turned_re<C>(d[n], e[n], d_low[n], e_low[n], hr[n], hi[n]);
        gi[n] = turned_im<C>(d[n], e[n], d_low[n], e_low[n], hr[n], hi[n]);
      }
      if constexpr (!kStart) y += at(a.y + t);
      put(a.y + t, y);
    }
#pragma GCC unroll 2
    for (int n = 0; n < kStates; n++) {
      const int64_t i = base + n * kState + j;
      put(a.g + i, gr[n]), put(a.g + i + kPart, gi[n]);
      if (a.last) put(a.last + i, hr[n]), put(a.last + i + kPart, hi[n]);
      if constexpr (kOther) put(a.sum + i, sum[n]);
    }
  }
}

template <typename C, int kStates, bool kLate>
void complex_gradient_group(const EmaGradient<C>& a, int64_t first) {
  using V = Vector<C>;
  constexpr int64_t kPart = kEmaLanes, kState = 2 * kEmaLanes;
  const int64_t base = first * kState, end = a.steps * kEmaLanes;
  for (int64_t j = 0; j < a.lanes; j += Lanes<C>::count) {
    V gr[kStates], gi[kStates], vr[kStates], vi[kStates], d[kStates], e[kStates], in[kStates];
    V d_low[kStates], e_low[kStates], late[kStates], late_i[kStates], slope[kStates], slope_i[kStates];
    V c[kStates], c_i[kStates], q[kStates], q_i[kStates], last[kStates], last_i[kStates];
#pragma GCC unroll 2
    for (int n = 0; n < kStates; n++) {
      const int64_t i = base + n * kState + j;
      gr[n] = at(a.g + i), gi[n] = at(a.g + i + kPart);
      vr[n] = at(a.v + i), vi[n] = at(a.v + i + kPart);
      d[n] = at(a.decay + i), e[n] = at(a.decay + i + kPart), in[n] = at(a.in + i);
      d_low[n] = low<C>(a.low, i), e_low[n] = low<C>(a.low, i + kPart);
      c[n] = V{}, c_i[n] = V{}, q[n] = V{}, q_i[n] = V{}, last[n] = V{}, last_i[n] = V{};
      if constexpr (kLate) {
        late[n] = at(a.late_gain + i), late_i[n] = at(a.late_gain + i + kPart);
        slope[n] = at(a.late_slope + i), slope_i[n] = at(a.late_slope + i + kPart);
      }
    }
    for (int64_t t = j; t < end; t += kEmaLanes) {
      const V x = at(a.x + t), dy = at(a.dy + t);
      V x_late = V{};
      if constexpr (kLate) x_late = at(a.x_late + t);
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
        vr[n] = turned_re<C>(d[n], e[n], d_low[n], e_low[n], last[n], last_i[n]) + r;
        vi[n] = turned_im<C>(d[n], e[n], d_low[n], e_low[n], last[n], last_i[n]) + i;
        gr[n] = turned_re<C>(d[n], e[n], d_low[n], e_low[n], r, i);
        gi[n] = turned_im<C>(d[n], e[n], d_low[n], e_low[n], r, i);
      }
    }
#pragma GCC unroll 2
    for (int n = 0; n < kStates; n++) {
      const int64_t i = base + n * kState + j, k = i + kPart;
      put(a.g + i, gr[n]), put(a.g + k, gi[n]);
      put(a.v + i, vr[n]), put(a.v + k, vi[n]);
      put(a.last_v + i, last[n]), put(a.last_v + k, last_i[n]);
      put(a.dc + i, c[n]), put(a.dc + k, c_i[n]);
      put(a.dq + i, q[n]), put(a.dq + k, q_i[n]);
    }
  }
}

// The input coefficient is complex only in the adjoint of a scan with a state. That scan is never truncated, and it
// alone has a second factor.
template <typename C, int kStates, bool kStart>
void complex_convolution_of(const EmaConvolution<C>& a, int64_t first) {
  if (a.x_late)
    complex_convolution_group<C, kStates, true, false, kStart, false>(a, first);
  else if (a.other)
    complex_convolution_group<C, kStates, false, true, kStart, true>(a, first);
  else
    complex_convolution_group<C, kStates, false, false, kStart, true>(a, first);
}
template <typename C, int kStates>
void complex_convolution_from(const EmaConvolution<C>& a, int64_t first, bool start) {
  if (a.real && !a.x_late && !a.other)
    start ? complex_convolution_group<C, kStates, false, false, true, false>(a, first)
          : complex_convolution_group<C, kStates, false, false, false, false>(a, first);
  else
    start ? complex_convolution_of<C, kStates, true>(a, first) : complex_convolution_of<C, kStates, false>(a, first);
}

template <typename C>
void complex_convolution(const EmaConvolution<C>& a) {
  by_groups<kComplexGroup>(a.states, [&]<int kStates>(int64_t first) {
    complex_convolution_from<C, kStates>(a, first, a.start && first == 0);
  });
}

template <typename C>
void complex_gradient(const EmaGradient<C>& a) {
  by_groups<kComplexGroup>(a.states, [&]<int kStates>(int64_t first) {
    a.x_late ? complex_gradient_group<C, kStates, true>(a, first) : complex_gradient_group<C, kStates, false>(a, first);
  });
}

}  // namespace

FASTASR_KERNELS_COMPUTE(EmaBlocks, .real = {convolution<T>, gradient<T>},
                        .complex = {complex_convolution<T>, complex_gradient<T>})

}  // namespace fastasr::cpu
