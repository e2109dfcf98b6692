// SPDX-License-Identifier: Apache-2.0
// Included by ema_scan_block.cpp once per instruction set, with FASTASR_TARGET (an attribute), FASTASR_VECTOR (bytes)
// and FASTASR_GROUP (states at a time) set, inside a namespace of its own: hence no include guard.
//
// States, coefficients and sums of a group stay in registers over all steps of a block. The compiler does not vectorise
// the outer loop over lanes when the inner one stores, hence vector types; they must stand in functions that carry the
// target themselves, or they are lowered before inlining.

template <typename C>
struct Lanes {
  static constexpr int64_t count = FASTASR_VECTOR / static_cast<int64_t>(sizeof(C));
  typedef C vector __attribute__((vector_size(FASTASR_VECTOR)));
  typedef C memory __attribute__((vector_size(FASTASR_VECTOR), aligned(sizeof(C)), may_alias));
};

// float: d holds 1 - q, double: q
template <typename C>
constexpr bool kDifference = sizeof(C) == 4;

#define FASTASR_AT(p) (*reinterpret_cast<const typename Lanes<C>::memory*>(p))
#define FASTASR_TO(p) (*reinterpret_cast<typename Lanes<C>::memory*>(p))

template <typename C, int kStates, bool kLate, bool kOther, bool kStart>
FASTASR_TARGET void convolution_group(const EmaConvolution<C>& a, int64_t first) {
  using V = typename Lanes<C>::vector;
  const int64_t at = first * kEmaLanes, end = a.steps * kEmaLanes;
  for (int64_t j = 0; j < a.lanes; j += Lanes<C>::count) {
    V g[kStates], h[kStates], d[kStates], in[kStates], out[kStates], late[kStates], sum[kStates];
#pragma GCC unroll 4
    for (int n = 0; n < kStates; n++) {
      const int64_t i = at + n * kEmaLanes + j;
      g[n] = FASTASR_AT(a.g + i), d[n] = FASTASR_AT(a.decay + i), in[n] = FASTASR_AT(a.in + i);
      out[n] = FASTASR_AT(a.out + i), h[n] = V{}, sum[n] = V{};
      if constexpr (kLate) late[n] = FASTASR_AT(a.late_gain + i);
    }
    for (int64_t t = j; t < end; t += kEmaLanes) {
      const V x = FASTASR_AT(a.x + t);
      V y = V{}, x_late = V{}, other = V{};
      if constexpr (!kStart) y = FASTASR_AT(a.y + t);
      if constexpr (kLate) x_late = FASTASR_AT(a.x_late + t);
      if constexpr (kOther) other = FASTASR_AT(a.other + t);
#pragma GCC unroll 4
      for (int n = 0; n < kStates; n++) {
        h[n] = g[n] + in[n] * x;
        if constexpr (kLate) h[n] -= late[n] * x_late;
        y += out[n] * h[n];
        if constexpr (kOther) sum[n] += h[n] * other;
        g[n] = kDifference<C> ? h[n] - d[n] * h[n] : d[n] * h[n];
      }
      FASTASR_TO(a.y + t) = y;
    }
#pragma GCC unroll 4
    for (int n = 0; n < kStates; n++) {
      const int64_t i = at + n * kEmaLanes + j;
      FASTASR_TO(a.g + i) = g[n];
      if (a.last) FASTASR_TO(a.last + i) = h[n];
      if constexpr (kOther) FASTASR_TO(a.sum + i) = sum[n];
    }
  }
}

template <typename C, int kStates, bool kLate>
FASTASR_TARGET void gradient_group(const EmaGradient<C>& a, int64_t first) {
  using V = typename Lanes<C>::vector;
  const int64_t at = first * kEmaLanes, end = a.steps * kEmaLanes;
  for (int64_t j = 0; j < a.lanes; j += Lanes<C>::count) {
    V g[kStates], v[kStates], d[kStates], in[kStates], late[kStates], slope[kStates], dc[kStates], dq[kStates];
    V last[kStates];
#pragma GCC unroll 4
    for (int n = 0; n < kStates; n++) {
      const int64_t i = at + n * kEmaLanes + j;
      g[n] = FASTASR_AT(a.g + i), v[n] = FASTASR_AT(a.v + i), d[n] = FASTASR_AT(a.decay + i),
      in[n] = FASTASR_AT(a.in + i);
      dc[n] = V{}, dq[n] = V{}, last[n] = V{};
      if constexpr (kLate) late[n] = FASTASR_AT(a.late_gain + i), slope[n] = FASTASR_AT(a.late_slope + i);
    }
    for (int64_t t = j; t < end; t += kEmaLanes) {
      const V x = FASTASR_AT(a.x + t), dy = FASTASR_AT(a.dy + t);
      V x_late = V{};
      if constexpr (kLate) x_late = FASTASR_AT(a.x_late + t);
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
      const int64_t i = at + n * kEmaLanes + j;
      FASTASR_TO(a.g + i) = g[n], FASTASR_TO(a.v + i) = v[n], FASTASR_TO(a.last_v + i) = last[n];
      FASTASR_TO(a.dc + i) = dc[n], FASTASR_TO(a.dq + i) = dq[n];
    }
  }
}

template <typename C, int kStates>
FASTASR_TARGET void convolution_of(const EmaConvolution<C>& a, int64_t first, bool start) {
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
FASTASR_TARGET void gradient_of(const EmaGradient<C>& a, int64_t first) {
  a.x_late ? gradient_group<C, kStates, true>(a, first) : gradient_group<C, kStates, false>(a, first);
}

template <typename C>
FASTASR_TARGET void convolution(const EmaConvolution<C>& a) {
  int64_t n = 0;
  for (; n + FASTASR_GROUP <= a.states; n += FASTASR_GROUP) convolution_of<C, FASTASR_GROUP>(a, n, a.start && n == 0);
  const bool start = a.start && n == 0;
  switch (a.states - n) {
    case 3:
      return convolution_of < C, FASTASR_GROUP<3 ? 1 : 3>(a, n, start);
    case 2:
      return convolution_of < C, FASTASR_GROUP<2 ? 1 : 2>(a, n, start);
    case 1:
      return convolution_of<C, 1>(a, n, start);
    default:
      return;
  }
}

template <typename C>
FASTASR_TARGET void gradient(const EmaGradient<C>& a) {
  int64_t n = 0;
  for (; n + FASTASR_GROUP <= a.states; n += FASTASR_GROUP) gradient_of<C, FASTASR_GROUP>(a, n);
  switch (a.states - n) {
    case 3:
      return gradient_of < C, FASTASR_GROUP<3 ? 1 : 3>(a, n);
    case 2:
      return gradient_of < C, FASTASR_GROUP<2 ? 1 : 2>(a, n);
    case 1:
      return gradient_of<C, 1>(a, n);
    default:
      return;
  }
}

template <typename C>
constexpr EmaBlock<C> kBlock = {&convolution<C>, &gradient<C>};

#include "cpu/complex_ema_scan_block_body.h"

template <typename C>
constexpr Blocks<C> kBlocks = {kBlock<C>, kComplexBlock<C>};

#undef FASTASR_AT
#undef FASTASR_TO
#undef FASTASR_TARGET
#undef FASTASR_VECTOR
#undef FASTASR_GROUP
