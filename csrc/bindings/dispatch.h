// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/math/number.h"
#include "cpu/rows/sum_blocks.h"

// Every binding needs these: the kernel's storage type for a tensor, checks, and a split of the work that depends on
// the shape alone. Python has already checked the arguments and named them: the checks here guard memory. Every check
// puts the operator's name before its reason: that tells Python that the kernel declines the call, and Python takes
// another path. Any other error, such as a failed allocation, reaches the user.
namespace fastasr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
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
      STD_TORCH_CHECK(false, op, ": unsupported dtype");
  }
}

// Does the same for kernels that know float and double alone.
template <typename F>
void with_compute_type(ScalarType dtype, const char* op, F&& f) {
  if (dtype == ScalarType::Double) return f.template operator()<double>();
  STD_TORCH_CHECK(dtype == ScalarType::Float, op, ": unsupported dtype");
  f.template operator()<float>();
}

// The dtype that a kernel type is computed in; parameters are passed in it.
template <typename T>
constexpr ScalarType kComputeType = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// Makes a new tensor of t's dtype and device. torch::stable::empty_like looks its op up by name at every call, which
// costs more than a small kernel.
inline Tensor new_strided(const Tensor& t, int64_t dim, const int64_t* sizes, const int64_t* strides) {
  int32_t dtype, device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor new_like(const Tensor& t) { return new_strided(t, t.dim(), t.sizes().data(), t.strides().data()); }

// Returns a contiguous tensor of t's sizes.
inline Tensor new_contiguous(const Tensor& t) {
  const int64_t dim = t.dim();
  std::vector<int64_t> strides(dim);
  int64_t stride = 1;
  for (int64_t d = dim - 1; d >= 0; d--) strides[d] = stride, stride *= std::max<int64_t>(1, t.size(d));
  return new_strided(t, dim, t.sizes().data(), strides.data());
}

// Returns the elements from one row to the next of a tensor seen as rows of its last dimension: slices of a wider
// tensor qualify.
inline int64_t row_stride(const Tensor& t, const char* op, const char* name) {
  const int64_t last = t.dim() - 1;
  // the row's stride, and the one that a dimension to the left must have to continue the rows
  int64_t stride = 0, next = -1;
  bool ok = t.size(last) <= 1 || t.stride(last) == 1;
  for (int64_t d = last - 1; d >= 0; d--) {
    if (t.size(d) == 1) continue;
    if (next < 0) stride = next = t.stride(d);
    ok = ok && t.stride(d) == next;
    next *= t.size(d);
  }
  STD_TORCH_CHECK(ok || t.numel() == 0, op, ": the rows of ", name, " are not evenly spaced");
  return stride;
}

inline Tensor new_without_elements(const Tensor& t) {
  const int64_t size = 0, stride = 1;
  return new_strided(t, 1, &size, &stride);
}

inline void check_like(const Tensor& t, const Tensor& reference, const char* op, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == reference.scalar_type(), op, ": ", name, " has another dtype");
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " is not contiguous");
}

inline void check_same_size(const Tensor& t, const Tensor& reference, const char* op, const char* name) {
  check_like(t, reference, op, name);
  STD_TORCH_CHECK(t.numel() == reference.numel(), op, ": ", name, " has another number of elements");
}

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrain = 16384;

// Runs f(begin, end) over [0, n) on torch's own threads, serially when n is small.
template <typename F>
void parallel_range(int64_t n, int64_t grain, const F& f) {
  if (n <= grain) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
  torch::stable::parallel_for(0, n, grain, f);
}

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
};

// Computes out[j] = sum over blocks of parts[block][j], in block order, in double.
template <typename T>
void reduce_blocks(const cpu::compute_t<T>* parts, int64_t blocks, int64_t width, T* out) {
  const int64_t grain = std::max<int64_t>(64, kGrain / std::max<int64_t>(1, blocks));
  const auto& kernel = cpu::kernels<cpu::SumBlocks<T>>();
  parallel_range(width, grain, [&](int64_t b, int64_t e) { kernel.run(parts, blocks, width, b, e, out); });
}

// Defines an operator of torch.ops.fastasr_cpu from its schema, which begins with its name, and TORCH_BOX(&function).
struct Operator {
  const char* schema;
  void (*boxed)(StableIValue*, uint64_t, uint64_t);
  std::string name() const { return std::string(schema, std::strcspn(schema, "(")); }
};

}  // namespace fastasr

// A file ends with this in namespace fastasr: its operators.
#define FASTASR_OPERATORS(...)                                              \
  static constexpr Operator kOperators[] = {__VA_ARGS__};                   \
  STABLE_TORCH_LIBRARY_FRAGMENT(fastasr_cpu, m) {                           \
    for (const Operator& o : kOperators) m.def(o.schema);                   \
  }                                                                         \
  STABLE_TORCH_LIBRARY_IMPL(fastasr_cpu, CPU, m) {                          \
    for (const Operator& o : kOperators) m.impl(o.name().c_str(), o.boxed); \
  }
