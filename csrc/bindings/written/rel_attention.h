// SPDX-License-Identifier: Apache-2.0
// `make op OP=rel_attention` writes this file from fastasr/ops/rel_attention.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::rel_attention {

struct RelAttentionForward {
  static constexpr const char* kName = "rel_attention_forward";
  using Types =
      ArgumentTypes<Tensor, Tensor, Tensor, Optional, Optional, Optional, Optional, Optional, Optional, Optional,
                    Optional, Optional, Optional, double, int64_t, int64_t, int64_t, double, int64_t, int64_t, bool>;

  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const Optional& pos;
  const Optional& bias_u;
  const Optional& bias_v;
  const Optional& offset_bias;
  const Optional& offset_gate;
  const Optional& key_bias;
  const Optional& key_padding_mask;
  const Optional& attn_mask;
  const Optional& starts;
  const Optional& dropout_seed;
  double dropout_p;
  std::array<int64_t, 2> context;
  int64_t chunk_size;
  double soft_cap;
  std::array<int64_t, 2> pos_span;
  bool keep;

  // The sizes, once the arguments are checked.
  int64_t B{};
  int64_t T{};
  int64_t H{};
  int64_t D{};
  int64_t K{};
  int64_t E{};
  int64_t R{};
  int64_t P{};
  int64_t N{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(dropout_p >= 0 && dropout_p < 1, op, "dropout_p: expected at least 0 and less than 1");
    fastasr::check(chunk_size >= 1, op, "chunk_size: expected at least 1");
    fastasr::check(soft_cap >= 0, op, "soft_cap: expected at least 0");
    const ScalarType dtype = floating_dtype(q, op, "q");
    {
      const Sizes shape = q.sizes();
      bool right = false;
      if (shape.size() == 4) {
        B = shape[0];
        T = shape[1];
        H = shape[2];
        D = shape[3];
        right = H >= 1 && D >= 1;
      }
      fastasr::check(right, op, "q is not (B, T, H, D), H >= 1, D >= 1");
    }
    check_contiguous(q, op, "q");
    check_dtype(k, dtype, op, "k");
    {
      const Sizes shape = k.sizes();
      bool right = false;
      if (shape.size() == 4) {
        K = shape[1];
        right = shape[0] == B && shape[2] == H && shape[3] == D && K >= T;
      }
      fastasr::check(right, op, "k is not (B, K, H, D), K >= T");
    }
    check_contiguous(k, op, "k");
    check_dtype(v, dtype, op, "v");
    {
      const Sizes shape = v.sizes();
      bool right = false;
      if (shape.size() == 4) {
        E = shape[3];
        right = shape[0] == B && shape[1] == K && shape[2] == H && E >= 1;
      }
      fastasr::check(right, op, "v is not (B, K, H, E), E >= 1");
    }
    check_contiguous(v, op, "v");
    if (pos) {
      check_dtype(*pos, dtype, op, "pos");
      {
        const Sizes shape = pos->sizes();
        bool right = false;
        if (shape.size() == 3) {
          R = shape[0];
          P = shape[1];
          right = shape[2] == D && (P == 1 || P == H);
        }
        fastasr::check(right, op, "pos is not (R, P, D), (P == 1 or P == H)");
      }
      check_contiguous(*pos, op, "pos");
    }
    if (bias_u) {
      check_dtype(*bias_u, dtype, op, "bias_u");
      fastasr::check(has_sizes(*bias_u, {H, D}), op, "bias_u is not (H, D)");
      check_contiguous(*bias_u, op, "bias_u");
    }
    if (bias_v) {
      check_dtype(*bias_v, dtype, op, "bias_v");
      fastasr::check(has_sizes(*bias_v, {H, D}), op, "bias_v is not (H, D)");
      check_contiguous(*bias_v, op, "bias_v");
    }
    if (offset_bias) {
      check_dtype(*offset_bias, dtype, op, "offset_bias");
      fastasr::check(has_sizes(*offset_bias, {(T ? T + K - 1 : 0), H}), op, "offset_bias is not ((T and T+K-1), H)");
      check_contiguous(*offset_bias, op, "offset_bias");
    }
    if (offset_gate) {
      check_dtype(*offset_gate, dtype, op, "offset_gate");
      fastasr::check(has_sizes(*offset_gate, {B, T, H}), op, "offset_gate is not (B, T, H)");
      check_contiguous(*offset_gate, op, "offset_gate");
    }
    if (key_bias) {
      check_dtype(*key_bias, dtype, op, "key_bias");
      fastasr::check(has_sizes(*key_bias, {B, H, K}) || has_sizes(*key_bias, {1, H, K}) ||
                         has_sizes(*key_bias, {B, 1, K}) || has_sizes(*key_bias, {1, 1, K}),
                     op, "key_bias is not (B, H, K) or (1, H, K) or (B, 1, K) or (1, 1, K)");
      check_contiguous(*key_bias, op, "key_bias");
    }
    if (key_padding_mask) {
      check_dtype(*key_padding_mask, ScalarType::Bool, op, "key_padding_mask");
      fastasr::check(has_sizes(*key_padding_mask, {B, K}), op, "key_padding_mask is not (B, K)");
      check_contiguous(*key_padding_mask, op, "key_padding_mask");
    }
    if (attn_mask) {
      check_dtype(*attn_mask, ScalarType::Bool, op, "attn_mask");
      fastasr::check(has_sizes(*attn_mask, {T, K}) || has_sizes(*attn_mask, {B, T, K}), op,
                     "attn_mask is not (T, K) or (B, T, K)");
      check_contiguous(*attn_mask, op, "attn_mask");
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
    if (dropout_seed) {
      check_dtype(*dropout_seed, ScalarType::Long, op, "dropout_seed");
      fastasr::check(has_sizes(*dropout_seed, {1}), op, "dropout_seed is not (1)");
      check_contiguous(*dropout_seed, op, "dropout_seed");
    }
  }
};

struct RelAttentionBackward {
  static constexpr const char* kName = "rel_attention_backward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Tensor, Optional, Optional, Optional, Optional, Optional,
                              Optional, Optional, Optional, Optional, Optional, Tensor, Tensor, Tensor, double, int64_t,
                              int64_t, int64_t, double, int64_t, int64_t>;

