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
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
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

// Rounds to a number of T.
template <typename T>
double rounded(double v) {
  return value(make<T>(v));
}
using Rounding = double (*)(double);

// xorshift64* gives the same numbers everywhere. With the rounding of a narrow type, a case in double has its numbers.
class Random {
 public:
  explicit Random(uint64_t seed, Rounding rounding = nullptr)
      : state_(seed * 0x9e3779b97f4a7c15ull + 1), rounding_(rounding) {}
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
  double rounded(double v) const { return rounding_ ? rounding_(v) : v; }

 private:
  uint64_t state_;
  Rounding rounding_;
};

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

// EXPECT(out, i, expected, computed) compares element i of an output within error_bound(), and EXPECT_WITHIN(out, i,
// expected, bound) within an error of `bound`. Infinities are equal or different.
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

// A sum and the size of its terms, against which its rounding errors are measured.
struct Sum {
  long double value = 0, size = 0;
  void add(long double term, long double of) { value += term, size += of; }
  void add(long double term) { add(term, std::fabs(term)); }
};

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
    for (int64_t i = 0; i < n_; i++) (*this)[i] = make<T>(random.rounded(random.normal() * scale + shift));
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

// The rounding of T in units of that of its compute type.
template <typename T>
constexpr double kStored = Type<T>::half_ulp / Type<compute_t<T>>::half_ulp;

// A case has its outputs() as a tuple of references to Buffers.
template <typename... B>
bool same_outputs(const std::tuple<B&...>& a, const std::tuple<B&...>& b) {
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return (std::get<I>(a).equals(std::get<I>(b)) && ...);
  }(std::index_sequence_for<B...>());
}

// Compares an output of a case of T with that of the same case in double: within `units` roundings of T's compute type
// at the largest element, and the rounding of the output itself. The contract of the op in Python checks the formula
// behind both; here every type is checked on every instruction set, at more sizes.
template <typename T, typename U>
void expect_like(const char* name, Buffer<U>& got, Buffer<double>& exact, double units) {
  double largest = 0.1;
  for (int64_t i = 0; i < exact.size(); i++)
    if (std::isfinite(exact[i])) largest = std::max(largest, std::fabs(exact[i]));
  const double room = units * Type<compute_t<T>>::half_ulp * largest;
  CHECK(got.size() == exact.size(), "%s", name);
  for (int64_t i = 0; i < got.size(); i++) expect_within(name, got[i], i, exact[i], room + error_bound<U>(exact[i], 0));
}
template <typename T, typename... A, typename... B>
void expect_like(const std::tuple<A&...>& got, const std::tuple<B&...>& exact, double units) {
  [&]<size_t... I>(std::index_sequence<I...>) {
    (expect_like<T>(formatted("output %zu", I).c_str(), std::get<I>(got), std::get<I>(exact), units), ...);
  }(std::index_sequence_for<A...>());
}

// Compares a Case<T>(given..., rounding), whose run(step) computes outputs() by pieces of `step`, with the same in
// double, and to the bit with itself in other pieces.
template <template <typename> typename Case, typename T, typename... A>
void like_double_in_any_pieces(int64_t step, double units, const A&... given) {
  Case<T> k{given..., rounded<T>}, other{given..., rounded<T>};
  Case<double> exact{given..., rounded<T>};
  k.run(step), other.run(1), exact.run(1);
  expect_like<T>(k.outputs(), exact.outputs(), units);
  CHECK(same_outputs(k.outputs(), other.outputs()), "the pieces of work show");
}

// Runs f(0), ..., f(n - 1) in n threads.
template <typename F>
void on_threads(int64_t n, const F& f) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < n; i++) threads.emplace_back([&f, i] { f(i); });
  for (std::thread& thread : threads) thread.join();
}

// Implements cpu::Workers::run.
inline void run_threads(int64_t parts, void (*part)(const void*, int64_t), const void* context) {
  on_threads(parts, [&](int64_t i) { part(context, i); });
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
