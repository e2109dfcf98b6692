// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#define DOCTEST_CONFIG_NO_SHORT_MACRO_NAMES
#include <doctest/doctest.h>

#include "cpu/math/number.h"

// The frame that the tests share. A test fills Buffers, calls a kernel and compares its outputs with a formula in long
// double by EXPECT; a Buffer itself notices a write outside.
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

template <typename... V>
doctest::String joined(const V&... parts) {
  const auto text = [](const auto& v) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(v)>>)
      return formatted("%.9g", static_cast<double>(v));
    else
      return std::string(v);
  };
  return (std::string() + ... + text(parts)).c_str();
}

// CHECK(condition) or CHECK(condition, format, values...) reports at most twenty failures of a program; doctest's own
// CHECK costs too much for a check per element. INFO(values...) says which case runs: a failure in its scope shows it.
#define CHECK(condition, ...)                                                           \
  do {                                                                                  \
    if (!(condition) && ++fastasr::test::failures <= 20)                                \
      DOCTEST_FAIL_CHECK(#condition "\n" << fastasr::test::formatted(" " __VA_ARGS__)); \
  } while (false)
#define INFO(...) DOCTEST_INFO(fastasr::test::joined(__VA_ARGS__))
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

// Returns the error that is allowed: that of the computation (`computed`, in units of the compute type's rounding) and
// one rounding to T.
template <typename T>
long double error_bound(long double expected, long double computed) {
  return computed * Type<compute_t<T>>::half_ulp + std::fabs(expected) * Type<T>::half_ulp + Type<T>::smallest;
}
template <typename T>
bool close(T got, long double expected, long double computed) {
  return std::fabs(value(got) - expected) <= error_bound<T>(expected, computed);
}

// EXPECT(out, i, expected, computed) compares element i of an output as close() does, EXPECT_WITHIN(out, i, expected,
// bound) within an error of `bound`. Infinities are equal or different.
template <typename T>
void expect_within(const char* name, T got, int64_t i, long double expected, long double bound) {
  CHECK(std::isinf(expected) ? value(got) == expected : std::fabs(value(got) - expected) <= bound,
        "%s %s[%ld]: expected %.9Lg, got %.9g", Type<T>::name, name, long(i), expected, value(got));
}
#define EXPECT_WITHIN(out, i, ...) fastasr::test::expect_within(#out, (out)[i], i, __VA_ARGS__)
template <typename T>
void expect(const char* name, T got, int64_t i, long double expected, long double computed) {
  expect_within(name, got, i, expected, error_bound<T>(expected, computed));
}
#define EXPECT(out, i, ...) fastasr::test::expect(#out, (out)[i], i, __VA_ARGS__)

using Reals = std::vector<long double>;

// A sum and the size of its terms, against which its rounding errors are measured.
struct Sum {
  long double value = 0, size = 0;
  void add(long double term, long double of) { value += term, size += of; }
  void add(long double term) { add(term, std::fabs(term)); }
};

// EXPECT_ALL(out, expected, computed) compares a whole output: `computed` is in units of the sizes where `expected`
// holds sums.
template <typename B, typename E>
void expect_all(const char* name, B& out, const std::vector<E>& expected, long double computed) {
  CHECK(out.size() == static_cast<int64_t>(expected.size()), "%s", name);
  for (int64_t i = 0; i < out.size(); i++)
    if constexpr (std::is_same_v<E, Sum>)
      expect(name, out[i], i, expected[i].value, computed * expected[i].size);
    else
      expect(name, out[i], i, expected[i], computed);
}
#define EXPECT_ALL(out, ...) fastasr::test::expect_all(#out, out, __VA_ARGS__)

// Holds n elements, `offset` elements after an aligned address. Under the address sanitizer the memory ends with the
// last element; without it, the elements before and behind are checked when the buffer goes.
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
    std::memset(static_cast<void*>(memory_.get()), kUnset, sizeof(T) * static_cast<size_t>(begin_ + n + kGuard));
  }
  Buffer(int64_t n, int64_t offset, Random& random, double scale = 1, double shift = 0) : Buffer(n, offset) {
    fill(random, scale, shift);
  }
  Buffer(Buffer&&) = default;
  Buffer& operator=(Buffer&&) = default;
  ~Buffer() { CHECK(intact(), "wrote outside %ld elements of %zu bytes", long(n_), sizeof(T)); }

  T* data() { return memory_.get() + begin_; }
  operator T*() { return data(); }
  T& operator[](int64_t i) { return data()[i]; }
  long double operator()(int64_t i) { return value((*this)[i]); }
  int64_t size() const { return n_; }
  bool unset(int64_t i) { return is_unset(memory_.get() + begin_ + i, 1); }  // nobody wrote element i
  bool intact() const {
    return !memory_ || (is_unset(memory_.get(), begin_) && is_unset(&memory_[begin_ + n_], kGuard));
  }
  void set(double v) { std::fill(data(), data() + n_, make<T>(v)); }
  void fill(Random& random, double scale = 1, double shift = 0) {
    for (int64_t i = 0; i < n_; i++) (*this)[i] = make<T>(random.normal() * scale + shift);
  }
  bool equals(Buffer& other) { return std::memcmp(data(), other.data(), sizeof(T) * static_cast<size_t>(n_)) == 0; }

 private:
  static constexpr unsigned char kUnset = 0x5a;
  static bool is_unset(const T* at, int64_t n) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(at);
    return std::all_of(bytes, bytes + sizeof(T) * static_cast<size_t>(n), [](auto b) { return b == kUnset; });
  }
  int64_t n_, begin_;
  std::unique_ptr<T[]> memory_;
};

