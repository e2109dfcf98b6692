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

// Computes the real and the imaginary part of q (r + i sqrt(-1)), from q as EmaBlocks defines it; a real one has no low
// part.
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
FASTASR_INLINE Vector<C> scaled(Vector<C> d, Vector<C> h) {
  return kDifference<C> ? h - d * h : d * h;
}

// How a scan reads a state's numbers, and in which way. Of complex numbers, `real` says that the input coefficient has
// no imaginary part: it has one only in the adjoint of a scan with a state, which is never truncated, and which alone
// has a second factor.
struct Kind {
  bool complex, late, other, start, real;
};

// A state is one vector or, of complex numbers, two: names that end with _i are its imaginary part, a row behind.
template <typename C, int kStates, Kind kind>
void convolution_group(const EmaConvolution<C>& a, int64_t first) {
  using V = Vector<C>;
  constexpr bool kComplex = kind.complex, kLow = kComplex && !kDifference<C>;
  constexpr int64_t kPart = kEmaLanes, kState = kComplex ? 2 * kEmaLanes : kEmaLanes;
  const int64_t base = first * kState, end = a.steps * kEmaLanes;
  for (int64_t j = 0; j < a.lanes; j += Lanes<C>::count) {
    V g[kStates], g_i[kStates], h[kStates], h_i[kStates], d[kStates], d_i[kStates], in[kStates], in_i[kStates];
    V out[kStates], out_i[kStates], late[kStates], late_i[kStates], sum[kStates], low[kStates], low_i[kStates];
#pragma GCC unroll 4
    for (int n = 0; n < kStates; n++) {
      const int64_t i = base + n * kState + j, k = i + kPart;
      g[n] = at(a.g + i), d[n] = at(a.decay + i), in[n] = at(a.in + i), out[n] = at(a.out + i);
      h[n] = h_i[n] = sum[n] = low[n] = low_i[n] = V{};
      if constexpr (kComplex) g_i[n] = at(a.g + k), d_i[n] = at(a.decay + k), out_i[n] = at(a.out + k);
      if constexpr (kLow) low[n] = at(a.low + i), low_i[n] = at(a.low + k);
      if constexpr (kComplex && !kind.real) in_i[n] = at(a.in + k);
      if constexpr (kind.late) late[n] = at(a.late_gain + i);
      if constexpr (kComplex && kind.late) late_i[n] = at(a.late_gain + k);
    }
    for (int64_t t = j; t < end; t += kEmaLanes) {
      const V x = at(a.x + t);
      // the group's sum is added first, then that of earlier groups: less rounding
      V y = V{}, x_late = V{}, other = V{};
      if constexpr (kind.late) x_late = at(a.x_late + t);
      if constexpr (kind.other) other = at(a.other + t);
#pragma GCC unroll 4
      for (int n = 0; n < kStates; n++) {
        h[n] = g[n] + in[n] * x;
        if constexpr (kComplex) h_i[n] = g_i[n];
        if constexpr (kComplex && !kind.real) h_i[n] += in_i[n] * x;
        if constexpr (kind.late) h[n] -= late[n] * x_late;
        if constexpr (kComplex && kind.late) h_i[n] -= late_i[n] * x_late;
        y += out[n] * h[n];
        if constexpr (kComplex) y -= out_i[n] * h_i[n];
        if constexpr (kind.other) sum[n] += h[n] * other;
        if constexpr (kComplex) {
          g[n] = turned_re<C>(d[n], d_i[n], low[n], low_i[n], h[n], h_i[n]);
          g_i[n] = turned_im<C>(d[n], d_i[n], low[n], low_i[n], h[n], h_i[n]);
        } else {
          g[n] = scaled<C>(d[n], h[n]);
        }
      }
      if constexpr (!kind.start) y += at(a.y + t);
      put(a.y + t, y);
    }
#pragma GCC unroll 4
    for (int n = 0; n < kStates; n++) {
      const int64_t i = base + n * kState + j;
      put(a.g + i, g[n]);
      if constexpr (kComplex) put(a.g + i + kPart, g_i[n]);
      if (a.last) put(a.last + i, h[n]);
      if (kComplex && a.last) put(a.last + i + kPart, h_i[n]);
      if constexpr (kind.other) put(a.sum + i, sum[n]);
    }
  }
}

