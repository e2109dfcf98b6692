// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/math/number.h"
#include "cpu/rows/sum_blocks.h"

// Every binding needs these: the kernel's storage type for a tensor, checks, and a split of the work that depends on
// the shape alone. Python has already checked the arguments and named them: the checks here guard memory. A check
// that fails declines the call: it throws std::invalid_argument, which Python sees as ValueError, and Python takes
// another path. Any other error, such as a failed allocation, reaches the user.
namespace fastasr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Returns Tensor::scalar_type(), which would be compiled into every file that calls it.
ScalarType dtype_of(const Tensor& t);

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
const T* data_or_null(const Optional& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}
template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <typename T>
T* mutable_or_null(const Tensor& t) {  // null without elements
  return t.numel() ? mutable_data<T>(t) : nullptr;
}

// Declines the call: throws std::invalid_argument with the operator's name and the reason, pieces of text and numbers.
class Piece {
 public:
  Piece(const char* text) : text_(text) {}
  template <std::integral I>
  Piece(I number) : text_(nullptr), number_(static_cast<int64_t>(number)) {}
  std::string text() const { return text_ ? text_ : std::to_string(number_); }

 private:
  const char* text_;
  int64_t number_ = 0;
};
[[noreturn]] void decline(const char* op, std::initializer_list<Piece> reason);

// Raises an error that does not decline, so it reaches the user.
[[noreturn]] void out_of_memory(size_t bytes);

template <typename... Reason>
void check(bool ok, const char* op, Reason... reason) {
  if (!ok) [[unlikely]]
    decline(op, {Piece(reason)...});
}

// Calls f.template operator()<T>() with the kernel type of dtype.
template <typename F>
auto with_kernel_type(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::BFloat16:
      return f.template operator()<cpu::bfloat16>();
    case ScalarType::Half:
      return f.template operator()<cpu::float16>();
    default:
      decline(op, {"unsupported dtype"});
  }
}

// Does the same for kernels that know float and double alone.
template <typename F>
void with_compute_type(ScalarType dtype, const char* op, F&& f) {
  if (dtype == ScalarType::Double) return f.template operator()<double>();
  check(dtype == ScalarType::Float, op, "unsupported dtype");
  f.template operator()<float>();
}

// Calls f.template operator()<T>(kernels) with t's kernel type T and the kernels K of it; of all types, or of float and
// double.
template <template <typename> typename K, typename F>
void with_kernels(const Tensor& t, const char* op, F&& f) {
  with_kernel_type(dtype_of(t), op, [&]<typename T>() { f.template operator()<T>(cpu::kernels<K<T>>()); });
}
template <template <typename> typename K, typename F>
void with_wide_kernels(const Tensor& t, const char* op, F&& f) {
  with_compute_type(dtype_of(t), op, [&]<typename T>() { f.template operator()<T>(cpu::kernels<K<T>>()); });
}

// The dtype that a tensor, or a kernel type, is computed in; parameters are passed in it.
constexpr ScalarType compute_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
template <typename T>
constexpr ScalarType kComputeType = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// Makes a new tensor of t's device, and of its dtype unless another one is given. On the CPU, from 64 KiB on, it takes
// its memory from a pool and gives it back when it is freed: fresh memory costs a page fault every 4 KiB. On one Zen 5
// core of a virtual machine SwooshL of 46 MB takes 24 ms into fresh memory and 2.7 ms into a buffer that was used
// before. torch::stable::empty_like looks its op up by name at every call, which costs more than a small kernel.
Tensor new_strided(const Tensor& t, Sizes sizes, Sizes strides, std::optional<ScalarType> dtype = {});
Tensor new_contiguous(const Tensor& t, Sizes sizes, std::optional<ScalarType> dtype = {});
Tensor new_contiguous(const Tensor& t);  // of t's sizes
Tensor new_like(const Tensor& t);        // with t's sizes and strides
Tensor new_without_elements(const Tensor& t);
Tensor new_like(const Optional& t, const Tensor& other);  // like t; or without elements, of the other's dtype
std::vector<int64_t> contiguous_strides(Sizes sizes);

// Returns the elements from one row to the next of a tensor seen as rows of its last dimension: slices of a wider
// tensor qualify.
int64_t row_stride(const Tensor& t, const char* op, const char* name);