// Compares a gradient with a central difference of the loss, the sum of y() grad, in the number that y() reads at `at`.
template <typename F>
void expect_slope(const char* name, double* at, double got, Buffer<double>& grad, const F& y) {
  const auto loss = [&](double x) {
    *at = x;
    const auto out = y();
    return std::inner_product(out.begin(), out.end(), grad.data(), 0.0);
  };
  const double saved = *at, step = 1e-5, want = (loss(saved + step) - loss(saved - step)) / (2 * step);
  *at = saved;
  expect_within(name, got, 0, want, 2e-8 * (10 + std::fabs(want)));
}

// Runs f(0), ..., f(n - 1) in n threads.
template <typename F>
void on_threads(int64_t n, const F& f) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < n; i++) threads.emplace_back([&f, i] { f(i); });
  for (std::thread& thread : threads) thread.join();
}

// Calls f(begin, end) for pieces of `step` out of [0, n), as threads take them.
template <typename F>
void in_pieces(int64_t n, int64_t step, const F& f) {
  for (int64_t i = 0; i < n; i += step) f(i, std::min(i + step, n));
}

// ---- formulas of the references

inline long double logistic(long double x) { return 1 / (1 + std::exp(-x)); }

struct Activated {
  long double value, slope;
};
// The activations by their numbers: identity, silu, relu, tanh, gelu.
inline Activated activated(int activation, long double x) {
  const long double s = logistic(x), t = std::tanh(x), below = 0.5L * std::erfc(-x * std::sqrt(0.5L));
  switch (activation) {
    case 1:
      return {x * s, s * (1 + x / (1 + std::exp(x)))};
    case 2:
      return {x > 0 ? x : 0, x > 0 ? 1.0L : 0};
    case 3:
      return {t, 1 / (std::cosh(x) * std::cosh(x))};
    case 4:
      return {x * below, below + x * std::exp(-0.5L * x * x) * 0.39894228040143267794L};
    default:
      return {x, 1};
  }
}

// These sizes lie around every vector width and its tails.
inline constexpr int64_t kSizes[] = {0,  1,  2,  3,  5,  7,  8,  9,   15,  16,  17,
                                     31, 32, 33, 47, 63, 64, 65, 127, 192, 257, 1031};

}  // namespace fastasr::test
