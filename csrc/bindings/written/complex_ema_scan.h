// SPDX-License-Identifier: Apache-2.0
// `make op OP=complex_ema_scan` writes this file from fastasr/ops/ema_scan.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::complex_ema_scan {

// Finds the sizes B, D, L, R, which other arguments give. The binding defines it.
template <typename A>
void find_sizes(A& a);

struct ComplexEmaScanForward {
  static constexpr const char* kName = "complex_ema_scan_forward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Tensor, Tensor, Optional, Optional, Optional, int64_t, int64_t,
                              int64_t, int64_t, bool>;

  const Tensor& x;
  const Tensor& alpha;
  const Tensor& delta;
  const Tensor& theta;
  const Tensor& gamma;
  const Optional& omega;
  const Optional& state;
  const Optional& padding_mask;
  int64_t truncation;
  int64_t direction;
  int64_t activation;
  int64_t layout;
  bool return_state;

  // The sizes, once the arguments are checked.
  int64_t B{};
  int64_t D{};
  int64_t L{};
  int64_t R{};
  int64_t X{};
  int64_t Y{};
  int64_t Z{};
  int64_t N{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(truncation == 0 || truncation >= 1, op, "truncation: expected at least 1");
    fastasr::check(direction >= 0 && direction < 3, op, "direction");
    fastasr::check(activation >= 0 && activation < 5, op, "activation");
    fastasr::check(layout >= 0 && layout < 3, op, "layout");
    const ScalarType dtype = floating_dtype(x, op, "x");
    {
      const Sizes shape = x.sizes();
      bool right = false;
      if (shape.size() == 3) {
        X = shape[0];
        Y = shape[1];
        Z = shape[2];
        right = true;
      }
      fastasr::check(right, op, "x is not (X, Y, Z)");
    }
    find_sizes(*this);
    check_dtype(alpha, compute_type(dtype), op, "alpha");
    {
      const Sizes shape = alpha.sizes();
      bool right = false;
      if (shape.size() == 2) {
        N = shape[1];
        right = shape[0] == R && N >= 1 && N <= 64;
      } else if (shape.size() == 3) {
        N = shape[1];
        right = shape[0] == R && shape[2] == 1 && N >= 1 && N <= 64;
      }
      fastasr::check(right, op, "alpha is not (R, N) or (R, N, 1), N >= 1, N <= 64");
    }
    check_contiguous(alpha, op, "alpha");
    check_dtype(delta, compute_type(dtype), op, "delta");
    fastasr::check((has_sizes(delta, {R, N}) || has_sizes(delta, {R, N, 1})) && N >= 1 && N <= 64, op,
                   "delta is not (R, N) or (R, N, 1), N >= 1, N <= 64");
    check_contiguous(delta, op, "delta");
    check_dtype(theta, compute_type(dtype), op, "theta");
    fastasr::check(has_sizes(theta, {R}) || has_sizes(theta, {R, 1}) || has_sizes(theta, {R, 1, 1}), op,
                   "theta is not (R) or (R, 1) or (R, 1, 1)");
    check_contiguous(theta, op, "theta");
    check_dtype(gamma, compute_type(dtype), op, "gamma");
    fastasr::check(has_sizes(gamma, {R, N, 2}), op, "gamma is not (R, N, 2)");
    check_contiguous(gamma, op, "gamma");
    if (omega) {
      check_dtype(*omega, compute_type(dtype), op, "omega");
      fastasr::check(has_sizes(*omega, {D}) || has_sizes(*omega, {D, 1}), op, "omega is not (D) or (D, 1)");
      check_contiguous(*omega, op, "omega");
    }
    if (state) {
      check_dtype(*state, compute_type(dtype), op, "state");
      fastasr::check(has_sizes(*state, {B, D, N, 2}), op, "state is not (B, D, N, 2)");
      check_contiguous(*state, op, "state");
    }
    if (padding_mask) {
      check_dtype(*padding_mask, ScalarType::Bool, op, "padding_mask");
      fastasr::check(has_sizes(*padding_mask, {B, L}), op, "padding_mask is not (B, L)");
      check_contiguous(*padding_mask, op, "padding_mask");
    }
  }
};

struct ComplexEmaScanBackward {
  static constexpr const char* kName = "complex_ema_scan_backward";
  using Types = ArgumentTypes<Tensor, Optional, Tensor, Tensor, Tensor, Tensor, Tensor, Optional, Optional, Optional,
                              int64_t, int64_t, int64_t, int64_t>;

