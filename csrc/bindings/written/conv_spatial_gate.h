// SPDX-License-Identifier: Apache-2.0
// `make op OP=conv_spatial_gate` writes this file from fastasr/ops/conv_spatial_gate.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::conv_spatial_gate {

struct ConvSpatialGateForward {
  static constexpr const char* kName = "conv_spatial_gate_forward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Tensor, Optional, Optional, double, int64_t>;

  const Tensor& x;
  const Tensor& norm_weight;
  const Tensor& norm_bias;
  const Tensor& weight;
  const Optional& bias;
  const Optional& padding_mask;
  double eps;
  int64_t activation;

  // The sizes, once the arguments are checked.
  int64_t B{};
  int64_t T{};
  int64_t C{};
  int64_t K{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(eps >= 0, op, "eps: expected at least 0");
    fastasr::check(activation >= 0 && activation < 5, op, "activation");
    const ScalarType dtype = floating_dtype(x, op, "x");
    {
      const Sizes shape = x.sizes();
      bool right = false;
      if (shape.size() == 3) {
        B = shape[0];
        T = shape[1];
        C = shape[2] / 2;
        right = shape[2] % 2 == 0 && C >= 1;
      }
      fastasr::check(right, op, "x is not (B, T, 2*C), C >= 1");
    }
    check_dense_channels(x, op, "x");
    check_dtype(norm_weight, compute_type(dtype), op, "norm_weight");
    fastasr::check(has_sizes(norm_weight, {C}), op, "norm_weight is not (C)");
    check_contiguous(norm_weight, op, "norm_weight");
    check_dtype(norm_bias, compute_type(dtype), op, "norm_bias");
    fastasr::check(has_sizes(norm_bias, {C}), op, "norm_bias is not (C)");
    check_contiguous(norm_bias, op, "norm_bias");
    check_dtype(weight, compute_type(dtype), op, "weight");
    {
      const Sizes shape = weight.sizes();
      bool right = false;
      if (shape.size() == 3) {
        K = shape[2];
        right = shape[0] == C && shape[1] == 1 && K % 2 == 1;
      } else if (shape.size() == 2) {
        K = shape[1];
        right = shape[0] == C && K % 2 == 1;
      }
      fastasr::check(right, op, "weight is not (C, 1, K) or (C, K), K odd");
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

struct ConvSpatialGateBackward {
  static constexpr const char* kName = "conv_spatial_gate_backward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Tensor, Tensor, Optional, Optional, double, int64_t>;

  const Tensor& grad_y;
  const Tensor& x;
  const Tensor& norm_weight;
  const Tensor& norm_bias;
  const Tensor& weight;
  const Optional& bias;
  const Optional& padding_mask;
  double eps;
  int64_t activation;

  // The sizes, once the arguments are checked.
  int64_t B{};
  int64_t T{};
  int64_t C{};
  int64_t K{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(eps >= 0, op, "eps: expected at least 0");
    fastasr::check(activation >= 0 && activation < 5, op, "activation");
    const ScalarType dtype = floating_dtype(x, op, "x");
    {
      const Sizes shape = x.sizes();
      bool right = false;
      if (shape.size() == 3) {
        B = shape[0];
        T = shape[1];
        C = shape[2] / 2;
        right = shape[2] % 2 == 0 && C >= 1;
      }
      fastasr::check(right, op, "x is not (B, T, 2*C), C >= 1");
    }
    check_dense_channels(x, op, "x");
    check_dtype(norm_weight, compute_type(dtype), op, "norm_weight");
    fastasr::check(has_sizes(norm_weight, {C}), op, "norm_weight is not (C)");
    check_contiguous(norm_weight, op, "norm_weight");
    check_dtype(norm_bias, compute_type(dtype), op, "norm_bias");
    fastasr::check(has_sizes(norm_bias, {C}), op, "norm_bias is not (C)");
    check_contiguous(norm_bias, op, "norm_bias");
    check_dtype(weight, compute_type(dtype), op, "weight");
    {
      const Sizes shape = weight.sizes();
      bool right = false;
      if (shape.size() == 3) {
        K = shape[2];
        right = shape[0] == C && shape[1] == 1 && K % 2 == 1;
      } else if (shape.size() == 2) {
        K = shape[1];
        right = shape[0] == C && K % 2 == 1;
      }
      fastasr::check(right, op, "weight is not (C, 1, K) or (C, K), K odd");
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
    check_dtype(grad_y, dtype, op, "grad_y");
    fastasr::check(has_sizes(grad_y, {B, T, C}), op, "grad_y is not (B, T, C)");
    check_contiguous(grad_y, op, "grad_y");
  }
};

}  // namespace fastasr::bindings::conv_spatial_gate
