// SPDX-License-Identifier: Apache-2.0
#include "cpu/gated_depthwise_conv.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

#include "cpu/activation.h"
#include "cpu/elementary.h"
#include "cpu/instruction_sets.h"
#include "cpu/logistic_avx512.h"

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own avx512fintrin.h

#define FASTASR_BODY "cpu/gated_depthwise_conv_forward.h"
#include "cpu/each_instruction_set.h"

namespace fastasr::cpu {

#define FASTASR_DEFINE(T)                                                                                 \
  void gated_depthwise_conv_forward(const GatedDepthwiseConv<T>& conv, T* y, T* new_cache, int64_t begin, \
                                    int64_t end) {                                                        \
    FASTASR_DISPATCH(forward(conv, y, new_cache, begin, end));                                            \
  }

FASTASR_DEFINE(float)
FASTASR_DEFINE(double)
FASTASR_DEFINE(bfloat16)
FASTASR_DEFINE(float16)

}  // namespace fastasr::cpu
