// SPDX-License-Identifier: Apache-2.0
// `make op OP=rnnt_pruned_lattice` writes this file from fastasr/ops/rnnt_pruned_lattice.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::rnnt_pruned_lattice {

struct RnntPrunedLatticeForward {
  static constexpr const char* kName = "rnnt_pruned_lattice_forward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Optional, bool, bool>;

  const Tensor& symbol_logprobs;
  const Tensor& blank_logprobs;
  const Tensor& starts;
  const Optional& boundary;
  bool modified;
  bool keep;

  // The sizes, once the arguments are checked.
  int64_t B{};
  int64_t T{};
  int64_t R{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    const ScalarType dtype = floating_dtype(symbol_logprobs, op, "symbol_logprobs");
    {
      const Sizes shape = symbol_logprobs.sizes();
      bool right = false;
      if (shape.size() == 3) {
        B = shape[0];
        T = shape[1];
        R = shape[2];
        right = R >= 1;
      }
      fastasr::check(right, op, "symbol_logprobs is not (B, T, R), R >= 1");
    }
    check_contiguous(symbol_logprobs, op, "symbol_logprobs");
    check_dtype(blank_logprobs, dtype, op, "blank_logprobs");
    fastasr::check(has_sizes(blank_logprobs, {B, T, R}), op, "blank_logprobs is not (B, T, R)");
    check_contiguous(blank_logprobs, op, "blank_logprobs");
    check_dtype(starts, ScalarType::Long, op, "starts");
    fastasr::check(has_sizes(starts, {B, T}), op, "starts is not (B, T)");
    check_contiguous(starts, op, "starts");
    if (boundary) {
      check_dtype(*boundary, ScalarType::Long, op, "boundary");
      fastasr::check(has_sizes(*boundary, {B, 4}), op, "boundary is not (B, 4)");
      check_contiguous(*boundary, op, "boundary");
    }
  }
};

struct RnntPrunedLatticeBackward {
  static constexpr const char* kName = "rnnt_pruned_lattice_backward";
  using Types = ArgumentTypes<Optional, Tensor, Tensor, Tensor, Optional, int64_t, bool>;

  const Optional& grad_scores;
  const Tensor& scores;
  const Tensor& shares;
  const Tensor& starts;
  const Optional& boundary;
  int64_t R;
  bool modified;

  // The sizes, once the arguments are checked.
  int64_t B{};
  int64_t T{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(R >= 0, op, "R");
    const ScalarType dtype = floating_dtype(scores, op, "scores");
    {
      const Sizes shape = scores.sizes();
      bool right = false;
      if (shape.size() == 1) {
        B = shape[0];
        right = true;
      }
      fastasr::check(right, op, "scores is not (B)");
    }
    check_contiguous(scores, op, "scores");
    if (grad_scores) {
      check_dtype(*grad_scores, compute_type(dtype), op, "grad_scores");
      fastasr::check(has_sizes(*grad_scores, {B}), op, "grad_scores is not (B)");
      check_contiguous(*grad_scores, op, "grad_scores");
    }
    check_dtype(shares, compute_type(dtype), op, "shares");
    check_contiguous(shares, op, "shares");
    check_dtype(starts, ScalarType::Long, op, "starts");
    {
      const Sizes shape = starts.sizes();
      bool right = false;
      if (shape.size() == 2) {
        T = shape[1];
        right = shape[0] == B;
      }
      fastasr::check(right, op, "starts is not (B, T)");
    }
    check_contiguous(starts, op, "starts");
    if (boundary) {
      check_dtype(*boundary, ScalarType::Long, op, "boundary");
      fastasr::check(has_sizes(*boundary, {B, 4}), op, "boundary is not (B, 4)");
      check_contiguous(*boundary, op, "boundary");
    }
  }
};

}  // namespace fastasr::bindings::rnnt_pruned_lattice
