// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd/kernels.h"

// The first two convolutions of FastConformer's front end, 3 x 3 taps and stride 2, with ReLU and a mask between them:
//   h[b, t, f, c] = mask[b, t] ReLU(bias[c] + sum over i, j < 3 of weight[c, i, j] x[b, 2 t + i, 2 f + j])
//   y[b, t, f, c] = depthwise_bias[c] + sum over i, j < 3 of depthwise_weight[c, i, j] h[b, 2 t + i, 2 f + j - left, c]
// x (batch, frames, bins), y (batch, out_frames, out_width, channels). Columns beyond those of h are 0.
namespace fastasr::cpu {

struct SubsamplingSizes {
  int64_t batch, frames, bins, channels, left;
  FASTASR_MEMBER int64_t first_frames() const { return (frames - 1) / 2; }
  FASTASR_MEMBER int64_t first_width() const { return (bins - 1) / 2; }
  FASTASR_MEMBER int64_t out_frames() const { return (first_frames() - 1) / 2; }
  FASTASR_MEMBER int64_t out_width() const { return (first_width() + left) / 2; }
};

template <typename T>
struct SubsamplingInputs {
  const T *x, *weight, *bias, *depthwise_weight, *depthwise_bias;  // biases may be null
  const bool* mask;                                                // (batch, first_frames) or null: all frames count
};

// Work comes in blocks of output frames of one sequence; the parameters' gradients of a group of blocks are added up on
// their own. The numbers of blocks and of groups depend on the sizes alone.
constexpr int64_t kSubsamplingFrames = 16, kSubsamplingGroups = 32;
constexpr int64_t kSubsamplingRows = 4 * kSubsamplingFrames + 3;  // frames of x that a block reads
constexpr int64_t kSubsamplingSums = 20;  // per channel: taps and bias of the first convolution, then of the second
FASTASR_INLINE int64_t subsampling_blocks(const SubsamplingSizes& s) {
  return s.batch * ((s.out_frames() + kSubsamplingFrames - 1) / kSubsamplingFrames);
}
FASTASR_INLINE int64_t subsampling_groups(const SubsamplingSizes& s) {
  return std::min(subsampling_blocks(s), kSubsamplingGroups);
}

template <typename T>
struct ConvSubsamplingKernels {
  // Computes blocks [begin, end).
  void (*forward)(const SubsamplingSizes& s, const SubsamplingInputs<T>& in, T* y, int64_t begin, int64_t end);
  // Computes groups [begin, end): parts (groups, kSubsamplingSums, channels), and unless dx_parts is null what each
  // block adds to dx, (blocks, kSubsamplingRows, bins).
  void (*backward)(const SubsamplingSizes& s, const SubsamplingInputs<T>& in, const T* grad, double* parts,
                   double* dx_parts, int64_t begin, int64_t end);
  // Adds up the groups' sums, in order.
  void (*reduce)(const SubsamplingSizes& s, const double* parts, T* dweight, T* dbias, T* ddepthwise_weight,
                 T* ddepthwise_bias);
  // Adds up what the blocks of sequences [begin, end) add to dx, in order.
  void (*add_blocks)(const SubsamplingSizes& s, const double* dx_parts, T* dx, int64_t begin, int64_t end);
};

}  // namespace fastasr::cpu
