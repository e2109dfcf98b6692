// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bindings/dispatch.h"
#include "cpu/support/buffer_pool.h"

namespace fastasr {

// Makes a tensor of t's dtype, or of float32. From 64 KiB on it takes its memory from the pool and gives it back when
// it is freed: fresh memory costs a page fault every 4 KiB. On one Zen 5 core of a virtual machine SwooshL of 46 MB
// takes 24 ms into fresh memory and 2.7 ms into a buffer that was used before. The first stride is the largest one.
Tensor new_pooled(const Tensor& t, Sizes sizes, Sizes strides, bool floats = false);
// Makes a contiguous tensor of one dimension or more in the same way.
Tensor new_pooled(const Tensor& t, Sizes sizes, bool floats = false);
// Does the same with a contiguous tensor's sizes.
Tensor new_pooled_like(const Tensor& t);

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
