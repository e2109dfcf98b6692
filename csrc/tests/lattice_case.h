// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tests/check.h"

// What the tests of the lattices share.
namespace fastasr::test {

inline constexpr double kInf = std::numeric_limits<double>::infinity();

inline double log_add(double a, double b) {
  const double m = std::max(a, b);
  return m == -kInf ? m : m + std::log(std::exp(a - m) + std::exp(b - m));
}

// Memory of NaNs aligned to 64 bytes; Buffer checks what is behind it.
template <typename C>
class Aligned {
 public:
  explicit Aligned(int64_t n) : buffer_(n + 64) { buffer_.set(std::numeric_limits<double>::quiet_NaN()); }
  operator C*() {
    const auto address = reinterpret_cast<uintptr_t>(buffer_.data());
    return buffer_.data() + (64 - address % 64) % 64 / sizeof(C);
  }

 private:
  Buffer<C> buffer_;
};

}  // namespace fastasr::test
