// SPDX-License-Identifier: Apache-2.0
#include "cpu/math/activation.h"

namespace fastasr::cpu {
namespace {

template <Activation A, typename C>
void values_of(C* __restrict x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] = activate<A>(x[i]);
}

template <Activation A, bool kSums, typename C>
FASTASR_INLINE void gradients_of(const C* grad, const C* x, C* dx, C* __restrict sums, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    C slope;
    activate<A>(x[i], &slope);  // the compiler drops what the value alone needs
    const C d = grad[i] * slope;
    dx[i] = d;
    if (kSums) sums[i] += d;
  }
}

template <Activation A, typename C>
void values_and_slopes_of(C* __restrict x, C* __restrict slope, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    C d;
    x[i] = activate<A>(x[i], &d);
    slope[i] = d;
  }
}

// Calls f<A>() for the activation of this number.
template <typename F>
FASTASR_INLINE bool with_activation(int activation, const F& f) {
  switch (static_cast<Activation>(activation)) {
    case Activation::identity:
      return f.template operator()<Activation::identity>(), true;
    case Activation::silu:
      return f.template operator()<Activation::silu>(), true;
    case Activation::relu:
      return f.template operator()<Activation::relu>(), true;
    case Activation::tanh:
      return f.template operator()<Activation::tanh>(), true;
    case Activation::gelu:
      return f.template operator()<Activation::gelu>(), true;
  }
  return false;
}

template <typename C>
bool values(int activation, C* x, int64_t n) {
  return with_activation(activation, [&]<Activation A>() { values_of<A>(x, n); });
}
template <typename C>
bool gradients(int activation, const C* grad, const C* x, C* dx, C* sums, int64_t n) {
  return with_activation(activation, [&]<Activation A>() {
    if (sums)
      gradients_of<A, true>(grad, x, dx, sums, n);
    else
      gradients_of<A, false>(grad, x, dx, sums, n);
  });
}
template <typename C>
bool values_and_slopes(int activation, C* x, C* slope, int64_t n) {
  return with_activation(activation, [&]<Activation A>() { values_and_slopes_of<A>(x, slope, n); });
}

}  // namespace

FASTASR_KERNELS_COMPUTE(ActivationKernels, .values = values<T>, .gradients = gradients<T>,
                        .values_and_slopes = values_and_slopes<T>)

}  // namespace fastasr::cpu
