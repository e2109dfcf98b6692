// SPDX-License-Identifier: Apache-2.0
// `make op OP=gated_depthwise_conv` writes this file from fastasr/ops/gated_depthwise_conv.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::gated_depthwise_conv {

struct GatedDepthwiseConvForward {
  static constexpr const char* kName = "gated_depthwise_conv_forward";
  using Types = ArgumentTypes<Tensor, Tensor, Optional, Optional, Optional, Optional, Optional, Optional, Optional,
                              int64_t, int64_t, bool, int64_t, int64_t>;

  const Tensor& h;
  const Tensor& weight;
  const Optional& bias;
  const Optional& causal_weight;
  const Optional& causal_bias;
  const Optional& chunk_scale;
  const Optional& padding_mask;
  const Optional& cache;
  const Optional& starts;
  int64_t chunk_size;
  int64_t activation;
  bool return_cache;
  int64_t delay;
  int64_t gate;

  // The sizes, once the arguments are checked.
  int64_t T{};
  int64_t B{};
  int64_t C{};
  int64_t K{};
  int64_t N{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(chunk_size == -1 || chunk_size >= 1, op, "chunk_size: expected -1 or at least 1");
    fastasr::check(activation >= 0 && activation < 3, op, "activation");
    fastasr::check(gate >= 0 && gate < 2, op, "gate");
    const ScalarType dtype = floating_dtype(h, op, "h");
    {
      const Sizes shape = h.sizes();
      bool right = false;
      if (shape.size() == 3) {
        T = shape[0];
        B = shape[1];
        C = shape[2] / 2;
        right = shape[2] % 2 == 0;
      }
      fastasr::check(right, op, "h is not (T, B, 2*C)");
    }
    check_dense_channels(h, op, "h");
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
      fastasr::check(has_sizes(*bias, {C}), op, "bias is not (C)");
      check_contiguous(*bias, op, "bias");
    }
    if (causal_weight) {
      fastasr::check(has_sizes(*causal_weight, {C, 1, K / 2 + 1}) || has_sizes(*causal_weight, {C, K / 2 + 1}), op,
                     "causal_weight is not (C, 1, K//2+1) or (C, K//2+1)");
      check_contiguous(*causal_weight, op, "causal_weight");
    }
    if (causal_bias) {
      fastasr::check(has_sizes(*causal_bias, {C}), op, "causal_bias is not (C)");
      check_contiguous(*causal_bias, op, "causal_bias");
    }
    if (chunk_scale) {
      check_dtype(*chunk_scale, dtype, op, "chunk_scale");
      fastasr::check(has_sizes(*chunk_scale, {2, C, K}), op, "chunk_scale is not (2, C, K)");
      check_contiguous(*chunk_scale, op, "chunk_scale");
    }
    if (padding_mask) {
      check_dtype(*padding_mask, ScalarType::Bool, op, "padding_mask");
      fastasr::check(has_sizes(*padding_mask, {B, T}), op, "padding_mask is not (B, T)");
      check_contiguous(*padding_mask, op, "padding_mask");
    }
    if (cache) {
      fastasr::check(has_sizes(*cache, {B, C, K / 2 + delay}), op, "cache is not (B, C, K//2+delay)");
      check_contiguous(*cache, op, "cache");
    }
    if (starts) {
      check_dtype(*starts, ScalarType::Long, op, "starts");
      {
        const Sizes shape = starts->sizes();
        bool right = false;
        if (shape.size() == 1) {
          N = shape[0];
          right = N >= 1;
        }
        fastasr::check(right, op, "starts is not (N), N >= 1");
      }
      check_contiguous(*starts, op, "starts");
    }
  }
};

struct GatedDepthwiseConvBackward {
  static constexpr const char* kName = "gated_depthwise_conv_backward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Optional, Optional, Optional, Optional, Optional, Optional,
                              Optional, int64_t, int64_t, int64_t, int64_t>;

  const Tensor& grad_y;
  const Tensor& h;
  const Tensor& weight;
  const Optional& bias;
  const Optional& causal_weight;
  const Optional& causal_bias;
  const Optional& chunk_scale;
  const Optional& padding_mask;
  const Optional& cache;
  const Optional& starts;
  int64_t chunk_size;
  int64_t activation;
  int64_t delay;
  int64_t gate;

  // The sizes, once the arguments are checked.
  int64_t T{};
  int64_t B{};
  int64_t C{};
  int64_t K{};
  int64_t N{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(chunk_size == -1 || chunk_size >= 1, op, "chunk_size: expected -1 or at least 1");
    fastasr::check(activation >= 0 && activation < 3, op, "activation");
    fastasr::check(gate >= 0 && gate < 2, op, "gate");
    const ScalarType dtype = floating_dtype(h, op, "h");
    {
      const Sizes shape = h.sizes();
      bool right = false;
      if (shape.size() == 3) {
        T = shape[0];
        B = shape[1];
        C = shape[2] / 2;
        right = shape[2] % 2 == 0;
      }
      fastasr::check(right, op, "h is not (T, B, 2*C)");
    }
    check_dense_channels(h, op, "h");
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
      fastasr::check(has_sizes(*bias, {C}), op, "bias is not (C)");
      check_contiguous(*bias, op, "bias");
    }
    if (causal_weight) {
      fastasr::check(has_sizes(*causal_weight, {C, 1, K / 2 + 1}) || has_sizes(*causal_weight, {C, K / 2 + 1}), op,
                     "causal_weight is not (C, 1, K//2+1) or (C, K//2+1)");
      check_contiguous(*causal_weight, op, "causal_weight");
    }
    if (causal_bias) {
      fastasr::check(has_sizes(*causal_bias, {C}), op, "causal_bias is not (C)");
      check_contiguous(*causal_bias, op, "causal_bias");
    }
    if (chunk_scale) {
      check_dtype(*chunk_scale, dtype, op, "chunk_scale");
      fastasr::check(has_sizes(*chunk_scale, {2, C, K}), op, "chunk_scale is not (2, C, K)");
      check_contiguous(*chunk_scale, op, "chunk_scale");
    }
    if (padding_mask) {
      check_dtype(*padding_mask, ScalarType::Bool, op, "padding_mask");
      fastasr::check(has_sizes(*padding_mask, {B, T}), op, "padding_mask is not (B, T)");
      check_contiguous(*padding_mask, op, "padding_mask");
    }
    if (cache) {
      fastasr::check(has_sizes(*cache, {B, C, K / 2 + delay}), op, "cache is not (B, C, K//2+delay)");
      check_contiguous(*cache, op, "cache");
    }
    if (starts) {
      check_dtype(*starts, ScalarType::Long, op, "starts");
      {
        const Sizes shape = starts->sizes();
        bool right = false;
        if (shape.size() == 1) {
          N = shape[0];
          right = N >= 1;
        }
        fastasr::check(right, op, "starts is not (N), N >= 1");
      }
      check_contiguous(*starts, op, "starts");
    }
    check_dtype(grad_y, dtype, op, "grad_y");
    fastasr::check(has_sizes(grad_y, {T, B, C}), op, "grad_y is not (T, B, C)");
    check_dense_channels(grad_y, op, "grad_y");
  }
};

}  // namespace fastasr::bindings::gated_depthwise_conv
