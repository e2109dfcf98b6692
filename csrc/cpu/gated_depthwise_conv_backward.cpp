// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

#include "cpu/activation.h"
#include "cpu/elementary.h"
#include "cpu/gated_depthwise_conv.h"
#include "cpu/instruction_sets.h"
#include "cpu/logistic_avx512.h"

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own avx512fintrin.h

#define FASTASR_BODY "cpu/gated_depthwise_conv_backward.h"
#include "cpu/each_instruction_set.h"

namespace fastasr::cpu {
namespace {

// out[channel][column] = sum over groups of parts[group][row + column][channel], in order, in double.
template <typename T>
void add_groups(const GatedDepthwiseConv<T>& conv, const compute_t<T>* parts, int64_t groups, int64_t row,
                int64_t columns, T* out) {
  if (out == nullptr) return;
  for (int64_t k = 0; k < columns; k++)
    for (int64_t c = 0; c < conv.channels; c++) {
      double sum = 0;
      for (int64_t g = 0; g < groups; g++)
        sum += static_cast<double>(parts[(g * conv.sums() + row + k) * conv.channels + c]);
      store(&out[c * columns + k], static_cast<compute_t<T>>(sum));
    }
}

template <typename T>
void reduce(const GatedDepthwiseConv<T>& conv, const compute_t<T>* parts, int64_t groups, T* dweight, T* dbias,
            T* dcausal_weight, T* dcausal_bias, T* dchunk_scale) {
  const int64_t K = conv.taps, P = conv.pad();
  add_groups(conv, parts, groups, 0, 1, dbias);
  add_groups(conv, parts, groups, 1, K, dweight);
  if (!conv.chunked()) return;
  add_groups(conv, parts, groups, 1 + K, 1, dcausal_bias);
  add_groups(conv, parts, groups, 2 + K, P + 1, dcausal_weight);
  add_groups(conv, parts, groups, 3 + K + P, K, dchunk_scale);
  add_groups(conv, parts, groups, 3 + K + P + K, K, dchunk_scale + conv.channels * K);
}

}  // namespace

#define FASTASR_DEFINE(T)                                                                                        \
  void gated_depthwise_conv_backward(const GatedDepthwiseConv<T>& conv, const T* grad, int64_t grad_time,        \
                                     int64_t grad_batch, T* dh, T* dcache, compute_t<T>* parts, int64_t groups,  \
                                     int64_t begin, int64_t end) {                                               \
    FASTASR_DISPATCH(backward(conv, grad, grad_time, grad_batch, dh, dcache, parts, groups, begin, end));        \
  }                                                                                                              \
  void gated_depthwise_conv_reduce(const GatedDepthwiseConv<T>& conv, const compute_t<T>* parts, int64_t groups, \
                                   T* dweight, T* dbias, T* dcausal_weight, T* dcausal_bias, T* dchunk_scale) {  \
    reduce(conv, parts, groups, dweight, dbias, dcausal_weight, dcausal_bias, dchunk_scale);                     \
  }

FASTASR_DEFINE(float)
FASTASR_DEFINE(double)
FASTASR_DEFINE(bfloat16)
FASTASR_DEFINE(float16)

}  // namespace fastasr::cpu
