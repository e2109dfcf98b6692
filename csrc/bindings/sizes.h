// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace fastasr {

inline bool has_sizes(const torch::stable::Tensor& t, std::initializer_list<int64_t> sizes) {
  return t.dim() == static_cast<int64_t>(sizes.size()) && std::equal(sizes.begin(), sizes.end(), t.sizes().data());
}

}  // namespace fastasr