  const Tensor& grad_y;
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const Optional& pos;
  const Optional& bias_u;
  const Optional& bias_v;
  const Optional& offset_bias;
  const Optional& offset_gate;
  const Optional& key_bias;
  const Optional& key_padding_mask;
  const Optional& attn_mask;
  const Optional& starts;
  const Optional& dropout_seed;
  const Tensor& y;
  const Tensor& lse;
  const Tensor& remainder;
  double dropout_p;
  std::array<int64_t, 2> context;
  int64_t chunk_size;
  double soft_cap;
  std::array<int64_t, 2> pos_span;

  // The sizes, once the arguments are checked.
  int64_t B{};
  int64_t T{};
  int64_t H{};
  int64_t D{};
  int64_t K{};
  int64_t E{};
  int64_t R{};
  int64_t P{};
  int64_t N{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(dropout_p >= 0 && dropout_p < 1, op, "dropout_p: expected at least 0 and less than 1");
    fastasr::check(chunk_size >= 1, op, "chunk_size: expected at least 1");
    fastasr::check(soft_cap >= 0, op, "soft_cap: expected at least 0");
    const ScalarType dtype = floating_dtype(q, op, "q");
    {
      const Sizes shape = q.sizes();
      bool right = false;
      if (shape.size() == 4) {
        B = shape[0];
        T = shape[1];
        H = shape[2];
        D = shape[3];
        right = H >= 1 && D >= 1;
      }
      fastasr::check(right, op, "q is not (B, T, H, D), H >= 1, D >= 1");
    }
    check_contiguous(q, op, "q");
    check_dtype(k, dtype, op, "k");
    {
      const Sizes shape = k.sizes();
      bool right = false;
      if (shape.size() == 4) {
        K = shape[1];
        right = shape[0] == B && shape[2] == H && shape[3] == D && K >= T;
      }
      fastasr::check(right, op, "k is not (B, K, H, D), K >= T");
    }
    check_contiguous(k, op, "k");
    check_dtype(v, dtype, op, "v");
    {
      const Sizes shape = v.sizes();
      bool right = false;
      if (shape.size() == 4) {
        E = shape[3];
        right = shape[0] == B && shape[1] == K && shape[2] == H && E >= 1;
      }
      fastasr::check(right, op, "v is not (B, K, H, E), E >= 1");
    }
    check_contiguous(v, op, "v");
    if (pos) {
      check_dtype(*pos, dtype, op, "pos");
      {
        const Sizes shape = pos->sizes();
        bool right = false;
        if (shape.size() == 3) {
          R = shape[0];
          P = shape[1];
          right = shape[2] == D && (P == 1 || P == H);
        }
        fastasr::check(right, op, "pos is not (R, P, D), (P == 1 or P == H)");
      }
      check_contiguous(*pos, op, "pos");
    }
    if (bias_u) {
      check_dtype(*bias_u, dtype, op, "bias_u");
      fastasr::check(has_sizes(*bias_u, {H, D}), op, "bias_u is not (H, D)");
      check_contiguous(*bias_u, op, "bias_u");
    }
    if (bias_v) {
      check_dtype(*bias_v, dtype, op, "bias_v");
      fastasr::check(has_sizes(*bias_v, {H, D}), op, "bias_v is not (H, D)");
      check_contiguous(*bias_v, op, "bias_v");
    }
    if (offset_bias) {
      check_dtype(*offset_bias, dtype, op, "offset_bias");
      fastasr::check(has_sizes(*offset_bias, {(T ? T + K - 1 : 0), H}), op, "offset_bias is not ((T and T+K-1), H)");
      check_contiguous(*offset_bias, op, "offset_bias");
    }
    if (offset_gate) {
      check_dtype(*offset_gate, dtype, op, "offset_gate");
      fastasr::check(has_sizes(*offset_gate, {B, T, H}), op, "offset_gate is not (B, T, H)");
      check_contiguous(*offset_gate, op, "offset_gate");
    }
    if (key_bias) {
      check_dtype(*key_bias, dtype, op, "key_bias");
      fastasr::check(has_sizes(*key_bias, {B, H, K}) || has_sizes(*key_bias, {1, H, K}) ||
                         has_sizes(*key_bias, {B, 1, K}) || has_sizes(*key_bias, {1, 1, K}),
                     op, "key_bias is not (B, H, K) or (1, H, K) or (B, 1, K) or (1, 1, K)");
      check_contiguous(*key_bias, op, "key_bias");
    }
    if (key_padding_mask) {
      check_dtype(*key_padding_mask, ScalarType::Bool, op, "key_padding_mask");
      fastasr::check(has_sizes(*key_padding_mask, {B, K}), op, "key_padding_mask is not (B, K)");
      check_contiguous(*key_padding_mask, op, "key_padding_mask");
    }
    if (attn_mask) {
      check_dtype(*attn_mask, ScalarType::Bool, op, "attn_mask");
      fastasr::check(has_sizes(*attn_mask, {T, K}) || has_sizes(*attn_mask, {B, T, K}), op,
                     "attn_mask is not (T, K) or (B, T, K)");
      check_contiguous(*attn_mask, op, "attn_mask");
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
    if (dropout_seed) {
      check_dtype(*dropout_seed, ScalarType::Long, op, "dropout_seed");
      fastasr::check(has_sizes(*dropout_seed, {1}), op, "dropout_seed is not (1)");
      check_contiguous(*dropout_seed, op, "dropout_seed");
    }
    check_dtype(y, dtype, op, "y");
    fastasr::check(has_sizes(y, {B, T, H, E}), op, "y is not (B, T, H, E)");
    check_contiguous(y, op, "y");
    check_dtype(grad_y, dtype, op, "grad_y");
    fastasr::check(has_sizes(grad_y, {B, T, H, E}), op, "grad_y is not (B, T, H, E)");
    check_contiguous(grad_y, op, "grad_y");
    check_dtype(lse, compute_type(dtype), op, "lse");
    fastasr::check(has_sizes(lse, {B, H, T}), op, "lse is not (B, H, T)");
    check_contiguous(lse, op, "lse");
    check_dtype(remainder, dtype, op, "remainder");
    check_contiguous(remainder, op, "remainder");
  }
};

}  // namespace fastasr::bindings::rel_attention
