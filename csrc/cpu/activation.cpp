// SPDX-License-Identifier: Apache-2.0
#include "cpu/activation.h"

namespace fastasr::cpu {
namespace {

template <Activation A, typename C>
FASTASR_INLINE void values(C* __restrict x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] = activate<A>(x[i]);
}

template <Activation A, typename C>
FASTASR_INLINE void slopes(C* __restrict x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    C d;
    activate<A>(x[i], &d);  // the compiler drops what the value alone needs
    x[i] = d;
  }
}

template <Activation A, typename C>
FASTASR_INLINE void values_and_slopes(C* __restrict x, C* __restrict slope, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    C d;
    x[i] = activate<A>(x[i], &d);
    slope[i] = d;
  }
}

}  // namespace

#define FASTASR_SWITCH(f, ...)                           \
  switch (static_cast<Activation>(activation)) {         \
    case Activation::identity:                           \
      return f<Activation::identity>(__VA_ARGS__), true; \
    case Activation::silu:                               \
      return f<Activation::silu>(__VA_ARGS__), true;     \
    case Activation::relu:                               \
      return f<Activation::relu>(__VA_ARGS__), true;     \
    case Activation::tanh:                               \
      return f<Activation::tanh>(__VA_ARGS__), true;     \
    case Activation::gelu:                               \
      return f<Activation::gelu>(__VA_ARGS__), true;     \
  }                                                      \
  return false

#define FASTASR_DEFINE(C)                                                                                 \
  FASTASR_CLONES bool activate(int activation, C* x, int64_t n) { FASTASR_SWITCH(values, x, n); }         \
  FASTASR_CLONES bool activation_slope(int activation, C* x, int64_t n) { FASTASR_SWITCH(slopes, x, n); } \
  FASTASR_CLONES bool activate_with_slope(int activation, C* x, C* slope, int64_t n) {                    \
    FASTASR_SWITCH(values_and_slopes, x, slope, n);                                                       \
  }

FASTASR_DEFINE(float)
FASTASR_DEFINE(double)

}  // namespace fastasr::cpu
