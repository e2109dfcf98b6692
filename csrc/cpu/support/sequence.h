// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/simd.h"

namespace fastasr::cpu {

// (time, batch, channel) with dense channels.
template <typename T>
struct Sequence {
  T* data = nullptr;
  int64_t time = 0, batch = 0;
  FASTASR_MEMBER T* at(int64_t t, int64_t b) const { return data + t * time + b * batch; }
};

}  // namespace fastasr::cpu
