// SPDX-License-Identifier: Apache-2.0
// `make op OP=depthwise_conv_residual` writes this file from fastasr/ops/depthwise_conv_residual.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::depthwise_conv_residual {

struct DepthwiseConvResidualForward {
  static constexpr const char* kName = "depthwise_conv_residual_forward";
  using Types = ArgumentTypes<Tensor, Tensor, Optional, Optional, int64_t>;

  const Tensor& x;
  const Tensor& weight;
  const Optional& bias;
  const Optional& padding_mask;
  int64_t delay;

  // The sizes, once the arguments are checked.
  int64_t B{};
  int64_t T{};
  int64_t C{};
  int64_t K{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    const ScalarType dtype = floating_dtype(x, op, "x");
    {
      const Sizes shape = x.sizes();
      bool right = false;
      if (shape.size() == 3) {
        B = shape[0];
        T = shape[1];
        C = shape[2];
        right = C >= 1;
      }
      fastasr::check(right, op, "x is not (B, T, C), C >= 1");
    }
    check_dense_channels(x, op, "x");
    check_dtype(weight, compute_type(dtype), op, "weight");
    {
      const Sizes shape = weight.sizes();
      bool right = false;
      if (shape.size() == 3) {
        K = shape[2];
        right = shape[0] == C && shape[1] == 1 && K >= 1;
      } else if (shape.size() == 2) {
        K = shape[1];
        right = shape[0] == C && K >= 1;
      }
      fastasr::check(right, op, "weight is not (C, 1, K) or (C, K), K >= 1");
    }
    check_contiguous(weight, op, "weight");
    if (bias) {
      check_dtype(*bias, compute_type(dtype), op, "bias");
      fastasr::check(has_sizes(*bias, {C}), op, "bias is not (C)");
      check_contiguous(*bias, op, "bias");
    }
    if (padding_mask) {
      check_dtype(*padding_mask, ScalarType::Bool, op, "padding_mask");
      fastasr::check(has_sizes(*padding_mask, {B, T}), op, "padding_mask is not (B, T)");
      check_contiguous(*padding_mask, op, "padding_mask");
    }
  }
};

struct DepthwiseConvResidualBackward {
  static constexpr const char* kName = "depthwise_conv_residual_backward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Optional, int64_t>;

  const Tensor& grad_y;
  const Tensor& x;
  const Tensor& weight;
  const Optional& padding_mask;
  int64_t delay;

  // The sizes, once the arguments are checked.
  int64_t B{};
  int64_t T{};
  int64_t C{};
  int64_t K{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    const ScalarType dtype = floating_dtype(x, op, "x");
    {
      const Sizes shape = x.sizes();
      bool right = false;
      if (shape.size() == 3) {
        B = shape[0];
        T = shape[1];
        C = shape[2];
        right = C >= 1;
      }
      fastasr::check(right, op, "x is not (B, T, C), C >= 1");
    }
    check_dense_channels(x, op, "x");
    check_dtype(weight, compute_type(dtype), op, "weight");
    {
      const Sizes shape = weight.sizes();
      bool right = false;
      if (shape.size() == 3) {
        K = shape[2];
        right = shape[0] == C && shape[1] == 1 && K >= 1;
      } else if (shape.size() == 2) {
        K = shape[1];
        right = shape[0] == C && K >= 1;
      }
      fastasr::check(right, op, "weight is not (C, 1, K) or (C, K), K >= 1");
    }
    check_contiguous(weight, op, "weight");
    if (padding_mask) {
      check_dtype(*padding_mask, ScalarType::Bool, op, "padding_mask");
      fastasr::check(has_sizes(*padding_mask, {B, T}), op, "padding_mask is not (B, T)");
      check_contiguous(*padding_mask, op, "padding_mask");
    }
    check_dtype(grad_y, dtype, op, "grad_y");
    fastasr::check(has_sizes(grad_y, {B, T, C}), op, "grad_y is not (B, T, C)");
    check_contiguous(grad_y, op, "grad_y");
  }
};

}  // namespace fastasr::bindings::depthwise_conv_residual
