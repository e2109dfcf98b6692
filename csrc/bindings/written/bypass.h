// SPDX-License-Identifier: Apache-2.0
// `make op OP=bypass` writes this file from fastasr/ops/bypass.py: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::bypass {

struct BypassForward {
  static constexpr const char* kName = "bypass_forward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor>;

  const Tensor& x_orig;
  const Tensor& x;
  const Tensor& scale;

  // The sizes, once the arguments are checked.
  Sizes S{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    const ScalarType dtype = floating_dtype(x_orig, op, "x_orig");
    S = x_orig.sizes();
    check_contiguous(x_orig, op, "x_orig");
    check_dtype(x, dtype, op, "x");
    fastasr::check(has_sizes(x, S, {}), op, "x is not (*S)");
    check_contiguous(x, op, "x");
    check_dtype(scale, dtype, op, "scale");
    check_contiguous(scale, op, "scale");
  }
};

struct BypassBackward {
  static constexpr const char* kName = "bypass_backward";
  using Types = ArgumentTypes<Tensor, Tensor, Tensor, Tensor>;

  const Tensor& grad_y;
  const Tensor& x_orig;
  const Tensor& x;
  const Tensor& scale;

  // The sizes, once the arguments are checked.
  Sizes S{};

  // Declines the call if an argument does not fit the declaration.
  void check(const char* op = kName) {
    const ScalarType dtype = floating_dtype(x_orig, op, "x_orig");
    S = x_orig.sizes();
    check_contiguous(x_orig, op, "x_orig");
    check_dtype(x, dtype, op, "x");
    fastasr::check(has_sizes(x, S, {}), op, "x is not (*S)");
    check_contiguous(x, op, "x");
    check_dtype(scale, dtype, op, "scale");
    check_contiguous(scale, op, "scale");
    check_dtype(grad_y, dtype, op, "grad_y");
    fastasr::check(has_sizes(grad_y, S, {}), op, "grad_y is not (*S)");
    check_contiguous(grad_y, op, "grad_y");
  }
};

}  // namespace fastasr::bindings::bypass
