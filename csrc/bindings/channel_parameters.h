// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bindings/dispatch.h"

namespace fastasr {

// Checks that t holds one value per channel, in the dtype that T is computed in.
template <typename T>
void check_vector(const Tensor& t, int64_t channels, const char* op, const char* name) {
  check(is_dense(t, kComputeType<T>, {channels}), op, name,
        " is not a contiguous vector of the channels in the dtype that is computed in");
}

// Checks the taps of a depthwise convolution over time that keeps the length: (C, 1, K) or (C, K), K odd.
template <typename T>
void check_taps(const Tensor& t, int64_t channels, const char* op) {
  const int64_t dim = t.dim();
  check(dtype_of(t) == kComputeType<T> && t.is_contiguous(), op,
        "weight is not contiguous or not of the dtype that is computed in");
  check((dim == 2 || (dim == 3 && t.size(1) == 1)) && t.size(0) == channels && t.size(dim - 1) % 2 == 1, op,
        "weight is not (C, 1, K) or (C, K) with an odd number of taps");
}

}  // namespace fastasr
