// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bindings/dispatch.h"
#include "cpu/support/buffer_pool.h"

namespace fastasr {

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
