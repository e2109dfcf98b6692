// SPDX-License-Identifier: Apache-2.0
// `make op OP=toeplitz_attention` writes this file from fastasr/ops/toeplitz_attention.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::toeplitz_attention {

// Finds the sizes size, count, which other arguments give. The binding defines it.
template <typename A>
void find_sizes(A& a);

struct ToeplitzAttentionForward {
  static constexpr const char* kName = "toeplitz_attention_forward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Optional, Optional, bool, int64_t,
                              int64_t, bool, bool>;

  const Tensor& query_key;
  const Tensor& gate;
  const Tensor& value;
  const Tensor& qk_weight;
  const Tensor& qk_bias;
  const Tensor& position_bias;
  const Optional& padding_mask;
  const Optional& weights_dropout;
  bool causal;
  int64_t chunk_size;
  int64_t activation;
  bool activate_value;
  bool keep;

  // The sizes, once the arguments are checked.
  int64_t size{};
  int64_t count{};
  int64_t L{};
  int64_t B{};
  int64_t D{};
  int64_t V{};
  int64_t P{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(activation >= 0 && activation < 5, op, "activation");
    const ScalarType dtype = floating_dtype(query_key, op, "query_key");
    {
      const Sizes shape = query_key.sizes();
      bool right = false;
      if (shape.size() == 3) {
        L = shape[0];
        B = shape[1];
        D = shape[2];
        right = D >= 1;
      }
      fastasr::check(right, op, "query_key is not (L, B, D), D >= 1");
    }
    check_dense_channels(query_key, op, "query_key");
    find_sizes(*this);
    check_dtype(gate, dtype, op, "gate");
    {
      const Sizes shape = gate.sizes();
      bool right = false;
      if (shape.size() == 3) {
        V = shape[2];
        right = shape[0] == L && shape[1] == B;
      }
      fastasr::check(right, op, "gate is not (L, B, V)");
    }
    check_dense_channels(gate, op, "gate");
    check_dtype(value, dtype, op, "value");
    fastasr::check(has_sizes(value, {L, B, V}), op, "value is not (L, B, V)");
    check_dense_channels(value, op, "value");
    check_dtype(qk_weight, compute_type(dtype), op, "qk_weight");
    fastasr::check(has_sizes(qk_weight, {2, D}), op, "qk_weight is not (2, D)");
    check_contiguous(qk_weight, op, "qk_weight");
    check_dtype(qk_bias, compute_type(dtype), op, "qk_bias");
    fastasr::check(has_sizes(qk_bias, {2, D}), op, "qk_bias is not (2, D)");
    check_contiguous(qk_bias, op, "qk_bias");
    if (padding_mask) {
      check_dtype(*padding_mask, ScalarType::Bool, op, "padding_mask");
      fastasr::check(has_sizes(*padding_mask, {B, L}), op, "padding_mask is not (B, L)");
      check_contiguous(*padding_mask, op, "padding_mask");
    }
    if (weights_dropout) {
      check_dtype(*weights_dropout, compute_type(dtype), op, "weights_dropout");
      fastasr::check(has_sizes(*weights_dropout, {B, count, size, size}), op,
                     "weights_dropout is not (B, count, size, size)");
      check_contiguous(*weights_dropout, op, "weights_dropout");
    }
    check_dtype(position_bias, compute_type(dtype), op, "position_bias");
    {
      const Sizes shape = position_bias.sizes();
      bool right = false;
      if (shape.size() == 1) {
        P = (shape[0] + 1) / 2;
        right = (shape[0] + 1) % 2 == 0 && P >= size;
      }
      fastasr::check(right, op, "position_bias is not (2*P-1), P >= size");
    }
    check_contiguous(position_bias, op, "position_bias");
  }
};

struct ToeplitzAttentionBackward {
  static constexpr const char* kName = "toeplitz_attention_backward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Optional, Optional, Tensor, bool,
                              int64_t, int64_t, bool>;

  const Tensor& grad_y;
  const Tensor& query_key;
  const Tensor& gate;
  const Tensor& value;
  const Tensor& qk_weight;
  const Tensor& qk_bias;
  const Tensor& position_bias;
  const Optional& padding_mask;
  const Optional& weights_dropout;
  const Tensor& mixed;
  bool causal;
  int64_t chunk_size;
  int64_t activation;
  bool activate_value;

  // The sizes, once the arguments are checked.
  int64_t size{};
  int64_t count{};
  int64_t L{};
  int64_t B{};
  int64_t D{};
  int64_t V{};
  int64_t P{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(activation >= 0 && activation < 5, op, "activation");
    const ScalarType dtype = floating_dtype(query_key, op, "query_key");
    {
      const Sizes shape = query_key.sizes();
      bool right = false;
      if (shape.size() == 3) {
        L = shape[0];
        B = shape[1];
        D = shape[2];
        right = D >= 1;
      }
      fastasr::check(right, op, "query_key is not (L, B, D), D >= 1");
    }
    check_dense_channels(query_key, op, "query_key");
    find_sizes(*this);
    check_dtype(gate, dtype, op, "gate");
    {
      const Sizes shape = gate.sizes();
      bool right = false;
      if (shape.size() == 3) {
        V = shape[2];
        right = shape[0] == L && shape[1] == B;
      }
      fastasr::check(right, op, "gate is not (L, B, V)");
    }
    check_dense_channels(gate, op, "gate");
    check_dtype(value, dtype, op, "value");
    fastasr::check(has_sizes(value, {L, B, V}), op, "value is not (L, B, V)");
    check_dense_channels(value, op, "value");
    check_dtype(qk_weight, compute_type(dtype), op, "qk_weight");
    fastasr::check(has_sizes(qk_weight, {2, D}), op, "qk_weight is not (2, D)");
    check_contiguous(qk_weight, op, "qk_weight");
    check_dtype(qk_bias, compute_type(dtype), op, "qk_bias");
    fastasr::check(has_sizes(qk_bias, {2, D}), op, "qk_bias is not (2, D)");
    check_contiguous(qk_bias, op, "qk_bias");
    if (padding_mask) {
      check_dtype(*padding_mask, ScalarType::Bool, op, "padding_mask");
      fastasr::check(has_sizes(*padding_mask, {B, L}), op, "padding_mask is not (B, L)");
      check_contiguous(*padding_mask, op, "padding_mask");
    }
    if (weights_dropout) {
      check_dtype(*weights_dropout, compute_type(dtype), op, "weights_dropout");
      fastasr::check(has_sizes(*weights_dropout, {B, count, size, size}), op,
                     "weights_dropout is not (B, count, size, size)");
      check_contiguous(*weights_dropout, op, "weights_dropout");
    }
    check_dtype(position_bias, compute_type(dtype), op, "position_bias");
    {
      const Sizes shape = position_bias.sizes();
      bool right = false;
      if (shape.size() == 1) {
        P = (shape[0] + 1) / 2;
        right = (shape[0] + 1) % 2 == 0 && P >= size;
      }
      fastasr::check(right, op, "position_bias is not (2*P-1), P >= size");
    }
    check_contiguous(position_bias, op, "position_bias");
    check_dtype(grad_y, dtype, op, "grad_y");
    fastasr::check(has_sizes(grad_y, {L, B, V}), op, "grad_y is not (L, B, V)");
    check_dense_channels(grad_y, op, "grad_y");
    check_dtype(mixed, dtype, op, "mixed");
    fastasr::check(has_sizes(mixed, {L, B, V}), op, "mixed is not (L, B, V)");
    check_contiguous(mixed, op, "mixed");
  }
};

}  // namespace fastasr::bindings::toeplitz_attention
