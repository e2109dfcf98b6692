// SPDX-License-Identifier: Apache-2.0
#include "bindings/pooled.h"

namespace fastasr {

static constexpr size_t kPooled = size_t{1} << 16;

static Tensor from_pool(const Tensor& t, Sizes sizes, Sizes strides, ScalarType dtype, size_t bytes) {
  void* memory = cpu::acquire_buffer(bytes);
  if (!memory) out_of_memory(bytes);
  return torch::stable::from_blob(memory, sizes, strides, t.device(), dtype, [](void* p) { cpu::release_buffer(p); });
}

Tensor new_pooled(const Tensor& t, Sizes sizes, Sizes strides, bool floats) {
  const ScalarType dtype = floats ? ScalarType::Float : dtype_of(t);
  const size_t bytes = static_cast<size_t>(sizes[0] * strides[0]) * (floats ? sizeof(float) : t.element_size());
  return bytes < kPooled ? new_strided(t, sizes, strides, dtype) : from_pool(t, sizes, strides, dtype, bytes);
}

Tensor new_pooled(const Tensor& t, Sizes sizes, bool floats) {
  return new_pooled(t, sizes, contiguous_strides(sizes), floats);
}

Tensor new_pooled_like(const Tensor& t) {
  const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
  if (bytes < kPooled) return new_like(t);
  return from_pool(t, t.sizes(), t.strides(), dtype_of(t), bytes);
}

namespace bindings::pooled {

// Returns memory of n floats, which the caller fills.
Tensor pooled_floats(const Tensor& like, int64_t n) {
  check(n >= 0, "pooled_floats", "n");
  return new_pooled(like, {n}, true);
}

FASTASR_UNDECLARED("fastasr/ops/_gemm.py hands it to products that fill it: nothing is computed",
                   FASTASR_TYPED(pooled_floats))

}  // namespace bindings::pooled
}  // namespace fastasr
