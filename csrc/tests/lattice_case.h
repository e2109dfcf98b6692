// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tests/check.h"

// What the tests of the lattices share.
namespace fastasr::test {

inline constexpr double kInf = std::numeric_limits<double>::infinity();

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

// Compares gradients in rows of `columns`, `distance` apart, with those in double.
template <typename C>
void expect_rows(const char* name, Buffer<C>& got, Buffer<double>& exact, int64_t columns, int64_t distance,
                 double allowed) {
  for (int64_t i = 0; i < got.size(); i++)
    if (i % distance < columns)
      expect_within(name, got[i], i, exact[i], allowed);
    else
      CHECK(got.unset(i), "%s: wrote between rows", name);
}

}  // namespace fastasr::test
