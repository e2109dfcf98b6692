// SPDX-License-Identifier: Apache-2.0
#include "cpu/math/activation.h"
#include "cpu/rows/clamp.h"

namespace fastasr::bindings::clamped_linear {
namespace {

template <typename T>
cpu::Bounds<T> bounds(double low, double high) {
  return {static_cast<cpu::compute_t<T>>(low), static_cast<cpu::compute_t<T>>(high)};
}

void check_clamped(const Tensor& z, int64_t activation, const char* op) {
  check_like(z, z, op, "z");
  check(activation >= 0 && activation < cpu::kActivations, op, "activation");
}

// Returns clamp(act(clamp(z, low, high)), next_low, next_high); in z's own memory where the caller asks for that.
Tensor clamped_linear_forward(Tensor z, double low, double high, int64_t activation, double next_low, double next_high,
                              bool in_place) {
  const char* op = "clamped_linear_forward";
  check_clamped(z, activation, op);
  Tensor y = in_place ? z : new_like(z);
  with_kernels<cpu::ClampKernels>(z, op, [&]<typename T>(const auto& kernel) {
    const auto inner = bounds<T>(low, high), outer = bounds<T>(next_low, next_high);
    const T* from = data<T>(z);
    T* to = mutable_data<T>(y);
    parallel_range(z.numel(), kGrain, [&](int64_t b, int64_t e) {
      kernel.forward(inner, static_cast<int>(activation), outer, from + b, to + b, e - b);
    });
  });
  return y;
}

// Returns the gradient of z; for `halves` see cpu/rows/clamp.h.
Tensor clamped_linear_backward(const Tensor& grad, const Tensor& z, double low, double high, int64_t activation,
                               double next_low, double next_high, bool halves) {
  const char* op = "clamped_linear_backward";
  check_clamped(z, activation, op);
  check_same_size(grad, z, op, "grad");
  Tensor dz = new_like(z);
  with_kernels<cpu::ClampKernels>(z, op, [&]<typename T>(const auto& kernel) {
    const auto inner = bounds<T>(low, high), outer = bounds<T>(next_low, next_high);
    const T *g = data<T>(grad), *from = data<T>(z);
    T* to = mutable_data<T>(dz);
    parallel_range(z.numel(), kGrain, [&](int64_t b, int64_t e) {
      kernel.backward(inner, static_cast<int>(activation), outer, halves, g + b, from + b, to + b, e - b);
    });
  });
  return dz;
}

}  // namespace

FASTASR_OPERATORS(FASTASR_TYPED(clamped_linear_forward), FASTASR_TYPED(clamped_linear_backward))

}  // namespace fastasr::bindings::clamped_linear
