// SPDX-License-Identifier: Apache-2.0
// `make op OP=rnnt_lattice` writes this file from fastasr/ops/rnnt_lattice.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::rnnt_lattice {

struct RnntLatticeForward {
  static constexpr const char* kName = "rnnt_lattice_forward";
  using Types = ArgumentTypes<Tensor, Tensor, Optional, bool>;

  const Tensor& symbol_logprobs;
  const Tensor& blank_logprobs;
  const Optional& boundary;
  bool keep;

  // The sizes, once the arguments are checked.
  int64_t B{};
  int64_t S{};
  int64_t W{};
  int64_t T{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    const ScalarType dtype = floating_dtype(symbol_logprobs, op, "symbol_logprobs");
    {
      const Sizes shape = symbol_logprobs.sizes();
      bool right = false;
      if (shape.size() == 3) {
        B = shape[0];
        S = shape[1];
        W = shape[2];
        right = true;
      }
      fastasr::check(right, op, "symbol_logprobs is not (B, S, W)");
    }
    check_contiguous(symbol_logprobs, op, "symbol_logprobs");
    check_dtype(blank_logprobs, dtype, op, "blank_logprobs");
    {
      const Sizes shape = blank_logprobs.sizes();
      bool right = false;
      if (shape.size() == 3) {
        T = shape[2];
        right = shape[0] == B && shape[1] == S + 1;
      }
      fastasr::check(right, op, "blank_logprobs is not (B, S+1, T)");
    }
    check_contiguous(blank_logprobs, op, "blank_logprobs");
    if (boundary) {
      check_dtype(*boundary, ScalarType::Long, op, "boundary");
      fastasr::check(has_sizes(*boundary, {B, 4}), op, "boundary is not (B, 4)");
      check_contiguous(*boundary, op, "boundary");
    }
  }
};

struct RnntLatticeBackward {
  static constexpr const char* kName = "rnnt_lattice_backward";
  using Types = ArgumentTypes<Optional, Tensor, Tensor, Optional, int64_t, int64_t, int64_t>;

  const Optional& grad_scores;
  const Tensor& scores;
  const Tensor& shares;
  const Optional& boundary;
  int64_t S;
  int64_t W;
  int64_t T;

  // The sizes, once the arguments are checked.
  int64_t B{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(S >= 0, op, "S");
    fastasr::check(W >= 0, op, "W");
    fastasr::check(T >= 0, op, "T");
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
    if (boundary) {
      check_dtype(*boundary, ScalarType::Long, op, "boundary");
      fastasr::check(has_sizes(*boundary, {B, 4}), op, "boundary is not (B, 4)");
      check_contiguous(*boundary, op, "boundary");
    }
  }
};

}  // namespace fastasr::bindings::rnnt_lattice
