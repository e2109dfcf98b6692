// SPDX-License-Identifier: Apache-2.0
// `make op OP=segment_attention` writes this file from fastasr/ops/segment_attention.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::segment_attention {

// Finds the sizes Q, K, lanes, which other arguments give. The binding defines it.
template <typename A>
void find_sizes(A& a);

struct SegmentAttentionForward {
  static constexpr const char* kName = "segment_attention_forward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Optional, Optional, Optional, int64_t, int64_t, int64_t, int64_t,
                              int64_t, int64_t, int64_t, int64_t>;

  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  const Optional& lengths;
  const Optional& history;
  const Optional& weights_dropout;
  int64_t num_heads;
  int64_t frames;
  int64_t segment_length;
  int64_t left_context_length;
  int64_t right_context_length;
  int64_t max_memory_size;
  int64_t past_frames;
  int64_t past_memory;

  // The sizes, once the arguments are checked.
  int64_t Q{};
  int64_t K{};
  int64_t lanes{};
  int64_t N{};
  int64_t B{};
  int64_t D{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(num_heads >= 1, op, "num_heads: expected at least 1");
    fastasr::check(frames >= 0, op, "frames: expected at least 0");
    fastasr::check(segment_length >= 1, op, "segment_length: expected at least 1");
    fastasr::check(left_context_length >= 0, op, "left_context_length: expected at least 0");
    fastasr::check(right_context_length >= 0, op, "right_context_length: expected at least 0");
    fastasr::check(max_memory_size >= 0, op, "max_memory_size: expected at least 0");
    fastasr::check(past_frames >= 0, op, "past_frames: expected at least 0");
    fastasr::check(past_memory >= 0, op, "past_memory: expected at least 0");
    const ScalarType dtype = floating_dtype(query, op, "query");
    {
      const Sizes shape = query.sizes();
      bool right = false;
      if (shape.size() == 3) {
        N = shape[0];
        B = shape[1];
        D = shape[2] / num_heads;
        right = shape[2] % num_heads == 0 && D >= 1;
      }
      fastasr::check(right, op, "query is not (N, B, num_heads*D), D >= 1");
    }
    check_dense_channels(query, op, "query");
    find_sizes(*this);
    check_dtype(key, dtype, op, "key");
    fastasr::check(has_sizes(key, {K, B, num_heads * D}), op, "key is not (K, B, num_heads*D)");
    check_dense_channels(key, op, "key");
    check_dtype(value, dtype, op, "value");
    fastasr::check(has_sizes(value, {K, B, num_heads * D}), op, "value is not (K, B, num_heads*D)");
    check_dense_channels(value, op, "value");
    if (lengths) {
      check_dtype(*lengths, ScalarType::Long, op, "lengths");
      fastasr::check(has_sizes(*lengths, {B}), op, "lengths is not (B)");
      check_contiguous(*lengths, op, "lengths");
    }
    if (history) {
      check_dtype(*history, ScalarType::Long, op, "history");
      fastasr::check(has_sizes(*history, {2}), op, "history is not (2)");
      check_contiguous(*history, op, "history");
    }
    if (weights_dropout) {
      check_dtype(*weights_dropout, compute_type(dtype), op, "weights_dropout");
      fastasr::check(has_sizes(*weights_dropout, {B, num_heads, Q, lanes}), op,
                     "weights_dropout is not (B, num_heads, Q, lanes)");
      check_contiguous(*weights_dropout, op, "weights_dropout");
    }
  }
};

struct SegmentAttentionBackward {
  static constexpr const char* kName = "segment_attention_backward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Tensor, Optional, Optional, Optional, int64_t, int64_t, int64_t,
                              int64_t, int64_t, int64_t, int64_t, int64_t>;

  const Tensor& grad_y;
  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  const Optional& lengths;
  const Optional& history;
  const Optional& weights_dropout;
  int64_t num_heads;
  int64_t frames;
  int64_t segment_length;
  int64_t left_context_length;
  int64_t right_context_length;
  int64_t max_memory_size;
  int64_t past_frames;
  int64_t past_memory;

  // The sizes, once the arguments are checked.
  int64_t Q{};
  int64_t K{};
  int64_t lanes{};
  int64_t N{};
  int64_t B{};
  int64_t D{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(num_heads >= 1, op, "num_heads: expected at least 1");
    fastasr::check(frames >= 0, op, "frames: expected at least 0");
    fastasr::check(segment_length >= 1, op, "segment_length: expected at least 1");
    fastasr::check(left_context_length >= 0, op, "left_context_length: expected at least 0");
    fastasr::check(right_context_length >= 0, op, "right_context_length: expected at least 0");
    fastasr::check(max_memory_size >= 0, op, "max_memory_size: expected at least 0");
    fastasr::check(past_frames >= 0, op, "past_frames: expected at least 0");
    fastasr::check(past_memory >= 0, op, "past_memory: expected at least 0");
    const ScalarType dtype = floating_dtype(query, op, "query");
    {
      const Sizes shape = query.sizes();
      bool right = false;
      if (shape.size() == 3) {
        N = shape[0];
        B = shape[1];
        D = shape[2] / num_heads;
        right = shape[2] % num_heads == 0 && D >= 1;
      }
      fastasr::check(right, op, "query is not (N, B, num_heads*D), D >= 1");
    }
    check_dense_channels(query, op, "query");
    find_sizes(*this);
    check_dtype(key, dtype, op, "key");
    fastasr::check(has_sizes(key, {K, B, num_heads * D}), op, "key is not (K, B, num_heads*D)");
    check_dense_channels(key, op, "key");
    check_dtype(value, dtype, op, "value");
    fastasr::check(has_sizes(value, {K, B, num_heads * D}), op, "value is not (K, B, num_heads*D)");
    check_dense_channels(value, op, "value");
    if (lengths) {
      check_dtype(*lengths, ScalarType::Long, op, "lengths");
      fastasr::check(has_sizes(*lengths, {B}), op, "lengths is not (B)");
      check_contiguous(*lengths, op, "lengths");
    }
    if (history) {
      check_dtype(*history, ScalarType::Long, op, "history");
      fastasr::check(has_sizes(*history, {2}), op, "history is not (2)");
      check_contiguous(*history, op, "history");
    }
    if (weights_dropout) {
      check_dtype(*weights_dropout, compute_type(dtype), op, "weights_dropout");
      fastasr::check(has_sizes(*weights_dropout, {B, num_heads, Q, lanes}), op,
                     "weights_dropout is not (B, num_heads, Q, lanes)");
      check_contiguous(*weights_dropout, op, "weights_dropout");
    }
    check_dtype(grad_y, dtype, op, "grad_y");
    fastasr::check(has_sizes(grad_y, {N, B, num_heads * D}), op, "grad_y is not (N, B, num_heads*D)");
    check_dense_channels(grad_y, op, "grad_y");
  }
};

}  // namespace fastasr::bindings::segment_attention