bool has_sizes(const Tensor& t, Sizes sizes);
// Says whether t is contiguous and has this dtype and these sizes.
bool is_dense(const Tensor& t, ScalarType dtype, Sizes sizes);
void check_like(const Tensor& t, const Tensor& reference, const char* op, const char* name);
void check_same_size(const Tensor& t, const Tensor& reference, const char* op, const char* name);

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrain = 16384;

// Refers to a function of (begin, end). Code that takes one is compiled once, not once per function.
class RangeFunction {
 public:
  template <typename F>
  RangeFunction(const F& f)
      : f_(&f), call_([](const void* g, int64_t begin, int64_t end) { (*static_cast<const F*>(g))(begin, end); }) {}
  void operator()(int64_t begin, int64_t end) const { call_(f_, begin, end); }

 private:
  const void* f_;
  void (*call_)(const void*, int64_t, int64_t);
};

// Runs f(begin, end) over [0, n) on torch's own threads, serially when n is small.
void parallel_range(int64_t n, int64_t grain, RangeFunction f);

// Runs f(begin, end) over [0, n), which cost `work` elements each.
void parallel_tasks(int64_t n, int64_t work, RangeFunction f);

// The elements that so many outputs of a depthwise convolution cost.
constexpr int64_t depthwise_work(int64_t outputs, int64_t taps) { return outputs * (taps / 8 + 1) / 2; }

// Splits rows into blocks for deterministic reductions: their number depends on the shape alone, never on the thread
// count. At most 16 rows are added in a chain of floats; the blocks are then added in double.
struct RowBlocks {
  int64_t rows, rows_per_block, count;
  RowBlocks(int64_t rows_, int64_t row_elements)
      : rows(rows_),
        rows_per_block(std::max<int64_t>(1, std::min<int64_t>(16, 65536 / std::max<int64_t>(1, row_elements)))),
        count((rows_ + rows_per_block - 1) / rows_per_block) {}
  int64_t begin(int64_t block) const { return block * rows_per_block; }
  int64_t size(int64_t block) const { return std::min(rows_per_block, rows - begin(block)); }
  // Runs f(begin, end) over the blocks; a row costs `work` elements.
  void parallel(int64_t work, RangeFunction f) const { parallel_tasks(count, rows_per_block * work, f); }
};

// Computes out[j] = sum over blocks of parts[block width + j], in block order, in double, and rounds once.
template <typename C>
void reduce_blocks(const C* parts, int64_t blocks, int64_t width, const Tensor& out) {
  const int64_t grain = std::max<int64_t>(64, kGrain / std::max<int64_t>(1, blocks));
  with_kernel_type(dtype_of(out), "reduce_blocks", [&]<typename T>() {
    if constexpr (std::is_same_v<cpu::compute_t<T>, C>) {
      T* sums = mutable_data<T>(out);
      const auto& kernel = cpu::kernels<cpu::SumBlocks<T>>();
      parallel_range(out.numel(), grain, [&](int64_t b, int64_t e) { kernel.run(parts, blocks, width, b, e, sums); });
    } else {
      decline("reduce_blocks", {"unsupported dtype"});
    }
  });
}

// Raises an error: a schema has as many arguments or results.
[[noreturn]] void wrong_count(uint64_t arguments, uint64_t results);

// The type of an argument or result in a schema. An argument `Tensor`, taken by value, is written to: "Tensor!".
template <typename T>
constexpr const char* kSchemaType = kSchemaType<std::remove_cvref_t<T>>;
// clang-format off
template <> inline constexpr const char* kSchemaType<Tensor> = "Tensor";
template <> inline constexpr const char* kSchemaType<Optional> = "Tensor?";
template <> inline constexpr const char* kSchemaType<bool> = "bool";
template <> inline constexpr const char* kSchemaType<int64_t> = "int";
template <> inline constexpr const char* kSchemaType<double> = "float";
template <> inline constexpr const char* kSchemaType<std::string> = "str";
template <> inline constexpr const char* kSchemaType<std::vector<int64_t>> = "int[]";
template <> inline constexpr const char* kSchemaType<std::vector<double>> = "float[]";
template <> inline constexpr const char* kSchemaType<std::vector<Tensor>> = "Tensor[]";
// clang-format on
template <typename T>
constexpr const char* kArgumentType = std::is_same_v<T, Tensor> ? "Tensor!" : kSchemaType<T>;
using SchemaTypes = std::initializer_list<const char*>;
std::string schema_of(const char* name, SchemaTypes arguments, SchemaTypes results);

