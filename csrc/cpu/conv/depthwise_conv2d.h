// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd/kernels.h"

// Depthwise convolution of maps (batch, frames, width, channels), zeros around them, stride 1:
//   out[b, t, f, c] = bias[c] + sum over i < taps_t, j < taps_f of weight[c, i, j] in[b, t + i - pad_t, f + j - pad_f,
//   c]
// The gradient of its input is the same with `flip` (weight[c, taps_t - 1 - i, taps_f - 1 - j]) and pads of taps - 1 -
// pad.
namespace fastasr::cpu {

struct DepthwiseSizes {
  int64_t batch, frames, width, channels, taps_t, taps_f, pad_t, pad_f;  // frames and width of the input
  FASTASR_MEMBER int64_t out_frames() const { return std::max<int64_t>(0, frames + 2 * pad_t - taps_t + 1); }
  FASTASR_MEMBER int64_t out_width() const { return std::max<int64_t>(0, width + 2 * pad_f - taps_f + 1); }
  FASTASR_MEMBER int64_t taps() const { return taps_t * taps_f; }
  FASTASR_MEMBER DepthwiseSizes transposed() const {
    return {batch, out_frames(), out_width(), channels, taps_t, taps_f, taps_t - 1 - pad_t, taps_f - 1 - pad_f};
  }
};

// Work comes in blocks of output frames of one sequence with all channels; the weight gradients of a group of blocks
// are added up on their own. The numbers of blocks and of groups depend on the sizes alone.
constexpr int64_t kDepthwiseFrames = 32, kDepthwiseGroups = 32;
FASTASR_INLINE int64_t depthwise_blocks(const DepthwiseSizes& s) {
  return s.batch * ((s.out_frames() + kDepthwiseFrames - 1) / kDepthwiseFrames);
}
FASTASR_INLINE int64_t depthwise_groups(const DepthwiseSizes& s) {
  return std::min(depthwise_blocks(s), kDepthwiseGroups);
}

template <typename T>
struct DepthwiseConv2dKernels {
  // Computes blocks [begin, end); bias may be null.
  void (*forward)(const DepthwiseSizes& s, const T* in, const T* weight, const T* bias, bool flip, T* out,
                  int64_t begin, int64_t end);
  // Adds groups [begin, end) into parts (groups, taps + 1, channels): sums of grad in, then of grad.
  void (*weight_gradient)(const DepthwiseSizes& s, const T* grad, const T* in, double* parts, int64_t begin,
                          int64_t end);
  // Adds the groups' sums, in order, into dweight (channels, taps) and dbias (channels), which may be null.
  void (*reduce)(const DepthwiseSizes& s, const double* parts, T* dweight, T* dbias);
};

}  // namespace fastasr::cpu
