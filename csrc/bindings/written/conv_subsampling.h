// SPDX-License-Identifier: Apache-2.0
// `make op OP=conv_subsampling` writes this file from fastasr/ops/conv_subsampling.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::conv_subsampling {

struct ConvSubsamplingForward {
  static constexpr const char* kName = "conv_subsampling_forward";
  using Types = ArgumentTypes<Tensor, Tensor, Optional, Tensor, Optional, Optional, int64_t>;

  const Tensor& x;
  const Tensor& weight;
  const Optional& bias;
  const Tensor& depthwise_weight;
  const Optional& depthwise_bias;
  const Optional& mask;
  int64_t left;

  // The sizes, once the arguments are checked.
  int64_t B{};
  int64_t T{};
  int64_t F{};
  int64_t C{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(left == 1 || left == 2, op, "left: expected 1 or 2");
    const ScalarType dtype = floating_dtype(x, op, "x");
    {
      const Sizes shape = x.sizes();
      bool right = false;
      if (shape.size() == 3) {
        B = shape[0];
        T = shape[1];
        F = shape[2];
        right = T >= 7 && F >= 3;
      }
      fastasr::check(right, op, "x is not (B, T, F), T >= 7, F >= 3");
    }
    check_contiguous(x, op, "x");
    check_dtype(weight, dtype, op, "weight");
    {
      const Sizes shape = weight.sizes();
      bool right = false;
      if (shape.size() == 4) {
        C = shape[0];
        right = shape[1] == 1 && shape[2] == 3 && shape[3] == 3 && C >= 1;
      }
      fastasr::check(right, op, "weight is not (C, 1, 3, 3), C >= 1");
    }
    check_contiguous(weight, op, "weight");
    if (bias) {
      check_dtype(*bias, dtype, op, "bias");
      fastasr::check(has_sizes(*bias, {C}), op, "bias is not (C)");
      check_contiguous(*bias, op, "bias");
    }
    check_dtype(depthwise_weight, dtype, op, "depthwise_weight");
    fastasr::check(has_sizes(depthwise_weight, {C, 1, 3, 3}), op, "depthwise_weight is not (C, 1, 3, 3)");
    check_contiguous(depthwise_weight, op, "depthwise_weight");
    if (depthwise_bias) {
      check_dtype(*depthwise_bias, dtype, op, "depthwise_bias");
      fastasr::check(has_sizes(*depthwise_bias, {C}), op, "depthwise_bias is not (C)");
      check_contiguous(*depthwise_bias, op, "depthwise_bias");
    }
    if (mask) {
      check_dtype(*mask, ScalarType::Bool, op, "mask");
      fastasr::check(has_sizes(*mask, {B, (T - 1) / 2}), op, "mask is not (B, (T-1)//2)");
      check_contiguous(*mask, op, "mask");
    }
  }
};

struct ConvSubsamplingBackward {
  static constexpr const char* kName = "conv_subsampling_backward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Optional, Tensor, Optional, int64_t, bool>;

  const Tensor& grad_y;
  const Tensor& x;
  const Tensor& weight;
  const Optional& bias;
  const Tensor& depthwise_weight;
  const Optional& mask;
  int64_t left;
  bool needs_x;

  // The sizes, once the arguments are checked.
  int64_t B{};
  int64_t T{};
  int64_t F{};
  int64_t C{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(left == 1 || left == 2, op, "left: expected 1 or 2");
    const ScalarType dtype = floating_dtype(x, op, "x");
    {
      const Sizes shape = x.sizes();
      bool right = false;
      if (shape.size() == 3) {
        B = shape[0];
        T = shape[1];
        F = shape[2];
        right = T >= 7 && F >= 3;
      }
      fastasr::check(right, op, "x is not (B, T, F), T >= 7, F >= 3");
    }
    check_contiguous(x, op, "x");
    check_dtype(weight, dtype, op, "weight");
    {
      const Sizes shape = weight.sizes();
      bool right = false;
      if (shape.size() == 4) {
        C = shape[0];
        right = shape[1] == 1 && shape[2] == 3 && shape[3] == 3 && C >= 1;
      }
      fastasr::check(right, op, "weight is not (C, 1, 3, 3), C >= 1");
    }
    check_contiguous(weight, op, "weight");
    if (bias) {
      check_dtype(*bias, dtype, op, "bias");
      fastasr::check(has_sizes(*bias, {C}), op, "bias is not (C)");
      check_contiguous(*bias, op, "bias");
    }
    check_dtype(depthwise_weight, dtype, op, "depthwise_weight");
    fastasr::check(has_sizes(depthwise_weight, {C, 1, 3, 3}), op, "depthwise_weight is not (C, 1, 3, 3)");
    check_contiguous(depthwise_weight, op, "depthwise_weight");
    if (mask) {
      check_dtype(*mask, ScalarType::Bool, op, "mask");
      fastasr::check(has_sizes(*mask, {B, (T - 1) / 2}), op, "mask is not (B, (T-1)//2)");
      check_contiguous(*mask, op, "mask");
    }
    check_dtype(grad_y, dtype, op, "grad_y");
    fastasr::check(has_sizes(grad_y, {B, ((T - 1) / 2 - 1) / 2, ((F - 1) / 2 + left) / 2, C}), op,
                   "grad_y is not (B, ((T-1)//2-1)//2, ((F-1)//2+left)//2, C)");
    check_contiguous(grad_y, op, "grad_y");
  }
};

}  // namespace fastasr::bindings::conv_subsampling
