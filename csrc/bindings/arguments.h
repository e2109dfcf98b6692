// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <functional>
#include <limits>
#include <numeric>

#include "bindings/dispatch.h"
#include "cpu/support/sequence.h"

// The structs in bindings/written need these: a struct holds the arguments of one operator and checks them.
namespace fastasr {

// What an operator's arguments are on the stack.
template <typename... T>
struct ArgumentTypes {
  static constexpr uint64_t kCount = sizeof...(T);
  template <typename R>
  static std::string schema(const char* name) {
    return Results<R>::schema(name, {kSchemaType<T>...});
  }
};

inline int64_t product(Sizes sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<int64_t>());
}

template <typename T>
cpu::Sequence<const T> sequence(const Tensor& t) {
  return {data<T>(t), t.stride(0), t.stride(1)};
}

// Returns t's dtype if kernels compute it.
ScalarType floating_dtype(const Tensor& t, const char* op, const char* name);
void check_dtype(const Tensor& t, ScalarType dtype, const char* op, const char* name);
void check_contiguous(const Tensor& t, const char* op, const char* name);
// The last dimension is dense, the strides of the others are t's own.
void check_dense_channels(const Tensor& t, const char* op, const char* name);
bool has_sizes(const Tensor& t, Sizes first, std::initializer_list<int64_t> last);

// Checks the arguments of a function that another one calls.
template <typename A>
A&& checked(A&& a) {
  a.check();
  return std::forward<A>(a);
}

// Does what Boxed does for a function that takes a written struct, and checks the arguments before the call.
template <auto kFunction>
struct BoxedStruct;
template <typename R, typename A, R (*kFunction)(const A&)>
struct BoxedStruct<kFunction> {
  using Types = typename A::Types;
  static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    if (arguments != Types::kCount || results != Results<R>::kCount) wrong_count(arguments, results);
    on(stack, Types(), std::make_index_sequence<Types::kCount>());
  }
  static constexpr Operator kOperator{A::kName, call, Types::template schema<R>};

 private:
  template <typename... T, size_t... I>
  static void on(StableIValue* stack, ArgumentTypes<T...>, std::index_sequence<I...>) {
    A a{torch::stable::detail::to<T>(stack[I])...};  // its references keep their tensors as long as `a` lives
    a.check();
    Results<R>::put(stack, kFunction(a));
  }
};
template <auto kFunction>
inline constexpr Operator written = BoxedStruct<kFunction>::kOperator;

}  // namespace fastasr
