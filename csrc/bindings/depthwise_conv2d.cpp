// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/depthwise_conv2d.h"

#include <memory>
#include <tuple>

#include "bindings/dispatch.h"
#include "bindings/pooled.h"

namespace fastasr::bindings::depthwise_conv2d {
namespace {

using cpu::DepthwiseSizes;

DepthwiseSizes checked(const Tensor& x, const Tensor& weight, int64_t pad_t, int64_t pad_f, const char* op) {
  check(x.dim() == 4, op, "x is not (batch, frames, width, channels)");
  check_like(x, x, op, "x");
  check_like(weight, x, op, "weight");
  const int64_t channels = x.size(3), dim = weight.dim();
  check((dim == 3 || (dim == 4 && weight.size(1) == 1)) && weight.size(0) == channels, op, "weight has another shape");
  const DepthwiseSizes s{x.size(0), x.size(1), x.size(2), channels, weight.size(dim - 2), weight.size(dim - 1),
                         pad_t,     pad_f};
  check(s.taps_t > 0 && s.taps_f > 0 && pad_t >= 0 && pad_t < s.taps_t && pad_f >= 0 && pad_f < s.taps_f, op,
        "padding is out of range");
  check(s.frames > 0 && s.width > 0 && s.frames + 2 * pad_t >= s.taps_t && s.width + 2 * pad_f >= s.taps_f, op,
        "x is smaller than the kernel");
  return s;
}

// A thread of its own pays off for this many blocks.
int64_t grain(const DepthwiseSizes& s) {
  const int64_t block = cpu::kDepthwiseFrames * s.out_width() * s.channels * (s.taps() / 8 + 1);
  return std::max<int64_t>(1, 2 * kGrain / std::max<int64_t>(1, block));
}

Tensor depthwise_conv2d_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t pad_t,
                                int64_t pad_f) {
  const char* op = "depthwise_conv2d_forward";
  const DepthwiseSizes s = checked(x, weight, pad_t, pad_f, op);
  if (bias.has_value()) {
    check_like(*bias, x, op, "bias");
    check(has_sizes(*bias, {s.channels}), op, "bias has another shape");
  }
  Tensor y = new_pooled(x, {s.batch, s.out_frames(), s.out_width(), s.channels});
  with_kernel_type(dtype_of(x), op, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::DepthwiseConv2dKernels<T>>();
    const T *xp = data<T>(x), *wp = data<T>(weight), *bp = data_or_null<T>(bias);
    T* yp = mutable_data<T>(y);
    parallel_range(cpu::depthwise_blocks(s), grain(s),
                   [&](int64_t b, int64_t e) { kernel.forward(s, xp, wp, bp, false, yp, b, e); });
  });
  return y;
}

// Returns dx, dweight and dbias, each without elements where not needed.
std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                             int64_t pad_t, int64_t pad_f, bool need_x,
                                                             bool need_weight, bool need_bias) {
  const char* op = "depthwise_conv2d_backward";
  const DepthwiseSizes s = checked(x, weight, pad_t, pad_f, op);
  check_like(grad, x, op, "grad");
  check(has_sizes(grad, {s.batch, s.out_frames(), s.out_width(), s.channels}), op, "grad has another shape");
  Tensor dx = need_x ? new_pooled_like(x) : new_without_elements(x);
  Tensor dweight = need_weight ? new_like(weight) : new_without_elements(x);
  Tensor dbias = new_without_elements(x);
  if (need_bias) {
    const int64_t stride = 1;
    dbias = new_strided(x, 1, &s.channels, &stride);
  }
  with_kernel_type(dtype_of(x), op, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::DepthwiseConv2dKernels<T>>();
    const T *gp = data<T>(grad), *xp = data<T>(x), *wp = data<T>(weight);
    if (need_x) {
      T* dp = mutable_data<T>(dx);
      const DepthwiseSizes back = s.transposed();
      parallel_range(cpu::depthwise_blocks(back), grain(back), [&](int64_t b, int64_t e) {
        kernel.forward(back, gp, wp, static_cast<const T*>(nullptr), true, dp, b, e);
      });
    }
    if (!need_weight && !need_bias) return;
    const int64_t groups = cpu::depthwise_groups(s), blocks = cpu::depthwise_blocks(s);
    const int64_t rows = s.taps() + 1;
    const std::unique_ptr<double[]> parts(
        new double[static_cast<size_t>(std::max<int64_t>(1, groups * rows * s.channels))]);
    const int64_t per_group = (blocks + groups - 1) / std::max<int64_t>(1, groups);
    parallel_range(groups, std::max<int64_t>(1, grain(s) / std::max<int64_t>(1, per_group)),
                   [&](int64_t b, int64_t e) { kernel.weight_gradient(s, gp, xp, parts.get(), b, e); });
    const std::unique_ptr<T[]> unwanted(need_weight ? nullptr : new T[static_cast<size_t>(s.taps() * s.channels)]);
    kernel.reduce(s, parts.get(), need_weight ? mutable_data<T>(dweight) : unwanted.get(),
                  need_bias ? mutable_data<T>(dbias) : nullptr);
  });
  return {dx, dweight, dbias};
}

}  // namespace

FASTASR_OPERATORS({"depthwise_conv2d_forward(Tensor x, Tensor weight, Tensor? bias, int pad_t, int pad_f) -> Tensor",
                   Boxed<depthwise_conv2d_forward>::call},
                  {"depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, int pad_t, int pad_f, bool need_x, "
                   "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
                   Boxed<depthwise_conv2d_backward>::call})

}  // namespace fastasr::bindings::depthwise_conv2d
