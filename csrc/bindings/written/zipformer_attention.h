// SPDX-License-Identifier: Apache-2.0
// `make op OP=zipformer_attention` writes this file from fastasr/ops/zipformer_attention.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::zipformer_attention {

struct ZipformerAttentionForward {
  static constexpr const char* kName = "zipformer_attention_forward";
  using Types = ArgumentTypes<Tensor, Optional, Tensor, Optional, Optional, Optional, Optional, int64_t, int64_t,
                              int64_t, int64_t, int64_t, Optional, bool>;

  const Tensor& x;
  const Optional& pos;
  const Tensor& value;
  const Optional& cached_key;
  const Optional& key_padding_mask;
  const Optional& attn_mask;
  const Optional& starts;
  int64_t num_heads;
  int64_t query_head_dim;
  int64_t value_heads;
  int64_t chunk_size;
  int64_t left_context_chunks;
  const Optional& equal;
  bool keep;

  // The sizes, once the arguments are checked.
  int64_t T{};
  int64_t B{};
  int64_t P{};
  int64_t S{};
  int64_t R{};
  int64_t N{};
  int64_t L{};
  int64_t E{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(num_heads >= 1, op, "num_heads: expected at least 1");
    fastasr::check(query_head_dim >= 1, op, "query_head_dim: expected at least 1");
    fastasr::check(value_heads >= 1, op, "value_heads: expected at least 1");
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
    check_dtype(value, dtype, op, "value");
    {
      const Sizes shape = value.sizes();
      bool right = false;
      if (shape.size() == 3) {
        E = shape[2];
        right = shape[0] == T + L && shape[1] == B;
      }
      fastasr::check(right, op, "value is not (T+L, B, E)");
    }
    check_contiguous(value, op, "value");
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
    if (equal) {
      fastasr::check(has_sizes(*equal, {}) || has_sizes(*equal, {1}), op, "equal is not () or (1)");
      check_contiguous(*equal, op, "equal");
    }
  }
};

struct ZipformerAttentionBackward {
  static constexpr const char* kName = "zipformer_attention_backward";
  using Types =
      ArgumentTypes<Tensor, Tensor, Tensor, Tensor, Tensor, Optional, Tensor, Optional, Optional, Optional, Optional,
                    int64_t, int64_t, int64_t, int64_t, int64_t, Optional, double, double, Optional>;

  const Tensor& grad_y;
  const Tensor& y;
  const Tensor& statistics;
  const Tensor& remainder;
  const Tensor& x;
  const Optional& pos;
  const Tensor& value;
  const Optional& cached_key;
  const Optional& key_padding_mask;
  const Optional& attn_mask;
  const Optional& starts;
  int64_t num_heads;
  int64_t query_head_dim;
  int64_t value_heads;
  int64_t chunk_size;
  int64_t left_context_chunks;
  const Optional& equal;
  double score_penalty;
  double score_limit;
  const Optional& act;

  // The sizes, once the arguments are checked.
  int64_t T{};
  int64_t B{};
  int64_t P{};
  int64_t S{};
  int64_t R{};
  int64_t N{};
  int64_t L{};
  int64_t E{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(num_heads >= 1, op, "num_heads: expected at least 1");
    fastasr::check(query_head_dim >= 1, op, "query_head_dim: expected at least 1");
    fastasr::check(value_heads >= 1, op, "value_heads: expected at least 1");
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
    check_dtype(value, dtype, op, "value");
    {
      const Sizes shape = value.sizes();
      bool right = false;
      if (shape.size() == 3) {
        E = shape[2];
        right = shape[0] == T + L && shape[1] == B;
      }
      fastasr::check(right, op, "value is not (T+L, B, E)");
    }
    check_contiguous(value, op, "value");
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
    if (act) {
      fastasr::check(has_sizes(*act, {}) || has_sizes(*act, {1}), op, "act is not () or (1)");
      check_contiguous(*act, op, "act");
    }
    if (equal) {
      fastasr::check(has_sizes(*equal, {}) || has_sizes(*equal, {1}), op, "equal is not () or (1)");
      check_contiguous(*equal, op, "equal");
    }
    check_dtype(y, dtype, op, "y");
    fastasr::check(has_sizes(y, {T, B, E}), op, "y is not (T, B, E)");
    check_contiguous(y, op, "y");
    check_dtype(grad_y, dtype, op, "grad_y");
    fastasr::check(has_sizes(grad_y, {T, B, E}), op, "grad_y is not (T, B, E)");
    check_contiguous(grad_y, op, "grad_y");
    check_dtype(statistics, compute_type(dtype), op, "statistics");
    check_contiguous(statistics, op, "statistics");
    check_dtype(remainder, dtype, op, "remainder");
    check_contiguous(remainder, op, "remainder");
  }
};

}  // namespace fastasr::bindings::zipformer_attention
