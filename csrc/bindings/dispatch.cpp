// SPDX-License-Identifier: Apache-2.0
#include "bindings/arguments.h"

#include <cstring>
#include <stdexcept>

#include "cpu/support/buffer_pool.h"

namespace fastasr {

void decline(const char* op, std::initializer_list<Piece> reason) {
  std::string text = std::string("fastasr, ") + op + ": ";
  for (const Piece& piece : reason) text += piece.text();
  throw std::invalid_argument(text);
}

void out_of_memory(size_t bytes) {
  throw std::runtime_error("fastasr: no memory for " + std::to_string(bytes) + " bytes");
}

ScalarType dtype_of(const Tensor& t) { return t.scalar_type(); }

namespace {

constexpr size_t kPooled = size_t{1} << 16;

size_t bytes_of(ScalarType dtype) {
  const bool two = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  const bool four = dtype == ScalarType::Float || dtype == ScalarType::Int;
  const bool one = dtype == ScalarType::Byte || dtype == ScalarType::Char || dtype == ScalarType::Bool;
  return one ? 1 : two ? 2 : four ? 4 : 8;
}

}  // namespace

Tensor new_strided(const Tensor& t, Sizes sizes, Sizes strides, std::optional<ScalarType> dtype) {
  const ScalarType type = dtype.value_or(dtype_of(t));
  size_t elements = 1;
  for (size_t d = 0; d < sizes.size(); d++)
    elements = sizes[d] && elements ? elements + static_cast<size_t>((sizes[d] - 1) * strides[d]) : 0;
  if (const size_t bytes = elements * bytes_of(type); bytes >= kPooled && t.is_cpu()) {
    void* memory = cpu::acquire_buffer(bytes);
    if (!memory) out_of_memory(bytes);
    return torch::stable::from_blob(memory, sizes, strides, t.device(), type, [](void* p) { cpu::release_buffer(p); });
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  static_cast<int32_t>(type), device_type, device_index, &handle));
  return Tensor(handle);
}

std::vector<int64_t> contiguous_strides(Sizes sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) strides[d] = stride, stride *= std::max<int64_t>(1, sizes[d]);
  return strides;
}

Tensor new_contiguous(const Tensor& t, Sizes sizes, std::optional<ScalarType> dtype) {
  return new_strided(t, sizes, contiguous_strides(sizes), dtype);
}

Tensor new_contiguous(const Tensor& t) { return new_contiguous(t, t.sizes()); }
Tensor new_like(const Tensor& t) { return new_strided(t, t.sizes(), t.strides()); }
Tensor new_like(const Optional& t, const Tensor& other) { return t ? new_like(*t) : new_without_elements(other); }
Tensor new_without_elements(const Tensor& t) { return new_strided(t, {0}, {1}); }

int64_t row_stride(const Tensor& t, const char* op, const char* name) {
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
  check(ok || t.numel() == 0, op, "the rows of ", name, " are not evenly spaced");
  return stride;
}

bool has_sizes(const Tensor& t, Sizes sizes) { return t.sizes().equals(sizes); }

bool is_dense(const Tensor& t, ScalarType dtype, Sizes sizes) {
  return dtype_of(t) == dtype && t.is_contiguous() && has_sizes(t, sizes);
}

bool has_sizes(const Tensor& t, Sizes first, std::initializer_list<int64_t> last) {
  const Sizes sizes = t.sizes();
  return sizes.size() == first.size() + last.size() && std::equal(first.begin(), first.end(), sizes.begin()) &&
         std::equal(last.begin(), last.end(), sizes.begin() + first.size());
}

ScalarType floating_dtype(const Tensor& t, const char* op, const char* name) {
  const ScalarType dtype = dtype_of(t);
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
            dtype == ScalarType::Double,
        op, name, " has an unsupported dtype");
  return dtype;
}

void check_dtype(const Tensor& t, ScalarType dtype, const char* op, const char* name) {
  check(dtype_of(t) == dtype, op, name, " has another dtype");
}

void check_contiguous(const Tensor& t, const char* op, const char* name) {
  check(t.is_contiguous(), op, name, " is not contiguous");
}

void check_dense_channels(const Tensor& t, const char* op, const char* name) {
  const int64_t last = t.dim() - 1;
  check(last < 0 || t.stride(last) == 1 || t.size(last) <= 1 || t.numel() == 0, op, "the channels of ", name,
        " are not contiguous");
}

void check_like(const Tensor& t, const Tensor& reference, const char* op, const char* name) {
  check_dtype(t, dtype_of(reference), op, name);
  check_contiguous(t, op, name);
}

void check_same_size(const Tensor& t, const Tensor& reference, const char* op, const char* name) {
  check_like(t, reference, op, name);
  check(t.numel() == reference.numel(), op, name, " has another number of elements");
}

void parallel_range(int64_t n, int64_t grain, RangeFunction f) {
  if (n > grain)
    torch::stable::parallel_for(0, n, grain, f);
  else if (n > 0)
    f(0, n);
}

void parallel_tasks(int64_t n, int64_t work, RangeFunction f) {
  parallel_range(n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)), f);
}

void wrong_count(uint64_t arguments, uint64_t results) {
  throw std::runtime_error("fastasr: a schema has " + std::to_string(arguments) + " arguments and " +
                           std::to_string(results) + " results, its function others");
}

std::string schema_of(const char* name, SchemaTypes arguments, SchemaTypes results) {
  std::string text = std::string(name) + "(", comma;
  char letter = 'a';
  for (std::string type : arguments) {
    if (type.back() == '!') type.replace(type.size() - 1, 1, std::string("(") + letter + "!)");
    text += comma + type + ' ' + letter++, comma = ", ";
  }
  text += ") -> (", comma.clear();
  for (const std::string type : results) text += comma + type, comma = ", ";
  return text + ')';
}

void define(Library& library, std::initializer_list<Operator> operators) {
  for (const Operator& o : operators) library.def(o.complete ? o.complete(o.schema).c_str() : o.schema);
}

void implement(Library& library, std::initializer_list<Operator> operators) {
  for (const Operator& o : operators) library.impl(std::string(o.schema, std::strcspn(o.schema, "(")).c_str(), o.boxed);
}

}  // namespace fastasr
