// SPDX-License-Identifier: Apache-2.0
// `make op OP=bias_norm` writes this file from fastasr/ops/bias_norm.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::bias_norm {

struct BiasNormForward {
  static constexpr const char* kName = "bias_norm_forward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor>;

  const Tensor& x;
  const Tensor& bias;
  const Tensor& log_scale;

  // The sizes, once the arguments are checked.
  Sizes S{};
  int64_t D{};
  int64_t C{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    const ScalarType dtype = floating_dtype(x, op, "x");
    {
      const Sizes shape = x.sizes();
      bool right = false;
      if (shape.size() >= 1) {
        S = shape.slice(0, shape.size() - 1);
        D = shape[shape.size() - 1];
        right = true;
      }
      fastasr::check(right, op, "x is not (*S, D)");
    }
    check_contiguous(x, op, "x");
    check_dtype(bias, dtype, op, "bias");
    {
      const Sizes shape = bias.sizes();
      bool right = false;
      if (shape.size() == 1) {
        C = shape[0];
        right = true;
      }
      fastasr::check(right, op, "bias is not (C)");
    }
    check_contiguous(bias, op, "bias");
    fastasr::check(has_sizes(log_scale, {}) || has_sizes(log_scale, {1}), op, "log_scale is not () or (1)");
    check_contiguous(log_scale, op, "log_scale");
  }
};

struct BiasNormBackward {
  static constexpr const char* kName = "bias_norm_backward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Tensor>;

  const Tensor& grad_y;
  const Tensor& x;
  const Tensor& bias;
  const Tensor& log_scale;

  // The sizes, once the arguments are checked.
  Sizes S{};
  int64_t D{};
  int64_t C{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    const ScalarType dtype = floating_dtype(x, op, "x");
    {
      const Sizes shape = x.sizes();
      bool right = false;
      if (shape.size() >= 1) {
        S = shape.slice(0, shape.size() - 1);
        D = shape[shape.size() - 1];
        right = true;
      }
      fastasr::check(right, op, "x is not (*S, D)");
    }
    check_contiguous(x, op, "x");
    check_dtype(bias, dtype, op, "bias");
    {
      const Sizes shape = bias.sizes();
      bool right = false;
      if (shape.size() == 1) {
        C = shape[0];
        right = true;
      }
      fastasr::check(right, op, "bias is not (C)");
    }
    check_contiguous(bias, op, "bias");
    fastasr::check(has_sizes(log_scale, {}) || has_sizes(log_scale, {1}), op, "log_scale is not () or (1)");
    check_contiguous(log_scale, op, "log_scale");
    check_dtype(grad_y, dtype, op, "grad_y");
    fastasr::check(has_sizes(grad_y, S, {D}), op, "grad_y is not (*S, D)");
    check_contiguous(grad_y, op, "grad_y");
  }
};

}  // namespace fastasr::bindings::bias_norm
