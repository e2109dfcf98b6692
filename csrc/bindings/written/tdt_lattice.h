// SPDX-License-Identifier: Apache-2.0
// `make op OP=tdt_lattice` writes this file from fastasr/ops/tdt_lattice.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::tdt_lattice {

struct TdtLatticeForward {
  static constexpr const char* kName = "tdt_lattice_forward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Tensor, Optional, bool>;

  const Tensor& symbol_logprobs;
  const Tensor& blank_logprobs;
  const Tensor& duration_logprobs;
  const Tensor& durations;
  const Optional& boundary;
  bool keep;

  // The sizes, once the arguments are checked.
  int64_t B{};
  int64_t T{};
  int64_t S{};
  int64_t N{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    const ScalarType dtype = floating_dtype(symbol_logprobs, op, "symbol_logprobs");
    {
      const Sizes shape = symbol_logprobs.sizes();
      bool right = false;
      if (shape.size() == 3) {
        B = shape[0];
        T = shape[1];
        S = shape[2];
        right = true;
      }
      fastasr::check(right, op, "symbol_logprobs is not (B, T, S)");
    }
    check_contiguous(symbol_logprobs, op, "symbol_logprobs");
    check_dtype(blank_logprobs, dtype, op, "blank_logprobs");
    fastasr::check(has_sizes(blank_logprobs, {B, T, S + 1}), op, "blank_logprobs is not (B, T, S+1)");
    check_contiguous(blank_logprobs, op, "blank_logprobs");
    check_dtype(duration_logprobs, dtype, op, "duration_logprobs");
    {
      const Sizes shape = duration_logprobs.sizes();
      bool right = false;
      if (shape.size() == 4) {
        N = shape[3];
        right = shape[0] == B && shape[1] == T && shape[2] == S + 1;
      }
      fastasr::check(right, op, "duration_logprobs is not (B, T, S+1, N)");
    }
    check_contiguous(duration_logprobs, op, "duration_logprobs");
    check_dtype(durations, ScalarType::Long, op, "durations");
    fastasr::check(has_sizes(durations, {N}), op, "durations is not (N)");
    check_contiguous(durations, op, "durations");
    if (boundary) {
      check_dtype(*boundary, ScalarType::Long, op, "boundary");
      fastasr::check(has_sizes(*boundary, {B, 4}), op, "boundary is not (B, 4)");
      check_contiguous(*boundary, op, "boundary");
    }
  }
};

struct TdtLatticeBackward {
  static constexpr const char* kName = "tdt_lattice_backward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Tensor, Optional, int64_t, int64_t>;

  const Tensor& grad_scores;
  const Tensor& scores;
  const Tensor& shares;
  const Tensor& durations;
  const Optional& boundary;
  int64_t T;
  int64_t S;

  // The sizes, once the arguments are checked.
  int64_t B{};
  int64_t N{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    fastasr::check(T >= 0, op, "T");
    fastasr::check(S >= 0, op, "S");
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
    check_dtype(grad_scores, compute_type(dtype), op, "grad_scores");
    fastasr::check(has_sizes(grad_scores, {B}), op, "grad_scores is not (B)");
    check_contiguous(grad_scores, op, "grad_scores");
    check_dtype(shares, compute_type(dtype), op, "shares");
    check_contiguous(shares, op, "shares");
    check_dtype(durations, ScalarType::Long, op, "durations");
    {
      const Sizes shape = durations.sizes();
      bool right = false;
      if (shape.size() == 1) {
        N = shape[0];
        right = true;
      }
      fastasr::check(right, op, "durations is not (N)");
    }
    check_contiguous(durations, op, "durations");
    if (boundary) {
      check_dtype(*boundary, ScalarType::Long, op, "boundary");
      fastasr::check(has_sizes(*boundary, {B, 4}), op, "boundary is not (B, 4)");
      check_contiguous(*boundary, op, "boundary");
    }
  }
};

}  // namespace fastasr::bindings::tdt_lattice
