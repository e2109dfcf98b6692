// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/linear_activation.h"

#include "bindings/pooled.h"
#include "bindings/row_sums.h"
#include "cpu/math/activation.h"
#include "cpu/rows/dropout.h"

namespace fastasr::bindings::linear_activation {
namespace {

void check_linear_activation(const Tensor& z, int64_t activation, const char* op) {
  check(z.dim() > 0, op, "z has no dimensions");
  check_like(z, z, op, "z");
  check(activation >= 0 && activation < cpu::kActivations, op, "activation");
}

// Which elements dropout kept of act(z), and how it scales them. Without dropout nothing is applied.
struct Dropped {
  Dropped(const Optional& keep, double p, const Tensor& z, const char* op) {
    if (!keep) return;
    check(dtype_of(z) == ScalarType::Float && dtype_of(*keep) == ScalarType::Byte && keep->is_contiguous() &&
              keep->numel() == z.numel() && p > 0 && p < 1,
          op, "keep");
    mask = data<uint8_t>(*keep);
    scale = 1.0f / static_cast<float>(1 - p);
  }
  template <typename T>
  void apply(const T* x, T* y, int64_t at, int64_t n) const {
    if constexpr (std::is_same_v<T, float>)
      cpu::kernels<cpu::DropoutKernels>().apply(x + at, mask + at, scale, nullptr, y + at, n);
  }
  const uint8_t* mask = nullptr;
  float scale = 1;
};

// Half the last size of z, for the gated form.
int64_t half_of(const Tensor& z, const Optional& keep, const char* op) {
  const int64_t channels = z.size(z.dim() - 1);
  check(channels % 2 == 0 && !keep, op, "gated");
  return channels / 2;
}

Tensor gated_forward(const Tensor& z, int64_t activation, int64_t channels, const char* op) {
  std::vector<int64_t> sizes = z.sizes().vec();
  sizes.back() = channels;
  Tensor y = new_pooled(z, sizes);
  with_kernels<cpu::LinearActivationKernels>(z, op, [&]<typename T>(const auto& kernel) {
    const T* from = data<T>(z);
    T* to = mutable_data<T>(y);
    const int64_t rows = channels ? y.numel() / channels : 0;
    parallel_tasks(rows, channels, [&](int64_t b, int64_t e) {
      kernel.gated_forward(static_cast<int>(activation), from + b * 2 * channels, to + b * channels, e - b, channels);
    });
  });
  return y;
}

// Returns act(z), with dropout where `keep` is given; in z's own memory, and then as z itself, where the caller asks
// for that. The gated form has neither.
Tensor linear_activation_forward(const Tensor& z, int64_t activation, bool in_place, bool gated, const Optional& keep,
                                 double p) {
  const char* op = "linear_activation_forward";
  check_linear_activation(z, activation, op);
  if (gated) return gated_forward(z, activation, half_of(z, keep, op), op);
  const Dropped dropped(keep, p, z, op);
  Tensor y = in_place ? z : new_pooled_like(z);
  with_kernels<cpu::LinearActivationKernels>(z, op, [&]<typename T>(const auto& kernel) {
    const T* from = data<T>(z);
    T* to = mutable_data<T>(y);
    const int64_t piece = dropped.mask ? 2048 : z.numel();  // the first cache holds a piece between both passes
    parallel_range(z.numel(), kGrain, [&](int64_t b, int64_t e) {
      for (int64_t n; b < e; b += n) {
        n = std::min(piece, e - b);
        kernel.forward(static_cast<int>(activation), from + b, to + b, n);
        if (dropped.mask) dropped.apply<T>(to, to, b, n);
      }
    });
  });
  return y;
}

// Returns (dz, dbias); dbias has no elements unless the caller asks for it.
std::tuple<Tensor, Tensor> linear_activation_backward(const Tensor& grad, const Tensor& z, int64_t activation,
                                                      bool need_bias, bool gated, const Optional& keep, double p) {
  const char* op = "linear_activation_backward";
  check_linear_activation(z, activation, op);
  if (gated) {
    const int64_t half = half_of(z, keep, op);
    check(dtype_of(grad) == dtype_of(z) && grad.is_contiguous() && 2 * grad.numel() == z.numel() &&
              grad.size(grad.dim() - 1) == half,
          op, "grad");
  } else {
    check_same_size(grad, z, op, "grad");
  }
  const Dropped dropped(keep, p, z, op);
  Tensor dz = new_pooled_like(z), dbias = new_without_elements(z);
  const int64_t channels = z.size(z.dim() - 1), rows = channels ? z.numel() / channels : 0;
  if (need_bias) dbias = new_contiguous(z, {channels});
  with_kernels<cpu::LinearActivationKernels>(z, op, [&]<typename T>(const auto& kernel) {
    const T *g = data<T>(grad), *from = data<T>(z);
    T* to = mutable_data<T>(dz);
    const Tensor* sums = need_bias ? &dbias : nullptr;
    sum_parts<T>(RowBlocks(rows, channels), channels, {sums}, channels, 0,
                 [&](int64_t b, int64_t e, auto* part, auto*) {
                   const int64_t at = b * channels;
                   if (gated) {
                     kernel.gated_backward(static_cast<int>(activation), g + at / 2, from + at, to + at, part, e - b,
                                           channels / 2);
                     return;
                   }
                   if (dropped.mask) dropped.apply<T>(g, to, at, (e - b) * channels);
                   const T* dy = dropped.mask ? to : g;
                   kernel.backward(static_cast<int>(activation), dy + at, from + at, to + at, part, e - b, channels);
                 });
  });
  return {dz, dbias};
}

}  // namespace

FASTASR_OPERATORS(
    {"linear_activation_forward(Tensor(a!) z, int activation, bool in_place, bool gated=False, Tensor? keep=None, "
     "float p=0.0) -> Tensor",
     Boxed<linear_activation_forward>::call},
    {"linear_activation_backward(Tensor grad, Tensor z, int activation, bool need_bias, bool gated=False, "
     "Tensor? keep=None, float p=0.0) -> (Tensor, Tensor)",
     Boxed<linear_activation_backward>::call})

}  // namespace fastasr::bindings::linear_activation
