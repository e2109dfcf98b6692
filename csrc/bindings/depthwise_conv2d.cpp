// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/depthwise_conv2d.h"

#include <memory>

#include "bindings/written/depthwise_conv2d.h"

namespace fastasr::bindings::depthwise_conv2d {

template <typename A>
void find_sizes(A& a) {
  a.P = a.padding[0], a.Q = a.padding[1];
}

namespace {

using cpu::DepthwiseSizes;

DepthwiseSizes checked_sizes(const auto& a) {
  check(a.P >= 0 && a.P < a.K && a.Q >= 0 && a.Q < a.L, a.kName, "padding is out of range");
  check(a.T > 0 && a.F > 0 && a.T + 2 * a.P >= a.K && a.F + 2 * a.Q >= a.L, a.kName, "x is smaller than the kernel");
  return {a.B, a.T, a.F, a.C, a.K, a.L, a.P, a.Q};
}

// The work of a block.
int64_t work_of(const DepthwiseSizes& s) {
  return depthwise_work(cpu::kDepthwiseFrames * s.out_width() * s.channels, s.taps());
}

Tensor depthwise_conv2d_forward(const DepthwiseConv2DForward& a) {
  const DepthwiseSizes s = checked_sizes(a);
  Tensor y = new_contiguous(a.x, {s.batch, s.out_frames(), s.out_width(), s.channels});
  with_kernels<cpu::DepthwiseConv2dKernels>(a.x, a.kName, [&]<typename T>(const auto& kernel) {
    const T *xp = data<T>(a.x), *wp = data<T>(a.weight), *bp = data_or_null<T>(a.bias);
    T* yp = mutable_data<T>(y);
    parallel_tasks(cpu::depthwise_blocks(s), work_of(s),
                   [&](int64_t b, int64_t e) { kernel.forward(s, xp, wp, bp, false, yp, b, e); });
  });
  return y;
}

// Returns dx, dweight and dbias, each without elements where not needed.
std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(const DepthwiseConv2DBackward& a) {
  const DepthwiseSizes s = checked_sizes(a);
  const auto [need_x, need_weight, need_bias] = std::tuple(a.needs_x, a.needs_weight, a.needs_bias);
  Tensor dx = need_x ? new_like(a.x) : new_without_elements(a.x);
  Tensor dweight = need_weight ? new_like(a.weight) : new_without_elements(a.x);
  Tensor dbias = need_bias ? new_contiguous(a.x, {s.channels}) : new_without_elements(a.x);
  with_kernels<cpu::DepthwiseConv2dKernels>(a.x, a.kName, [&]<typename T>(const auto& kernel) {
    const T *gp = data<T>(a.grad_y), *xp = data<T>(a.x), *wp = data<T>(a.weight);
    if (need_x) {
      T* dp = mutable_data<T>(dx);
      const DepthwiseSizes back = s.transposed();
      parallel_tasks(cpu::depthwise_blocks(back), work_of(back), [&](int64_t b, int64_t e) {
        kernel.forward(back, gp, wp, static_cast<const T*>(nullptr), true, dp, b, e);
      });
    }
    if (!need_weight && !need_bias) return;
    const int64_t groups = cpu::depthwise_groups(s), blocks = cpu::depthwise_blocks(s);
    const int64_t rows = s.taps() + 1;
    const std::unique_ptr<double[]> parts(
        new double[static_cast<size_t>(std::max<int64_t>(1, groups * rows * s.channels))]);
    const int64_t per_group = (blocks + groups - 1) / std::max<int64_t>(1, groups);
    parallel_tasks(groups, per_group * work_of(s),
                   [&](int64_t b, int64_t e) { kernel.weight_gradient(s, gp, xp, parts.get(), b, e); });
    const std::unique_ptr<T[]> unwanted(need_weight ? nullptr : new T[static_cast<size_t>(s.taps() * s.channels)]);
    kernel.reduce(s, parts.get(), need_weight ? mutable_data<T>(dweight) : unwanted.get(),
                  need_bias ? mutable_data<T>(dbias) : nullptr);
  });
  return {dx, dweight, dbias};
}

}  // namespace

FASTASR_OPERATORS(written<depthwise_conv2d_forward>, written<depthwise_conv2d_backward>)

}  // namespace fastasr::bindings::depthwise_conv2d
