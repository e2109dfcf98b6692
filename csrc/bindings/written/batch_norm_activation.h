// SPDX-License-Identifier: Apache-2.0
// `make op OP=batch_norm_activation` writes this file from fastasr/ops/batch_norm_activation.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::batch_norm_activation {

struct BatchNormActivationForward {
  static constexpr const char* kName = "batch_norm_activation_forward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Optional, double, double, int64_t>;

  const Tensor& x;
  const Tensor& weight;
  const Tensor& bias;
  const Optional& padding_mask;
  double eps;
  double momentum;
  int64_t activation;

  // The sizes, once the arguments are checked.
  Sizes S{};
  int64_t C{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(eps >= 0, op, "eps: expected at least 0");
    fastasr::check(activation >= 0 && activation < 5, op, "activation");
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
    check_contiguous(x, op, "x");
    check_dtype(weight, compute_type(dtype), op, "weight");
    fastasr::check(has_sizes(weight, {C}), op, "weight is not (C)");
    check_contiguous(weight, op, "weight");
    check_dtype(bias, compute_type(dtype), op, "bias");
    fastasr::check(has_sizes(bias, {C}), op, "bias is not (C)");
    check_contiguous(bias, op, "bias");
    if (padding_mask) {
      check_dtype(*padding_mask, ScalarType::Bool, op, "padding_mask");
      fastasr::check(has_sizes(*padding_mask, S, {}), op, "padding_mask is not (*S)");
      check_contiguous(*padding_mask, op, "padding_mask");
    }
  }
};

struct BatchNormActivationBackward {
  static constexpr const char* kName = "batch_norm_activation_backward";
  using Types = ArgumentTypes<Optional, Tensor, Tensor, Tensor, Optional, Tensor, int64_t>;

  const Optional& grad_y;
  const Tensor& x;
  const Tensor& weight;
  const Tensor& bias;
  const Optional& padding_mask;
  const Tensor& statistics;
  int64_t activation;

  // The sizes, once the arguments are checked.
  Sizes S{};
  int64_t C{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(activation >= 0 && activation < 5, op, "activation");
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
    check_contiguous(x, op, "x");
    check_dtype(weight, compute_type(dtype), op, "weight");
    fastasr::check(has_sizes(weight, {C}), op, "weight is not (C)");
    check_contiguous(weight, op, "weight");
    check_dtype(bias, compute_type(dtype), op, "bias");
    fastasr::check(has_sizes(bias, {C}), op, "bias is not (C)");
    check_contiguous(bias, op, "bias");
    if (padding_mask) {
      check_dtype(*padding_mask, ScalarType::Bool, op, "padding_mask");
      fastasr::check(has_sizes(*padding_mask, S, {}), op, "padding_mask is not (*S)");
      check_contiguous(*padding_mask, op, "padding_mask");
    }
    if (grad_y) {
      check_dtype(*grad_y, dtype, op, "grad_y");
      fastasr::check(has_sizes(*grad_y, S, {C}), op, "grad_y is not (*S, C)");
      check_contiguous(*grad_y, op, "grad_y");
    }
    check_dtype(statistics, compute_type(dtype), op, "statistics");
    fastasr::check(has_sizes(statistics, {4, C}), op, "statistics is not (4, C)");
    check_contiguous(statistics, op, "statistics");
  }
};

}  // namespace fastasr::bindings::batch_norm_activation
