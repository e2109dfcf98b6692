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

}  // namespace fastasr
