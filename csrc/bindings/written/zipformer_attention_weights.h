// SPDX-License-Identifier: Apache-2.0
// `make op OP=zipformer_attention_weights` writes this file from fastasr/ops/zipformer_attention_weights.py: change
// that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::zipformer_attention_weights {

struct ZipformerAttentionWeightsForward {
  static constexpr const char* kName = "zipformer_attention_weights_forward";
  using Types =
      ArgumentTypes<Tensor, Optional, Optional, Optional, Optional, Optional, int64_t, int64_t, int64_t, int64_t>;

  const Tensor& x;
  const Optional& pos;
  const Optional& cached_key;
  const Optional& key_padding_mask;
  const Optional& attn_mask;
  const Optional& starts;
  int64_t num_heads;
  int64_t query_head_dim;
  int64_t chunk_size;
  int64_t left_context_chunks;

  // The sizes, once the arguments are checked.
  int64_t T{};
  int64_t B{};
  int64_t P{};
  int64_t S{};
  int64_t R{};
  int64_t N{};
  int64_t L{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(num_heads >= 1, op, "num_heads: expected at least 1");
    fastasr::check(query_head_dim >= 1, op, "query_head_dim: expected at least 1");
    fastasr::check(chunk_size == -1 || chunk_size > 0, op, "chunk_size: expected -1 or more than 0");
    fastasr::check(left_context_chunks >= -1, op, "left_context_chunks: expected at least -1");
    const ScalarType dtype = floating_dtype(x, op, "x");
    {
      const Sizes shape = x.sizes();
      bool right = false;
      if (shape.size() == 3) {
        T = shape[0];
        B = shape[1];
        P = shape[2] / num_heads;
        right = shape[2] % num_heads == 0 && P >= 2 * query_head_dim;
      }
      fastasr::check(right, op, "x is not (T, B, num_heads*P), P >= 2*query_head_dim");
    }
    check_contiguous(x, op, "x");
    if (pos) {
      check_dtype(*pos, dtype, op, "pos");
      {
        const Sizes shape = pos->sizes();
        bool right = false;
        if (shape.size() == 3) {
          S = shape[0];
          R = shape[1];
          right = shape[2] == num_heads * (P - 2 * query_head_dim) && (S == 1 || S == B);
        }
        fastasr::check(right, op, "pos is not (S, R, num_heads*(P-2*query_head_dim)), (S == 1 or S == B)");
      }
      check_contiguous(*pos, op, "pos");
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
    if (cached_key) {
      check_dtype(*cached_key, dtype, op, "cached_key");
      {
        const Sizes shape = cached_key->sizes();
        bool right = false;
        if (shape.size() == 3) {
          L = shape[0];
          right = shape[1] == B && shape[2] == num_heads * query_head_dim;
        }
        fastasr::check(right, op, "cached_key is not (L, B, num_heads*query_head_dim)");
      }
      check_contiguous(*cached_key, op, "cached_key");
    }
    if (key_padding_mask) {
      check_dtype(*key_padding_mask, ScalarType::Bool, op, "key_padding_mask");
      fastasr::check(has_sizes(*key_padding_mask, {B, T + L}), op, "key_padding_mask is not (B, T+L)");
      check_contiguous(*key_padding_mask, op, "key_padding_mask");
    }
    if (attn_mask) {
      check_dtype(*attn_mask, ScalarType::Bool, op, "attn_mask");
      fastasr::check(has_sizes(*attn_mask, {T, T + L}) || has_sizes(*attn_mask, {B, T, T + L}), op,
                     "attn_mask is not (T, T+L) or (B, T, T+L)");
      check_contiguous(*attn_mask, op, "attn_mask");
    }
  }
};

struct ZipformerAttentionWeightsBackward {
  static constexpr const char* kName = "zipformer_attention_weights_backward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Optional, Optional, Optional, Optional, Optional, int64_t,
                              int64_t, int64_t, int64_t, double, double>;

