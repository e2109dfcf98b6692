// SPDX-License-Identifier: Apache-2.0
// `make op OP=ema_scan` writes this file from fastasr/ops/ema_scan.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::ema_scan {

// Finds the sizes B, D, L, R, which other arguments give. The binding defines it.
template <typename A>
void find_sizes(A& a);

struct EmaScanForward {
  static constexpr const char* kName = "ema_scan_forward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Tensor, Tensor, Optional, Optional, Optional, int64_t, int64_t,
                              int64_t, int64_t, bool>;

  const Tensor& x;
  const Tensor& damping;
  const Tensor& decay;
  const Tensor& expansion;
  const Tensor& projection;
  const Optional& residual;
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
    check_dtype(damping, compute_type(dtype), op, "damping");
    {
      const Sizes shape = damping.sizes();
      bool right = false;
      if (shape.size() == 2) {
        N = shape[1];
        right = shape[0] == R && N >= 1 && N <= 64;
      } else if (shape.size() == 3) {
        N = shape[1];
        right = shape[0] == R && shape[2] == 1 && N >= 1 && N <= 64;
      }
      fastasr::check(right, op, "damping is not (R, N) or (R, N, 1), N >= 1, N <= 64");
    }
    check_contiguous(damping, op, "damping");
    check_dtype(decay, compute_type(dtype), op, "decay");
    fastasr::check((has_sizes(decay, {R, N}) || has_sizes(decay, {R, N, 1})) && N >= 1 && N <= 64, op,
                   "decay is not (R, N) or (R, N, 1), N >= 1, N <= 64");
    check_contiguous(decay, op, "decay");
    check_dtype(expansion, compute_type(dtype), op, "expansion");
    fastasr::check((has_sizes(expansion, {R, N}) || has_sizes(expansion, {R, N, 1})) && N >= 1 && N <= 64, op,
                   "expansion is not (R, N) or (R, N, 1), N >= 1, N <= 64");
    check_contiguous(expansion, op, "expansion");
    check_dtype(projection, compute_type(dtype), op, "projection");
    fastasr::check((has_sizes(projection, {R, N}) || has_sizes(projection, {R, N, 1})) && N >= 1 && N <= 64, op,
                   "projection is not (R, N) or (R, N, 1), N >= 1, N <= 64");
    check_contiguous(projection, op, "projection");
    if (residual) {
      check_dtype(*residual, compute_type(dtype), op, "residual");
      fastasr::check(has_sizes(*residual, {D}), op, "residual is not (D)");
      check_contiguous(*residual, op, "residual");
    }
    if (state) {
      check_dtype(*state, compute_type(dtype), op, "state");
      fastasr::check(has_sizes(*state, {B, D, N}), op, "state is not (B, D, N)");
      check_contiguous(*state, op, "state");
    }
    if (padding_mask) {
      check_dtype(*padding_mask, ScalarType::Bool, op, "padding_mask");
      fastasr::check(has_sizes(*padding_mask, {B, L}), op, "padding_mask is not (B, L)");
      check_contiguous(*padding_mask, op, "padding_mask");
    }
  }
};

struct EmaScanBackward {
  static constexpr const char* kName = "ema_scan_backward";
  using Types = ArgumentTypes<Tensor, Optional, Tensor, Tensor, Tensor, Tensor, Tensor, Optional, Optional, Optional,
                              int64_t, int64_t, int64_t, int64_t>;

  const Tensor& grad_y;
  const Optional& grad_last;
  const Tensor& x;
  const Tensor& damping;
  const Tensor& decay;
  const Tensor& expansion;
  const Tensor& projection;
  const Optional& residual;
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
    check_dtype(damping, compute_type(dtype), op, "damping");
    {
      const Sizes shape = damping.sizes();
      bool right = false;
      if (shape.size() == 2) {
        N = shape[1];
        right = shape[0] == R && N >= 1 && N <= 64;
      } else if (shape.size() == 3) {
        N = shape[1];
        right = shape[0] == R && shape[2] == 1 && N >= 1 && N <= 64;
      }
      fastasr::check(right, op, "damping is not (R, N) or (R, N, 1), N >= 1, N <= 64");
    }
    check_contiguous(damping, op, "damping");
    check_dtype(decay, compute_type(dtype), op, "decay");
    fastasr::check((has_sizes(decay, {R, N}) || has_sizes(decay, {R, N, 1})) && N >= 1 && N <= 64, op,
                   "decay is not (R, N) or (R, N, 1), N >= 1, N <= 64");
    check_contiguous(decay, op, "decay");
    check_dtype(expansion, compute_type(dtype), op, "expansion");
    fastasr::check((has_sizes(expansion, {R, N}) || has_sizes(expansion, {R, N, 1})) && N >= 1 && N <= 64, op,
                   "expansion is not (R, N) or (R, N, 1), N >= 1, N <= 64");
    check_contiguous(expansion, op, "expansion");
    check_dtype(projection, compute_type(dtype), op, "projection");
    fastasr::check((has_sizes(projection, {R, N}) || has_sizes(projection, {R, N, 1})) && N >= 1 && N <= 64, op,
                   "projection is not (R, N) or (R, N, 1), N >= 1, N <= 64");
    check_contiguous(projection, op, "projection");
    if (residual) {
      check_dtype(*residual, compute_type(dtype), op, "residual");
      fastasr::check(has_sizes(*residual, {D}), op, "residual is not (D)");
      check_contiguous(*residual, op, "residual");
    }
    if (state) {
      check_dtype(*state, compute_type(dtype), op, "state");
      fastasr::check(has_sizes(*state, {B, D, N}), op, "state is not (B, D, N)");
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
      fastasr::check(has_sizes(*grad_last, {B, D, N}), op, "grad_last is not (B, D, N)");
      check_contiguous(*grad_last, op, "grad_last");
    }
  }
};

}  // namespace fastasr::bindings::ema_scan
