#pragma once
#include "cpu/conv/depthwise_conv2d.h"
namespace fastasr::cpu {
template <typename T>
FASTASR_INLINE void depthwise_conv2d_forward(const DepthwiseSizes& s, const T* in, const T* weight, const T* bias,
                                             bool flip, T* out, int64_t begin, int64_t end) {
  kernels<DepthwiseConv2dKernels<T>>().forward(s, in, weight, bias, flip, out, begin, end);
}
}  // namespace fastasr::cpu