  const Tensor& grad_y;
  const Optional& grad_last;
  const Tensor& x;
  const Tensor& alpha;
  const Tensor& delta;
  const Tensor& theta;
  const Tensor& gamma;
  const Optional& omega;
  const Optional& state;
  const Optional& padding_mask;
  int64_t truncation;
  int64_t direction;
  int64_t activation;
  int64_t layout;

  // The sizes, once the arguments are checked.
  int64_t B{};
  int64_t D{};
  int64_t L{};
  int64_t R{};
  int64_t X{};
  int64_t Y{};
  int64_t Z{};
  int64_t N{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(truncation == 0 || truncation >= 1, op, "truncation: expected at least 1");
    fastasr::check(direction >= 0 && direction < 3, op, "direction");
    fastasr::check(activation >= 0 && activation < 5, op, "activation");
    fastasr::check(layout >= 0 && layout < 3, op, "layout");
    const ScalarType dtype = floating_dtype(x, op, "x");
    {
      const Sizes shape = x.sizes();
      bool right = false;
      if (shape.size() == 3) {
        X = shape[0];
        Y = shape[1];
        Z = shape[2];
        right = true;
      }
      fastasr::check(right, op, "x is not (X, Y, Z)");
    }
    find_sizes(*this);
    check_dtype(alpha, compute_type(dtype), op, "alpha");
    {
      const Sizes shape = alpha.sizes();
      bool right = false;
      if (shape.size() == 2) {
        N = shape[1];
        right = shape[0] == R && N >= 1 && N <= 64;
      } else if (shape.size() == 3) {
        N = shape[1];
        right = shape[0] == R && shape[2] == 1 && N >= 1 && N <= 64;
      }
      fastasr::check(right, op, "alpha is not (R, N) or (R, N, 1), N >= 1, N <= 64");
    }
    check_contiguous(alpha, op, "alpha");
    check_dtype(delta, compute_type(dtype), op, "delta");
    fastasr::check((has_sizes(delta, {R, N}) || has_sizes(delta, {R, N, 1})) && N >= 1 && N <= 64, op,
                   "delta is not (R, N) or (R, N, 1), N >= 1, N <= 64");
    check_contiguous(delta, op, "delta");
    check_dtype(theta, compute_type(dtype), op, "theta");
    fastasr::check(has_sizes(theta, {R}) || has_sizes(theta, {R, 1}) || has_sizes(theta, {R, 1, 1}), op,
                   "theta is not (R) or (R, 1) or (R, 1, 1)");
    check_contiguous(theta, op, "theta");
    check_dtype(gamma, compute_type(dtype), op, "gamma");
    fastasr::check(has_sizes(gamma, {R, N, 2}), op, "gamma is not (R, N, 2)");
    check_contiguous(gamma, op, "gamma");
    if (omega) {
      check_dtype(*omega, compute_type(dtype), op, "omega");
      fastasr::check(has_sizes(*omega, {D}) || has_sizes(*omega, {D, 1}), op, "omega is not (D) or (D, 1)");
      check_contiguous(*omega, op, "omega");
    }
    if (state) {
      check_dtype(*state, compute_type(dtype), op, "state");
      fastasr::check(has_sizes(*state, {B, D, N, 2}), op, "state is not (B, D, N, 2)");
      check_contiguous(*state, op, "state");
    }
    if (padding_mask) {
      check_dtype(*padding_mask, ScalarType::Bool, op, "padding_mask");
      fastasr::check(has_sizes(*padding_mask, {B, L}), op, "padding_mask is not (B, L)");
      check_contiguous(*padding_mask, op, "padding_mask");
    }
    check_dtype(grad_y, dtype, op, "grad_y");
    fastasr::check(has_sizes(grad_y, {X, Y, Z}), op, "grad_y is not (X, Y, Z)");
    if (grad_last) {
      check_dtype(*grad_last, compute_type(dtype), op, "grad_last");
      fastasr::check(has_sizes(*grad_last, {B, D, N, 2}), op, "grad_last is not (B, D, N, 2)");
      check_contiguous(*grad_last, op, "grad_last");
    }
  }
};

}  // namespace fastasr::bindings::complex_ema_scan
