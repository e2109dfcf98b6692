#pragma once
#include "cpu/rows/bias_norm.h"
namespace fastasr::cpu {
template <typename T>
FASTASR_INLINE void bias_norm_forward(const T* x, const T* bias, double scale, T* y, int64_t rows, int64_t channels) {
  kernels<BiasNormKernels<T>>().forward(x, bias, scale, y, rows, channels);
}
}  // namespace fastasr::cpu
