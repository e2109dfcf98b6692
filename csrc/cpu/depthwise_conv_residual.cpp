// SPDX-License-Identifier: Apache-2.0
#include "cpu/depthwise_conv_residual.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/instruction_sets.h"

#define FASTASR_BODY "cpu/depthwise_conv_residual_stripes.h"
#include "cpu/each_instruction_set.h"

namespace fastasr::cpu {

#define FASTASR_DEFINE(T)                                                                                         \
  void depthwise_conv_residual_forward(const DepthwiseConvResidual<T>& p, T* y, int64_t begin, int64_t end) {     \
    FASTASR_DISPATCH(residual_forward(p, y, begin, end));                                                         \
  }                                                                                                               \
  void depthwise_conv_residual_backward(const DepthwiseConvResidual<T>& p, const T* grad, T* dx,                  \
                                        compute_t<T>* dweight, compute_t<T>* dbias, int64_t begin, int64_t end) { \
    FASTASR_DISPATCH(residual_backward(p, grad, dx, dweight, dbias, begin, end));                                 \
  }

FASTASR_DEFINE(float)
FASTASR_DEFINE(double)
FASTASR_DEFINE(bfloat16)
FASTASR_DEFINE(float16)

}  // namespace fastasr::cpu