  const Tensor& grad_weights;
  const Tensor& weights;
  const Tensor& x;
  const Optional& pos;
  const Optional& cached_key;
  const Optional& key_padding_mask;
  const Optional& attn_mask;
  const Optional& starts;
  int64_t num_heads;
  int64_t query_head_dim;
  int64_t chunk_size;
  int64_t left_context_chunks;
  double score_penalty;
  double score_limit;

  // The sizes, once the arguments are checked.
  int64_t T{};
  int64_t B{};
  int64_t P{};
  int64_t S{};
  int64_t R{};
  int64_t N{};
  int64_t L{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(num_heads >= 1, op, "num_heads: expected at least 1");
    fastasr::check(query_head_dim >= 1, op, "query_head_dim: expected at least 1");
    fastasr::check(chunk_size == -1 || chunk_size > 0, op, "chunk_size: expected -1 or more than 0");
    fastasr::check(left_context_chunks >= -1, op, "left_context_chunks: expected at least -1");
    fastasr::check(score_penalty >= 0 && score_penalty < std::numeric_limits<double>::infinity(), op,
                   "score_penalty: expected at least 0 and less than inf");
    fastasr::check(score_limit >= 0 && score_limit < std::numeric_limits<double>::infinity(), op,
                   "score_limit: expected at least 0 and less than inf");
    const ScalarType dtype = floating_dtype(x, op, "x");
    {
      const Sizes shape = x.sizes();
      bool right = false;
      if (shape.size() == 3) {
        T = shape[0];
        B = shape[1];
        P = shape[2] / num_heads;
        right = shape[2] % num_heads == 0 && P >= 2 * query_head_dim;
      }
      fastasr::check(right, op, "x is not (T, B, num_heads*P), P >= 2*query_head_dim");
    }
    check_contiguous(x, op, "x");
    if (pos) {
      check_dtype(*pos, dtype, op, "pos");
      {
        const Sizes shape = pos->sizes();
        bool right = false;
        if (shape.size() == 3) {
          S = shape[0];
          R = shape[1];
          right = shape[2] == num_heads * (P - 2 * query_head_dim) && (S == 1 || S == B);
        }
        fastasr::check(right, op, "pos is not (S, R, num_heads*(P-2*query_head_dim)), (S == 1 or S == B)");
      }
      check_contiguous(*pos, op, "pos");
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
    if (cached_key) {
      check_dtype(*cached_key, dtype, op, "cached_key");
      {
        const Sizes shape = cached_key->sizes();
        bool right = false;
        if (shape.size() == 3) {
          L = shape[0];
          right = shape[1] == B && shape[2] == num_heads * query_head_dim;
        }
        fastasr::check(right, op, "cached_key is not (L, B, num_heads*query_head_dim)");
      }
      check_contiguous(*cached_key, op, "cached_key");
    }
    if (key_padding_mask) {
      check_dtype(*key_padding_mask, ScalarType::Bool, op, "key_padding_mask");
      fastasr::check(has_sizes(*key_padding_mask, {B, T + L}), op, "key_padding_mask is not (B, T+L)");
      check_contiguous(*key_padding_mask, op, "key_padding_mask");
    }
    if (attn_mask) {
      check_dtype(*attn_mask, ScalarType::Bool, op, "attn_mask");
      fastasr::check(has_sizes(*attn_mask, {T, T + L}) || has_sizes(*attn_mask, {B, T, T + L}), op,
                     "attn_mask is not (T, T+L) or (B, T, T+L)");
      check_contiguous(*attn_mask, op, "attn_mask");
    }
    check_dtype(weights, dtype, op, "weights");
    fastasr::check(has_sizes(weights, {num_heads, B, T, T + L}), op, "weights is not (num_heads, B, T, T+L)");
    check_dense_channels(weights, op, "weights");
    check_dtype(grad_weights, dtype, op, "grad_weights");
    fastasr::check(has_sizes(grad_weights, {num_heads, B, T, T + L}), op, "grad_weights is not (num_heads, B, T, T+L)");
    check_dense_channels(grad_weights, op, "grad_weights");
  }
};

}  // namespace fastasr::bindings::zipformer_attention_weights
