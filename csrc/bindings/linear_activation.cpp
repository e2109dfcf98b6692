// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/linear_activation.h"

#include <tuple>

#include "bindings/dispatch.h"
#include "bindings/pooled.h"
#include "cpu/math/activation.h"

namespace fastasr {
namespace {

void check_arguments(const Tensor& z, int64_t activation, const char* op) {
  check(z.dim() > 0, op, "z has no dimensions");
  check_like(z, z, op, "z");
  check(activation >= 0 && activation < cpu::kActivations, op, "activation");
}

// Returns act(z); in z's own memory, and then as z itself, where the caller asks for that.
Tensor linear_activation_forward(const Tensor& z, int64_t activation, bool in_place) {
  const char* op = "linear_activation_forward";
  check_arguments(z, activation, op);
  Tensor y = in_place ? z : new_pooled_like(z);
  with_kernel_type(z.scalar_type(), op, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::LinearActivationKernels<T>>();
    const T* from = data<T>(z);
    T* to = mutable_data<T>(y);
    parallel_range(z.numel(), kGrain, [&](int64_t b, int64_t e) {
      kernel.forward(static_cast<int>(activation), from + b, to + b, e - b);
    });
  });
  return y;
}

// Returns (dz, dbias); dbias has no elements unless the caller asks for it.
std::tuple<Tensor, Tensor> linear_activation_backward(const Tensor& grad, const Tensor& z, int64_t activation,
                                                      bool need_bias) {
  const char* op = "linear_activation_backward";
  check_arguments(z, activation, op);
  check_same_size(grad, z, op, "grad");
  Tensor dz = new_pooled_like(z), dbias = new_without_elements(z);
  const int64_t channels = z.size(z.dim() - 1), rows = channels ? z.numel() / channels : 0;
  if (need_bias) {
    const int64_t one = 1;
    dbias = new_strided(z, 1, &channels, &one);
  }
  with_kernel_type(z.scalar_type(), op, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::LinearActivationKernels<T>>();
    using C = cpu::compute_t<T>;
    const T *g = data<T>(grad), *from = data<T>(z);
    T* to = mutable_data<T>(dz);
    const RowBlocks blocks(rows, channels);
    const Scratch<C> parts(need_bias ? std::max<int64_t>(1, blocks.count * channels) : 1);
    parallel_range(blocks.count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, blocks.rows_per_block * channels)),
                   [&](int64_t b, int64_t e) {
                     for (int64_t k = b; k < e; k++) {
                       const int64_t at = blocks.begin(k) * channels;
                       kernel.backward(static_cast<int>(activation), g + at, from + at, to + at,
                                       need_bias ? parts.data() + k * channels : nullptr, blocks.size(k), channels);
                     }
                   });
    if (need_bias) reduce_blocks<T>(parts.data(), blocks.count, channels, mutable_data<T>(dbias));
  });
  return {dz, dbias};
}

}  // namespace

FASTASR_OPERATORS(
    {"linear_activation_forward(Tensor(a!) z, int activation, bool in_place) -> Tensor",
     TORCH_BOX(&linear_activation_forward)},
    {"linear_activation_backward(Tensor grad, Tensor z, int activation, bool need_bias) -> (Tensor, Tensor)",
     TORCH_BOX(&linear_activation_backward)})

}  // namespace fastasr
