// SPDX-License-Identifier: Apache-2.0
#include "bindings/pooled.h"

namespace fastasr {

static constexpr size_t kPooled = size_t{1} << 16;

static Tensor from_pool(const Tensor& t, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                        torch::headeronly::IntHeaderOnlyArrayRef strides, ScalarType dtype, size_t bytes) {
  void* memory = cpu::acquire_buffer(bytes);
  if (!memory) out_of_memory(bytes);
  return torch::stable::from_blob(memory, sizes, strides, t.device(), dtype, [](void* p) { cpu::release_buffer(p); });
}

Tensor new_pooled(const Tensor& t, size_t dim, const int64_t* sizes, const int64_t* strides, bool floats) {
  const ScalarType dtype = floats ? ScalarType::Float : dtype_of(t);
  const size_t element = floats ? sizeof(float) : t.element_size();
  const size_t bytes = static_cast<size_t>(sizes[0] * strides[0]) * element;
  if (bytes < kPooled) return new_strided(t, static_cast<int64_t>(dim), sizes, strides, dtype);
  return from_pool(t, {sizes, dim}, {strides, dim}, dtype, bytes);
}

Tensor new_pooled(const Tensor& t, std::initializer_list<int64_t> sizes, bool floats) {
  int64_t strides[4], stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) strides[d] = stride, stride *= std::max<int64_t>(1, sizes.begin()[d]);
  return new_pooled(t, sizes.size(), sizes.begin(), strides, floats);
}

Tensor new_pooled_like(const Tensor& t) {
  const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
  if (bytes < kPooled) return new_like(t);
  return from_pool(t, t.sizes(), t.strides(), dtype_of(t), bytes);
}

}  // namespace fastasr
