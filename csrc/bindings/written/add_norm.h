// SPDX-License-Identifier: Apache-2.0
// `make op OP=add_norm` writes this file from fastasr/ops/add_norm.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::add_norm {

struct AddNormForward {
  static constexpr const char* kName = "add_norm_forward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Optional, Optional, double, double, int64_t, double, double>;

  const Tensor& x;
  const Tensor& update;
  const Tensor& weight;
  const Optional& bias;
  const Optional& update_weight;
  double eps;
  double scale;
  int64_t kind;
  double update_limit;
  double limit;

  // The sizes, once the arguments are checked.
  Sizes S{};
  int64_t C{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(eps >= 0, op, "eps: expected at least 0");
    fastasr::check(kind >= 0 && kind < 2, op, "kind");
    fastasr::check(update_limit >= 0, op, "update_limit: expected at least 0");
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
    check_contiguous(x, op, "x");
    check_dtype(update, dtype, op, "update");
    fastasr::check(has_sizes(update, S, {C}), op, "update is not (*S, C)");
    check_contiguous(update, op, "update");
    check_dtype(weight, compute_type(dtype), op, "weight");
    fastasr::check(has_sizes(weight, {C}), op, "weight is not (C)");
    check_contiguous(weight, op, "weight");
    if (bias) {
      check_dtype(*bias, compute_type(dtype), op, "bias");
      fastasr::check(has_sizes(*bias, {C}), op, "bias is not (C)");
      check_contiguous(*bias, op, "bias");
    }
    if (update_weight) {
      check_dtype(*update_weight, compute_type(dtype), op, "update_weight");
      fastasr::check(has_sizes(*update_weight, {C}), op, "update_weight is not (C)");
      check_contiguous(*update_weight, op, "update_weight");
    }
  }
};

struct AddNormBackward {
  static constexpr const char* kName = "add_norm_backward";
  using Types = ArgumentTypes<Optional, Optional, Tensor, Tensor, Tensor, Optional, Optional, double, double, int64_t,
                              double, double>;

  const Optional& grad_t;
  const Optional& grad_y;
  const Tensor& x;
  const Tensor& update;
  const Tensor& weight;
  const Optional& bias;
  const Optional& update_weight;
  double eps;
  double scale;
  int64_t kind;
  double update_limit;
  double limit;

  // The sizes, once the arguments are checked.
  Sizes S{};
  int64_t C{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(eps >= 0, op, "eps: expected at least 0");
    fastasr::check(kind >= 0 && kind < 2, op, "kind");
    fastasr::check(update_limit >= 0, op, "update_limit: expected at least 0");
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
    check_contiguous(x, op, "x");
    check_dtype(update, dtype, op, "update");
    fastasr::check(has_sizes(update, S, {C}), op, "update is not (*S, C)");
    check_contiguous(update, op, "update");
    check_dtype(weight, compute_type(dtype), op, "weight");
    fastasr::check(has_sizes(weight, {C}), op, "weight is not (C)");
    check_contiguous(weight, op, "weight");
    if (bias) {
      check_dtype(*bias, compute_type(dtype), op, "bias");
      fastasr::check(has_sizes(*bias, {C}), op, "bias is not (C)");
      check_contiguous(*bias, op, "bias");
    }
    if (update_weight) {
      check_dtype(*update_weight, compute_type(dtype), op, "update_weight");
      fastasr::check(has_sizes(*update_weight, {C}), op, "update_weight is not (C)");
      check_contiguous(*update_weight, op, "update_weight");
    }
    if (grad_t) {
      check_dtype(*grad_t, dtype, op, "grad_t");
      fastasr::check(has_sizes(*grad_t, S, {C}), op, "grad_t is not (*S, C)");
      check_contiguous(*grad_t, op, "grad_t");
    }
    if (grad_y) {
      check_dtype(*grad_y, dtype, op, "grad_y");
      fastasr::check(has_sizes(*grad_y, S, {C}), op, "grad_y is not (*S, C)");
      check_contiguous(*grad_y, op, "grad_y");
    }
  }
};

}  // namespace fastasr::bindings::add_norm
