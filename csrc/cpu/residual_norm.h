#pragma once
#include "cpu/rows/residual_norm.h"
namespace fastasr::cpu {
template <typename T>
FASTASR_INLINE void residual_norm_forward(const ResidualNorm<T>& p, int64_t begin, int64_t end, T* y,
                                          RowStatistics<compute_t<T>>* statistics, compute_t<T>* scratch) {
  kernels<ResidualNormKernels<T>>().forward(p, begin, end, y, statistics, scratch);
}
}  // namespace fastasr::cpu