// Puts a function's results on the stack.
template <typename R>
struct Results {
  static constexpr uint64_t kCount = 1;
  static std::string schema(const char* name, SchemaTypes arguments) {
    return schema_of(name, arguments, {kSchemaType<R>});
  }
  static void put(StableIValue* stack, R&& result) { *stack = torch::stable::detail::from(std::move(result)); }
};
template <typename... T>
struct Results<std::tuple<T...>> {
  static constexpr uint64_t kCount = sizeof...(T);
  static std::string schema(const char* name, SchemaTypes arguments) {
    return schema_of(name, arguments, {kSchemaType<T>...});
  }
  static void put(StableIValue* stack, std::tuple<T...>&& results) {
    std::apply([&](T&... result) { ((*stack++ = torch::stable::detail::from(std::move(result))), ...); }, results);
  }
};
template <>
struct Results<void> {
  static constexpr uint64_t kCount = 0;
  static std::string schema(const char* name, SchemaTypes arguments) { return schema_of(name, arguments, {}); }
};

// What torch's dispatcher calls in place of a function: it takes arguments from the stack and puts the results there.
// TORCH_BOX does the same with tuples, which it copies: calls and compilation take longer.
template <auto kFunction>
struct Boxed;
template <typename R, typename... A, R (*kFunction)(A...)>
struct Boxed<kFunction> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    if (arguments != sizeof...(A) || results != Results<R>::kCount) wrong_count(arguments, results);
    on(stack, std::index_sequence_for<A...>());
  }
  static std::string schema(const char* name) { return Results<R>::schema(name, {kArgumentType<A>...}); }

 private:
  template <size_t... I>
  static void on([[maybe_unused]] StableIValue* stack, std::index_sequence<I...>) {
    using torch::stable::detail::to;
    if constexpr (std::is_void_v<R>)
      kFunction(to<std::remove_cvref_t<A>>(stack[I])...);
    else
      Results<R>::put(stack, kFunction(to<std::remove_cvref_t<A>>(stack[I])...));
  }
};

// An operator of torch.ops.fastasr_cpu: its schema, which begins with its name, or the name alone and Boxed::schema.
struct Operator {
  const char* schema;
  void (*boxed)(StableIValue*, uint64_t, uint64_t);
  std::string (*complete)(const char* name) = nullptr;
};
template <auto kFunction>
constexpr Operator typed(const char* name) {
  return {name, Boxed<kFunction>::call, Boxed<kFunction>::schema};
}
using Library = torch::stable::detail::StableLibrary;
void define(Library& library, std::initializer_list<Operator> operators);
void implement(Library& library, std::initializer_list<Operator> operators);

}  // namespace fastasr

// A file ends with this in namespace fastasr: the operators that kernels of a declared op consist of. `written<f>`
// stands for one whose arguments the declaration describes, FASTASR_TYPED(f) for one that is called by position: its
// schema follows from the types of f.
#define FASTASR_OPERATORS(...) FASTASR_OPERATORS_ON(fastasr_cpu, CPU, __VA_ARGS__)
#define FASTASR_OPERATORS_ON(name, key, ...)                                       \
  STABLE_TORCH_LIBRARY_FRAGMENT(name, library) { define(library, {__VA_ARGS__}); } \
  STABLE_TORCH_LIBRARY_IMPL(name, key, library) { implement(library, {__VA_ARGS__}); }
#define FASTASR_TYPED(f) typed<f>(#f)

// Operators outside every declaration. The first argument says why they need no fake function, autocast rule and
// contract; tests/ops/test_native_operators.py reads it.
#define FASTASR_UNDECLARED(why, ...)                   \
  static_assert(sizeof(why) > 1, "expected a reason"); \
  FASTASR_OPERATORS(__VA_ARGS__)
