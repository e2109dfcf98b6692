// SPDX-License-Identifier: Apache-2.0
// `make op OP=depthwise_conv2d` writes this file from fastasr/ops/depthwise_conv2d.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::depthwise_conv2d {

// Finds the sizes P, Q, which other arguments give. The binding defines it.
template <typename A>
void find_sizes(A& a);

struct DepthwiseConv2DForward {
  static constexpr const char* kName = "depthwise_conv2d_forward";
  using Types = ArgumentTypes<Tensor, Tensor, Optional, int64_t, int64_t>;

  const Tensor& x;
  const Tensor& weight;
  const Optional& bias;
  std::array<int64_t, 2> padding;

  // The sizes, once the arguments are checked.
  int64_t P{};
  int64_t Q{};
  int64_t B{};
  int64_t T{};
  int64_t F{};
  int64_t C{};
  int64_t K{};
  int64_t L{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    const ScalarType dtype = floating_dtype(x, op, "x");
    {
      const Sizes shape = x.sizes();
      bool right = false;
      if (shape.size() == 4) {
        B = shape[0];
        T = shape[1];
        F = shape[2];
        C = shape[3];
        right = true;
      }
      fastasr::check(right, op, "x is not (B, T, F, C)");
    }
    check_contiguous(x, op, "x");
    find_sizes(*this);
    check_dtype(weight, dtype, op, "weight");
    {
      const Sizes shape = weight.sizes();
      bool right = false;
      if (shape.size() == 4) {
        K = shape[2];
        L = shape[3];
        right = shape[0] == C && shape[1] == 1 && K >= 1 && L >= 1;
      } else if (shape.size() == 3) {
        K = shape[1];
        L = shape[2];
        right = shape[0] == C && K >= 1 && L >= 1;
      }
      fastasr::check(right, op, "weight is not (C, 1, K, L) or (C, K, L), K >= 1, L >= 1");
    }
    check_contiguous(weight, op, "weight");
    if (bias) {
      check_dtype(*bias, dtype, op, "bias");
      fastasr::check(has_sizes(*bias, {C}), op, "bias is not (C)");
      check_contiguous(*bias, op, "bias");
    }
  }
};

struct DepthwiseConv2DBackward {
  static constexpr const char* kName = "depthwise_conv2d_backward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, int64_t, int64_t, bool, bool, bool>;

  const Tensor& grad_y;
  const Tensor& x;
  const Tensor& weight;
  std::array<int64_t, 2> padding;
  bool needs_x;
  bool needs_weight;
  bool needs_bias;

  // The sizes, once the arguments are checked.
  int64_t P{};
  int64_t Q{};
  int64_t B{};
  int64_t T{};
  int64_t F{};
  int64_t C{};
  int64_t K{};
  int64_t L{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    const ScalarType dtype = floating_dtype(x, op, "x");
    {
      const Sizes shape = x.sizes();
      bool right = false;
      if (shape.size() == 4) {
        B = shape[0];
        T = shape[1];
        F = shape[2];
        C = shape[3];
        right = true;
      }
      fastasr::check(right, op, "x is not (B, T, F, C)");
    }
    check_contiguous(x, op, "x");
    find_sizes(*this);
    check_dtype(weight, dtype, op, "weight");
    {
      const Sizes shape = weight.sizes();
      bool right = false;
      if (shape.size() == 4) {
        K = shape[2];
        L = shape[3];
        right = shape[0] == C && shape[1] == 1 && K >= 1 && L >= 1;
      } else if (shape.size() == 3) {
        K = shape[1];
        L = shape[2];
        right = shape[0] == C && K >= 1 && L >= 1;
      }
      fastasr::check(right, op, "weight is not (C, 1, K, L) or (C, K, L), K >= 1, L >= 1");
    }
    check_contiguous(weight, op, "weight");
    check_dtype(grad_y, dtype, op, "grad_y");
    fastasr::check(has_sizes(grad_y, {B, T + 2 * P - K + 1, F + 2 * Q - L + 1, C}), op,
                   "grad_y is not (B, T+2*P-K+1, F+2*Q-L+1, C)");
    check_contiguous(grad_y, op, "grad_y");
  }
};

}  // namespace fastasr::bindings::depthwise_conv2d
