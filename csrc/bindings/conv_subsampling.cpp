// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/conv_subsampling.h"

#include <memory>

#include "bindings/written/conv_subsampling.h"

namespace fastasr::bindings::conv_subsampling {
namespace {

using cpu::SubsamplingSizes;

SubsamplingSizes sizes_of(const auto& a) { return {a.B, a.T, a.F, a.C, a.left}; }

// The work of a block.
int64_t work_of(const SubsamplingSizes& s) { return 4 * cpu::kSubsamplingFrames * s.out_width() * s.channels; }

Tensor conv_subsampling_forward(const ConvSubsamplingForward& a) {
  const SubsamplingSizes s = sizes_of(a);
  Tensor y = new_contiguous(a.x, {s.batch, s.out_frames(), s.out_width(), s.channels});
  with_kernel_type(dtype_of(a.x), a.kName, [&]<typename T>() {
    const cpu::SubsamplingInputs<T> in{data<T>(a.x),
                                       data<T>(a.weight),
                                       data_or_null<T>(a.bias),
                                       data<T>(a.depthwise_weight),
                                       data_or_null<T>(a.depthwise_bias),
                                       data_or_null<bool>(a.mask)};
    T* out = mutable_data<T>(y);
    parallel_tasks(cpu::subsampling_blocks(s), work_of(s), [&](int64_t b, int64_t e) {
      cpu::kernels<cpu::ConvSubsamplingKernels<T>>().forward(s, in, out, b, e);
    });
  });
  return y;
}

// Returns dx, without elements if it is not needed, and the gradients of the four parameters.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_subsampling_backward(const ConvSubsamplingBackward& a) {
  const SubsamplingSizes s = sizes_of(a);
  const bool need_x = a.needs_x;
  Tensor dx = need_x ? new_like(a.x) : new_without_elements(a.x);
  Tensor dweight = new_like(a.weight), dbias = new_contiguous(a.x, {s.channels});
  Tensor ddepthwise_weight = new_like(a.weight), ddepthwise_bias = new_contiguous(a.x, {s.channels});
  with_kernels<cpu::ConvSubsamplingKernels>(a.x, a.kName, [&]<typename T>(const auto& kernel) {
    const cpu::SubsamplingInputs<T> in{
        data<T>(a.x), data<T>(a.weight),         data_or_null<T>(a.bias), data<T>(a.depthwise_weight),
        nullptr,      data_or_null<bool>(a.mask)};
    const int64_t blocks = cpu::subsampling_blocks(s), groups = cpu::subsampling_groups(s);
    const auto numbers = [](int64_t n) { return std::unique_ptr<double[]>(new double[static_cast<size_t>(n)]); };
    const auto parts = numbers(groups * cpu::kSubsamplingSums * s.channels);
    const auto dx_parts = numbers(need_x ? blocks * cpu::kSubsamplingRows * s.bins : 0);
    const int64_t per_group = (blocks + groups - 1) / std::max<int64_t>(1, groups);
    parallel_tasks(groups, per_group * work_of(s), [&](int64_t b, int64_t e) {
      kernel.backward(s, in, data<T>(a.grad_y), parts.get(), need_x ? dx_parts.get() : nullptr, b, e);
    });
    kernel.reduce(s, parts.get(), mutable_data<T>(dweight), mutable_data<T>(dbias), mutable_data<T>(ddepthwise_weight),
                  mutable_data<T>(ddepthwise_bias));
    if (need_x) {
      T* to = mutable_data<T>(dx);
      parallel_tasks(s.batch, s.frames * s.bins,
                     [&](int64_t b, int64_t e) { kernel.add_blocks(s, dx_parts.get(), to, b, e); });
    }
  });
  return {dx, dweight, dbias, ddepthwise_weight, ddepthwise_bias};
}

}  // namespace

FASTASR_OPERATORS(written<conv_subsampling_forward>, written<conv_subsampling_backward>)

}  // namespace fastasr::bindings::conv_subsampling
