// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/linear_activation.h"

#include "bindings/layer_parts.h"
#include "bindings/row_sums.h"
#include "cpu/attention/attention_rows.h"
#include "cpu/math/activation.h"
#include "cpu/rows/dropout.h"

namespace fastasr::bindings::linear_activation {
namespace {

void check_linear_activation(const Tensor& z, int64_t activation, const char* op) {
  check(z.dim() > 0, op, "z has no dimensions");
  check_like(z, z, op, "z");
  check(activation >= 0 && activation < cpu::kActivations, op, "activation");
}

// Which elements of rows of `channels` dropout kept, and how it scales them: by a mask of torch's own draws or by the
// hash of a seed. Without dropout nothing is applied.
struct Dropped {
  Dropped(double p, const Optional& seed, const Optional& keep, const Tensor& z, int64_t channels, const char* op)
      : channels(channels), scale(1.0f / static_cast<float>(1 - p)) {
    check(!seed || is_dense(*seed, ScalarType::Long, {1}), op, "dropout_seed");
    if (p == 0 && !keep) return;
    check(p > 0 && p < 1 && seed.has_value() != keep.has_value(), op, "dropout_p, dropout_seed");
    if (keep) {
      check(dtype_of(z) == ScalarType::Float && dtype_of(*keep) == ScalarType::Byte && keep->is_contiguous() &&
                keep->numel() == z.numel(),
            op, "keep");
      mask = data<uint8_t>(*keep);
    } else {
      by_hash = {static_cast<uint64_t>(*data<int64_t>(*seed)), static_cast<int32_t>(p * 0x1p31), 1 / (1 - p)};
    }
  }
  explicit operator bool() const { return mask || by_hash.threshold; }
  // Applies it to n elements from the element `at` on. y may be x.
  template <typename T>
  void apply(const T* x, T* y, int64_t at, int64_t n) const {
    if constexpr (std::is_same_v<T, float>)
      if (mask) return cpu::kernels<cpu::DropoutKernels>().apply(x, mask + at, scale, nullptr, y, n);
    for (int64_t m; n > 0; x += m, y += m, at += m, n -= m) {
      const int64_t column = at % channels;
      m = std::min(n, channels - column);
      cpu::kernels<cpu::LinearActivationKernels<T>>().drop(cpu::dropout_row(by_hash, at / channels), column,
                                                           by_hash.threshold, by_hash.scale, x, y, m);
    }
  }
  int64_t channels;
  const uint8_t* mask = nullptr;
  float scale;  // of the mask
  cpu::WeightsDropout by_hash{};
};

// Half the last size of z, for the gated form.
int64_t half_of(const Tensor& z, const Optional& keep, const char* op) {
  const int64_t channels = z.size(z.dim() - 1);
  check(channels % 2 == 0 && !keep, op, "gated");
  return channels / 2;
}

Tensor gated_forward(const Tensor& z, int64_t activation, const Dropped& dropped, const char* op) {
  const int64_t channels = dropped.channels;
  std::vector<int64_t> sizes = z.sizes().vec();
  sizes.back() = channels;
  Tensor y = new_contiguous(z, sizes);
  with_kernels<cpu::LinearActivationKernels>(z, op, [&]<typename T>(const auto& kernel) {
    const T* from = data<T>(z);
    T* to = mutable_data<T>(y);
    const int64_t rows = channels ? y.numel() / channels : 0;
    parallel_tasks(rows, channels, [&](int64_t b, int64_t e) {
      kernel.gated_forward(static_cast<int>(activation), from + b * 2 * channels, to + b * channels, e - b, channels);
      if (dropped) dropped.apply<T>(to + b * channels, to + b * channels, b * channels, (e - b) * channels);
    });
  });
  return y;
}

Tensor biased_forward(const Tensor& z, int64_t activation, const Tensor& bias) {
  const auto& kernel = cpu::kernels<cpu::LinearActivationKernels<float>>();
  const auto& rows = cpu::kernels<cpu::AttentionRows<float>>();
  const int64_t channels = bias.numel();
  const float* const add = data<float>(bias);
  float* const y = mutable_data<float>(z);
  parallel_tasks(channels ? z.numel() / channels : 0, channels, [&](int64_t b, int64_t e) {
    for (float* row = y + b * channels; row < y + e * channels; row += channels) {
      rows.add_scaled(row, add, channels, 1);
      kernel.forward(static_cast<int>(activation), row, row, channels);
    }
  });
  return z;
}

}  // namespace

// Returns act(z), with dropout where p > 0; in z's own memory, and then as z itself, where the caller asks for that.
// Dropout of float32 may have a mask `keep` in place of a seed. The gated form takes no mask and never z's memory. In
// float32 and z's own memory it may be act(z + bias).
Tensor linear_activation_forward(const Tensor& z, int64_t activation, bool in_place, bool gated, double p,
                                 const Optional& seed, const Optional& keep, const Optional& bias) {
  const char* op = "linear_activation_forward";
  check_linear_activation(z, activation, op);
  const int64_t channels = gated ? half_of(z, keep, op) : z.size(z.dim() - 1);
  const Dropped dropped(p, seed, keep, z, channels, op);
  check(!bias || (in_place && !gated && !dropped && is_dense(*bias, ScalarType::Float, {channels}) &&
                  dtype_of(z) == ScalarType::Float),
        op, "bias");
  if (bias) return biased_forward(z, activation, *bias);
  if (gated) return gated_forward(z, activation, dropped, op);
  Tensor y = in_place ? z : new_like(z);
  with_kernels<cpu::LinearActivationKernels>(z, op, [&]<typename T>(const auto& kernel) {
    const T* from = data<T>(z);
    T* to = mutable_data<T>(y);
    const int64_t piece = dropped ? 2048 : z.numel();  // the first cache holds a piece between both passes
    parallel_range(z.numel(), kGrain, [&](int64_t b, int64_t e) {
      for (int64_t n; b < e; b += n) {
        n = std::min(piece, e - b);
        kernel.forward(static_cast<int>(activation), from + b, to + b, n);
        if (dropped) dropped.apply<T>(to + b, to + b, b, n);
      }
    });
  });
  return y;
}

namespace {

// Returns (dz, dbias); dbias has no elements unless the caller asks for it.
std::tuple<Tensor, Tensor> linear_activation_backward(const Tensor& grad, const Tensor& z, int64_t activation,
                                                      bool need_bias, bool gated, double p, const Optional& seed,
                                                      const Optional& keep) {
  const char* op = "linear_activation_backward";
  check_linear_activation(z, activation, op);
  const int64_t channels = z.size(z.dim() - 1), of_y = gated ? half_of(z, keep, op) : channels;
  if (gated) {
    check(dtype_of(grad) == dtype_of(z) && grad.is_contiguous() && 2 * grad.numel() == z.numel() &&
              grad.size(grad.dim() - 1) == of_y,
          op, "grad");
  } else {
    check_same_size(grad, z, op, "grad");
  }
  const Dropped dropped(p, seed, keep, z, of_y, op);
  Tensor dz = new_like(z), dbias = new_without_elements(z);
  const int64_t rows = channels ? z.numel() / channels : 0;
  if (need_bias) dbias = new_contiguous(z, {channels});
  with_kernels<cpu::LinearActivationKernels>(z, op, [&]<typename T>(const auto& kernel) {
    const T *g = data<T>(grad), *from = data<T>(z);
    T* to = mutable_data<T>(dz);
    const Tensor* sums = need_bias ? &dbias : nullptr;
    sum_parts<T>(RowBlocks(rows, channels), channels, {sums}, channels, 0,
                 [&](int64_t b, int64_t e, auto* part, auto*) {
                   const int64_t at = b * of_y, n = (e - b) * of_y;
                   const T *dy = g + at, *z_rows = from + b * channels;
                   T* dz_rows = to + b * channels;
                   // in the gated form dz, of twice the size, is not written in the order of the gradient
                   const std::unique_ptr<T[]> room(dropped && gated ? new T[static_cast<size_t>(n)] : nullptr);
                   if (dropped) {
                     T* left = gated ? room.get() : dz_rows;
                     dropped.apply<T>(dy, left, at, n);
                     dy = left;
                   }
                   const auto pass = gated ? kernel.gated_backward : kernel.backward;
                   pass(static_cast<int>(activation), dy, z_rows, dz_rows, part, e - b, of_y);
                 });
  });
  return {dz, dbias};
}

}  // namespace

FASTASR_OPERATORS(
    {"linear_activation_forward(Tensor(a!) z, int activation, bool in_place, bool gated=False, float p=0.0, "
     "Tensor? seed=None, Tensor? keep=None, Tensor? bias=None) -> Tensor",
     Boxed<linear_activation_forward>::call},
    {"linear_activation_backward(Tensor grad, Tensor z, int activation, bool need_bias, bool gated=False, "
     "float p=0.0, Tensor? seed=None, Tensor? keep=None) -> (Tensor, Tensor)",
     Boxed<linear_activation_backward>::call})

}  // namespace fastasr::bindings::linear_activation
