// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#define DOCTEST_CONFIG_NO_SHORT_MACRO_NAMES
#include <doctest/doctest.h>

#include "cpu/math/number.h"

// The tests share this: checks, random values, buffers that notice a write outside, and tolerances per storage type.
namespace fastasr::test {

using cpu::bfloat16;
using cpu::compute_t;
using cpu::float16;

inline int failures = 0;

__attribute__((format(printf, 1, 2))) inline std::string formatted(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return text;
}

// CHECK(condition, format, values...) reports at most twenty failures of a program; doctest's own CHECK costs too much
// for a check per element.
#define CHECK(condition, ...)                                                       \
  do {                                                                              \
    if (!(condition) && ++fastasr::test::failures <= 20)                            \
      DOCTEST_FAIL_CHECK(#condition "\n" << fastasr::test::formatted(__VA_ARGS__)); \
  } while (false)
#define TEST_CASE DOCTEST_TEST_CASE

// xorshift64* gives the same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 1) {}
  uint64_t bits() {
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1dull;
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }  // [0, 1)
  double normal() {                                                         // sum of twelve uniforms
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += uniform();
    return sum;
  }

 private:
  uint64_t state_;
};

template <typename T>
T make(double v) {
  T out;
  cpu::store(&out, static_cast<compute_t<T>>(v));
  return out;
}
template <typename T>
double value(T v) {
  return static_cast<double>(cpu::load(v));
}
template <typename T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <typename T>
struct Type;
template <>
struct Type<float> {
  static constexpr const char* name = "float";
  static constexpr double half_ulp = 0x1p-24, smallest = 0x1p-149, largest = 0x1.fffffep127;
};
template <>
struct Type<double> {
  static constexpr const char* name = "double";
  static constexpr double half_ulp = 0x1p-53, smallest = 0x1p-1074, largest = std::numeric_limits<double>::max();
};
template <>
struct Type<bfloat16> {
  static constexpr const char* name = "bfloat16";
  static constexpr double half_ulp = 0x1p-8, smallest = 0x1p-133, largest = 0x1.fep127;
};
template <>
struct Type<float16> {
  static constexpr const char* name = "float16";
  static constexpr double half_ulp = 0x1p-11, smallest = 0x1p-24, largest = 65504;
};

template <typename F>
void for_each_type(const F& f) {
  f.template operator()<float>();
  f.template operator()<double>();
  f.template operator()<bfloat16>();
  f.template operator()<float16>();
}

// |got - expected| within the error of the computation (`computed`, in units of the compute type's rounding) and of one
// rounding to T.
template <typename T>
bool close(T got, long double expected, long double computed) {
  const long double error = std::fabs(static_cast<long double>(value(got)) - expected);
  const long double unit = Type<compute_t<T>>::half_ulp;
  return error <= computed * unit + std::fabs(expected) * Type<T>::half_ulp + Type<T>::smallest;
}

// Returns the slope of f() in the number that it reads at `at`, by a central difference.
template <typename F>
double slope(double* at, const F& f) {
  const double saved = *at, step = 1e-5;
  *at = saved + step;
  const double above = f();
  *at = saved - step;
  const double below = f();
  *at = saved;
  return (above - below) / (2 * step);
}

// Holds n elements, `offset` elements after an aligned address. Under the address sanitizer the memory ends with the
// last element; without it, intact() checks the elements before and behind.
template <typename T>
class Buffer {
 public:
#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kGuard = 0;
#else
  static constexpr int64_t kGuard = 64;
#endif
  explicit Buffer(int64_t n, int64_t offset = 0)
      : n_(n), begin_(offset + kGuard), memory_(new T[static_cast<size_t>(begin_ + n + kGuard)]) {
    std::memset(static_cast<void*>(memory_.get()), 0x5a, sizeof(T) * static_cast<size_t>(begin_ + n + kGuard));
  }
  T* data() { return memory_.get() + begin_; }
  T& operator[](int64_t i) { return data()[i]; }
  int64_t size() const { return n_; }
  bool intact() const {
    const auto* bytes = reinterpret_cast<const unsigned char*>(memory_.get());
    for (size_t i = 0; i < sizeof(T) * static_cast<size_t>(begin_); i++)
      if (bytes[i] != 0x5a) return false;
    for (size_t i = sizeof(T) * static_cast<size_t>(begin_ + n_), end = i + sizeof(T) * kGuard; i < end; i++)
      if (bytes[i] != 0x5a) return false;
    return true;
  }
  void fill(Random& random, double scale = 1, double shift = 0) {
    for (int64_t i = 0; i < n_; i++) (*this)[i] = make<T>(random.normal() * scale + shift);
  }
  bool equals(Buffer& other) { return std::memcmp(data(), other.data(), sizeof(T) * static_cast<size_t>(n_)) == 0; }

 private:
  int64_t n_, begin_;
  std::unique_ptr<T[]> memory_;
};

// These sizes lie around every vector width and its tails.
inline constexpr int64_t kSizes[] = {0,  1,  2,  3,  5,  7,  8,  9,   15,  16,  17,
                                     31, 32, 33, 47, 63, 64, 65, 127, 192, 257, 1031};

}  // namespace fastasr::test
