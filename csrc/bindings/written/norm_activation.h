// SPDX-License-Identifier: Apache-2.0
// `make op OP=norm_activation` writes this file from fastasr/ops/norm_activation.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::norm_activation {

struct NormActivationForward {
  static constexpr const char* kName = "norm_activation_forward";
  using Types = ArgumentTypes<Tensor, Tensor, Optional, double, int64_t, int64_t, double, bool>;

  const Tensor& x;
  const Tensor& weight;
  const Optional& bias;
  double eps;
  int64_t kind;
  int64_t activation;
  double limit;
  bool keep;

  // The sizes, once the arguments are checked.
  Sizes S{};
  int64_t C{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(eps >= 0, op, "eps: expected at least 0");
    fastasr::check(kind >= 0 && kind < 2, op, "kind");
    fastasr::check(activation >= 0 && activation < 5, op, "activation");
    fastasr::check(limit >= 0, op, "limit: expected at least 0");
    const ScalarType dtype = floating_dtype(x, op, "x");
    {
      const Sizes shape = x.sizes();
      bool right = false;
      if (shape.size() >= 1) {
        S = shape.slice(0, shape.size() - 1);
        C = shape[shape.size() - 1];
        right = C >= 1;
      }
      fastasr::check(right, op, "x is not (*S, C), C >= 1");
    }
    check_dense_channels(x, op, "x");
    check_dtype(weight, compute_type(dtype), op, "weight");
    fastasr::check(has_sizes(weight, {C}), op, "weight is not (C)");
    check_contiguous(weight, op, "weight");
    if (bias) {
      check_dtype(*bias, compute_type(dtype), op, "bias");
      fastasr::check(has_sizes(*bias, {C}), op, "bias is not (C)");
      check_contiguous(*bias, op, "bias");
    }
  }
};

struct NormActivationBackward {
  static constexpr const char* kName = "norm_activation_backward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Optional, Tensor, double, int64_t, int64_t, double>;

  const Tensor& grad_y;
  const Tensor& x;
  const Tensor& weight;
  const Optional& bias;
  const Tensor& statistics;
  double eps;
  int64_t kind;
  int64_t activation;
  double limit;

  // The sizes, once the arguments are checked.
  Sizes S{};
  int64_t C{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(eps >= 0, op, "eps: expected at least 0");
    fastasr::check(kind >= 0 && kind < 2, op, "kind");
    fastasr::check(activation >= 0 && activation < 5, op, "activation");
    fastasr::check(limit >= 0, op, "limit: expected at least 0");
    const ScalarType dtype = floating_dtype(x, op, "x");
    {
      const Sizes shape = x.sizes();
      bool right = false;
      if (shape.size() >= 1) {
        S = shape.slice(0, shape.size() - 1);
        C = shape[shape.size() - 1];
        right = C >= 1;
      }
      fastasr::check(right, op, "x is not (*S, C), C >= 1");
    }
    check_dense_channels(x, op, "x");
    check_dtype(weight, compute_type(dtype), op, "weight");
    fastasr::check(has_sizes(weight, {C}), op, "weight is not (C)");
    check_contiguous(weight, op, "weight");
    if (bias) {
      check_dtype(*bias, compute_type(dtype), op, "bias");
      fastasr::check(has_sizes(*bias, {C}), op, "bias is not (C)");
      check_contiguous(*bias, op, "bias");
    }
    check_dtype(grad_y, dtype, op, "grad_y");
    fastasr::check(has_sizes(grad_y, S, {C}), op, "grad_y is not (*S, C)");
    check_contiguous(grad_y, op, "grad_y");
    check_dtype(statistics, compute_type(dtype), op, "statistics");
    fastasr::check(has_sizes(statistics, S, {3}), op, "statistics is not (*S, 3)");
    check_contiguous(statistics, op, "statistics");
  }
};

}  // namespace fastasr::bindings::norm_activation
