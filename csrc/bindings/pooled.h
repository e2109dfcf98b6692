// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>

#include "bindings/dispatch.h"
#include "cpu/support/buffer_pool.h"

namespace fastasr {

// Makes a contiguous tensor of t's dtype, or of float32. A large one takes its memory from the pool and gives it back
// when it is freed: fresh memory costs a page fault every 4 KiB.
template <size_t kDim>
Tensor new_pooled(const Tensor& t, const std::array<int64_t, kDim>& sizes, bool floats = false) {
  const ScalarType dtype = floats ? ScalarType::Float : t.scalar_type();
  std::array<int64_t, kDim> strides;
  int64_t elements = 1;
  for (size_t d = kDim; d-- > 0;) strides[d] = std::max<int64_t>(1, elements), elements *= sizes[d];
  const size_t bytes = static_cast<size_t>(elements) * (floats ? sizeof(float) : t.element_size());
  if (bytes < (size_t{1} << 20)) return new_strided(t, kDim, sizes.data(), strides.data(), dtype);
  void* memory = cpu::acquire_buffer(bytes);
  if (!memory) out_of_memory(bytes);
  return torch::stable::from_blob(memory, {sizes.data(), kDim}, {strides.data(), kDim}, t.device(), dtype,
                                  [](void* p) { cpu::release_buffer(p); });
}

// Does the same with a contiguous tensor's sizes, from 8 MiB on: below that, the allocator mostly keeps its memory. On
// one Zen 5 core of a virtual machine SwooshL of 46 MB takes 24 ms into fresh memory and 2.7 ms into a buffer that was
// used before.
inline Tensor new_pooled_like(const Tensor& t) {
  const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
  if (bytes < (size_t{8} << 20)) return new_like(t);
  void* memory = cpu::acquire_buffer(bytes);
  if (!memory) out_of_memory(bytes);
  return torch::stable::from_blob(memory, t.sizes(), t.strides(), t.device(), t.scalar_type(),
                                  [](void* p) { cpu::release_buffer(p); });
}

// Holds memory that a call may write to and throw away, aligned to 64 bytes.
template <typename C>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<C*>(cpu::acquire_buffer(sizeof(C) * static_cast<size_t>(n)))) {
    if (!data_) out_of_memory(sizeof(C) * static_cast<size_t>(n));
  }
  ~Scratch() { cpu::release_buffer(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  C* data() const { return data_; }

 private:
  C* data_;
};

}  // namespace fastasr
