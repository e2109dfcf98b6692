// SPDX-License-Identifier: Apache-2.0
#include "cpu/depthwise_conv2d.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/instruction_sets.h"

#define FASTASR_BODY "cpu/depthwise_conv2d_body.h"
#include "cpu/each_instruction_set.h"

namespace fastasr::cpu {
namespace {

template <typename T>
void reduce(const DepthwiseSizes& s, const double* parts, T* dweight, T* dbias) {
  using C = compute_t<T>;
  const int64_t taps = s.taps(), groups = depthwise_groups(s);
  std::vector<double> sum(static_cast<size_t>((taps + 1) * s.channels));
  for (int64_t g = 0; g < groups; g++)
    for (int64_t i = 0; i < (taps + 1) * s.channels; i++) sum[size_t(i)] += parts[g * (taps + 1) * s.channels + i];
  for (int64_t c = 0; c < s.channels; c++) {
    for (int64_t k = 0; k < taps; k++) store(&dweight[c * taps + k], static_cast<C>(sum[size_t(k * s.channels + c)]));
    if (dbias) store(&dbias[c], static_cast<C>(sum[size_t(taps * s.channels + c)]));
  }
}

}  // namespace

#define FASTASR_DEFINE(T)                                                                                        \
  void depthwise_conv2d_forward(const DepthwiseSizes& s, const T* in, const T* weight, const T* bias, bool flip, \
                                T* out, int64_t begin, int64_t end) {                                            \
    FASTASR_DISPATCH(forward(s, in, weight, bias, flip, out, begin, end));                                       \
  }                                                                                                              \
  void depthwise_conv2d_weight_gradient(const DepthwiseSizes& s, const T* grad, const T* in, double* parts,      \
                                        int64_t begin, int64_t end) {                                            \
    FASTASR_DISPATCH(weight_gradient(s, grad, in, parts, begin, end));                                           \
  }                                                                                                              \
  void depthwise_conv2d_reduce(const DepthwiseSizes& s, const double* parts, T* dweight, T* dbias) {             \
    reduce(s, parts, dweight, dbias);                                                                            \
  }

FASTASR_DEFINE(float)
FASTASR_DEFINE(double)
FASTASR_DEFINE(bfloat16)
FASTASR_DEFINE(float16)

}  // namespace fastasr::cpu