template <typename C, int kStates, bool kComplex, bool kLate>
void gradient_group(const EmaGradient<C>& a, int64_t first) {
  using V = Vector<C>;
  constexpr bool kLow = kComplex && !kDifference<C>;
  constexpr int64_t kPart = kEmaLanes, kState = kComplex ? 2 * kEmaLanes : kEmaLanes;
  const int64_t base = first * kState, end = a.steps * kEmaLanes;
  for (int64_t j = 0; j < a.lanes; j += Lanes<C>::count) {
    V g[kStates], g_i[kStates], v[kStates], v_i[kStates], d[kStates], d_i[kStates], in[kStates], low[kStates];
    V low_i[kStates], late[kStates], late_i[kStates], slope[kStates], slope_i[kStates];
    V c[kStates], c_i[kStates], q[kStates], q_i[kStates], last[kStates], last_i[kStates];
#pragma GCC unroll 4
    for (int n = 0; n < kStates; n++) {
      const int64_t i = base + n * kState + j, k = i + kPart;
      g[n] = at(a.g + i), v[n] = at(a.v + i), d[n] = at(a.decay + i), in[n] = at(a.in + i);
      c[n] = c_i[n] = q[n] = q_i[n] = last[n] = last_i[n] = low[n] = low_i[n] = V{};
      if constexpr (kComplex) g_i[n] = at(a.g + k), v_i[n] = at(a.v + k), d_i[n] = at(a.decay + k);
      if constexpr (kLow) low[n] = at(a.low + i), low_i[n] = at(a.low + k);
      if constexpr (kLate) late[n] = at(a.late_gain + i), slope[n] = at(a.late_slope + i);
      if constexpr (kLate && kComplex) late_i[n] = at(a.late_gain + k), slope_i[n] = at(a.late_slope + k);
    }
    for (int64_t t = j; t < end; t += kEmaLanes) {
      const V x = at(a.x + t), dy = at(a.dy + t);
      V x_late = V{};
      if constexpr (kLate) x_late = at(a.x_late + t);
#pragma GCC unroll 4
      for (int n = 0; n < kStates; n++) {
        V h = g[n] + in[n] * x, h_i = V{};
        if constexpr (kComplex) h_i = g_i[n];
        if constexpr (kLate) h -= late[n] * x_late, v[n] -= slope[n] * x_late;
        if constexpr (kLate && kComplex) h_i -= late_i[n] * x_late, v_i[n] -= slope_i[n] * x_late;
        c[n] += dy * h, q[n] += dy * v[n], last[n] = v[n];
        if constexpr (kComplex) {
          c_i[n] += dy * h_i, q_i[n] += dy * v_i[n], last_i[n] = v_i[n];
          v[n] = turned_re<C>(d[n], d_i[n], low[n], low_i[n], last[n], last_i[n]) + h;
          v_i[n] = turned_im<C>(d[n], d_i[n], low[n], low_i[n], last[n], last_i[n]) + h_i;
          g[n] = turned_re<C>(d[n], d_i[n], low[n], low_i[n], h, h_i);
          g_i[n] = turned_im<C>(d[n], d_i[n], low[n], low_i[n], h, h_i);
        } else {
          v[n] = scaled<C>(d[n], v[n]) + h;
          g[n] = scaled<C>(d[n], h);
        }
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < kStates; n++) {
      const int64_t i = base + n * kState + j, k = i + kPart;
      put(a.g + i, g[n]), put(a.v + i, v[n]), put(a.last_v + i, last[n]);
      put(a.dc + i, c[n]), put(a.dq + i, q[n]);
      if constexpr (kComplex) {
        put(a.g + k, g_i[n]), put(a.v + k, v_i[n]), put(a.last_v + k, last_i[n]);
        put(a.dc + k, c_i[n]), put(a.dq + k, q_i[n]);
      }
    }
  }
}

template <typename C, int kStates, bool kComplex, bool kStart>
void convolution_of(const EmaConvolution<C>& a, int64_t first) {
  if (a.x_late)
    convolution_group<C, kStates, Kind{kComplex, true, false, kStart, true}>(a, first);
  else if (a.other)
    convolution_group<C, kStates, Kind{kComplex, false, true, kStart, false}>(a, first);
  else if (!kComplex || a.real)
    convolution_group<C, kStates, Kind{kComplex, false, false, kStart, true}>(a, first);
  else
    convolution_group<C, kStates, Kind{kComplex, false, false, kStart, false}>(a, first);
}

// This many states fit the registers of the instruction set. Complex numbers take two vectors; two states have 14
// multiply-adds per step, a little more than the latency of the three that a state waits for.
template <bool kComplex>
constexpr int kGroup = kRegisters == 32 && !kComplex ? 4 : 2;

template <typename C, bool kComplex>
void convolution(const EmaConvolution<C>& a) {
  by_groups<kGroup<kComplex>>(a.states, [&]<int kStates>(int64_t first) {
    a.start&& first == 0 ? convolution_of<C, kStates, kComplex, true>(a, first)
                         : convolution_of<C, kStates, kComplex, false>(a, first);
  });
}

template <typename C, bool kComplex>
void gradient(const EmaGradient<C>& a) {
  by_groups<kGroup<kComplex>>(a.states, [&]<int kStates>(int64_t first) {
    a.x_late ? gradient_group<C, kStates, kComplex, true>(a, first)
             : gradient_group<C, kStates, kComplex, false>(a, first);
  });
}

}  // namespace

FASTASR_KERNELS_COMPUTE(EmaBlocks, .real = {convolution<T, false>, gradient<T, false>},
                        .complex = {convolution<T, true>, gradient<T, true>})

}  // namespace fastasr::cpu
