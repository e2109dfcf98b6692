// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/conv/depthwise_conv2d.h"
#include "cpu/gemm/skinny_gemm.h"
#include "cpu/rows/bias_norm.h"
#include "cpu/rows/swoosh.h"
#include "cpu/streaming/zipformer_chunk_rows.simd.h"
#include "cpu/streaming/zipformer_chunk_scratch.h"

// Conv2dSubsampling for one chunk: three convolutions with SwooshR, a ConvNeXt layer, a linear layer, BiasNorm. Maps
// are channels last, (frames, bins, channels), so that a row of a convolution's patch is contiguous: a convolution is a
// product of the patches with the packed weights.
namespace fastasr::cpu {
inline namespace FASTASR_SIMD {

class Front {
 public:
  Front(const ChunkStep& step)
      : step_(step), p_(step.plan), n_(step.plan.shape), room_(step.plan, step.streams, step.scratch) {}

  void run(const float* features, float* x) const {
    for (int64_t i = 0; i < step_.streams; i++) {
      float* const past = step_.states + step_.slots[i] * p_.state_floats + p_.front_past;
      maps(features + i * n_.input_frames() * step_.bins, past);
      conv_next(room_.frames + i * n_.chunk * row());
      std::memcpy(past, room_.third + n_.chunk * row(), static_cast<size_t>(kFrontPast * row()) * 4);
    }
    const int64_t rows = step_.streams * n_.chunk, stride = p_.front_out.stride(), dim = p_.front_out.outputs;
    float* const y = room_.repeated;  // its convolutions are done
    chunk_product(step_, p_.front_out, room_.frames, row(), rows, room_.levels, y);
    for (int64_t r = 0; r < rows; r++) {
      kernels<BiasNormKernels<float>>().forward(y + r * stride, vector(p_.front_norm_bias),
                                                *vector(p_.front_norm_scale), x + r * stride, 1, dim);
      std::fill(x + r * stride + dim, x + (r + 1) * stride, 0.0f);
    }
  }

 private:
  int64_t row() const { return n_.width3() * n_.maps[2]; }  // floats of a frame after the third convolution
  const float* vector(const ChunkTable& t) const { return step_.vectors + t.at; }

  // Multiplies the rows of frame t, on one worker; the panels are not split.
  void product(const ChunkProduct& p, const float* x, int64_t rows, int64_t t, float* y) const {
    if (p.rounds_inputs) {
      const auto& kernel = reduced_gemm_kernels(p.format);
      const ReducedGemm g = chunk_reduced(step_, p, x, p.inputs, rows, room_.levels + t * room_.level, y);
      kernel.rows(g, 0, rows);
      return kernel.products(g, 0, kernel.tasks(g));
    }
    skinny_gemm(x, p.inputs, rows, p.inputs, p.panels(step_.weights, step_.vectors), step_.vectors + p.bias, y,
                p.stride(), 0, panel_count(p.outputs));
  }

  // Applies SwooshR to `rows` rows of a product, without their padding.
  static void activate(const float* y, int64_t stride, int64_t rows, int64_t width, Swoosh kind, float* out) {
    if (stride == width)
      return kernels<SwooshKernels<float>>().forward(y, nullptr, Mask::none, out, rows * width, kind);
    for (int64_t r = 0; r < rows; r++)
      kernels<SwooshKernels<float>>().forward(y + r * stride, nullptr, Mask::none, out + r * width, width, kind);
  }

  // Computes a row of a 3 x 3 convolution with `down` frames and 2 bins to the next: patches, product, activation.
  void convolve(const ChunkProduct& p, const float* in, int64_t down, int64_t bins, int64_t maps, int64_t t,
                int64_t width, float* out) const {
    float* const patches = room_.patches + t * width * p.inputs;
    const int64_t run = 3 * maps;
    for (int64_t b = 0; b < width; b++)
      for (int64_t i = 0; i < 3; i++)
        std::memcpy(patches + b * p.inputs + i * run, in + ((t * down + i) * bins + 2 * b) * maps,
                    static_cast<size_t>(run) * 4);
    float* const y = room_.product + t * width * p.stride();
    product(p, patches, width, t, y);
    activate(y, p.stride(), width, p.outputs, Swoosh::R, out + t * width * p.outputs);
  }

  // Convolves features (input_frames, bins) into room_.third, behind the frames of the chunk before.
  void maps(const float* features, const float* past) const {
    const int64_t m = n_.maps[0], bins = step_.bins, padded = (bins + 2) * m, w3 = n_.width3();
    const int64_t w2 = ChunkShape::width2_of(bins);
    for (int64_t t = 0; t < n_.input_frames(); t++) {
      float* const to = room_.repeated + t * padded;
      std::fill(to, to + m, 0.0f);
      for (int64_t b = 0; b < bins; b++) std::fill(to + (1 + b) * m, to + (2 + b) * m, features[t * bins + b]);
      std::fill(to + padded - m, to + padded, 0.0f);
    }
    step_.workers.split(n_.input_frames() - 2, 8, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const float* const rows[3] = {room_.repeated + t * padded, room_.repeated + (t + 1) * padded,
                                      room_.repeated + (t + 2) * padded};
        float* const y = room_.product + t * bins * m;
        chunk_first_convolution(rows, vector(p_.conv1), p_.conv1.stride, vector(p_.conv1_bias), m, y, bins * m);
        kernels<SwooshKernels<float>>().forward(y, nullptr, Mask::none, room_.first + t * bins * m, bins * m,
                                                Swoosh::R);
      }
    });
    step_.workers.split(n_.chunk + 5, 4, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) convolve(p_.conv2, room_.first, 2, bins, m, t, w2, room_.second);
    });
    std::memcpy(room_.third, past, static_cast<size_t>(kFrontPast * row()) * 4);
    step_.workers.split(n_.chunk + 3, 2, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        convolve(p_.conv3, room_.second, 1, w2, n_.maps[1], t, w3, room_.third + kFrontPast * row());
    });
  }

  // Writes out (chunk, width3 maps): the third convolution's frames plus ConvNeXt of them.
  void conv_next(float* out) const {
    const int64_t maps = n_.maps[2], w3 = n_.width3();
    const DepthwiseSizes sizes{1, n_.chunk + 6, w3, maps, 7, 7, 0, 3};
    step_.workers.split(depthwise_blocks(sizes), 1, [&](int64_t begin, int64_t end) {
      kernels<DepthwiseConv2dKernels<float>>().forward(sizes, room_.third, vector(p_.depthwise),
                                                       vector(p_.depthwise_bias), false, room_.filtered, begin, end);
    });
    step_.workers.split(n_.chunk, 2, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        float* const expanded = room_.expanded + t * w3 * p_.expand.stride();
        float* const activated = room_.activated + t * w3 * n_.expanded;
        float* const y = room_.contracted + t * w3 * p_.contract.stride();
        product(p_.expand, room_.filtered + t * row(), w3, t, expanded);
        activate(expanded, p_.expand.stride(), w3, n_.expanded, Swoosh::L, activated);
        product(p_.contract, activated, w3, t, y);
        float* const to = out + t * row();
        std::memcpy(to, room_.third + (kFrontPast + t) * row(), static_cast<size_t>(row()) * 4);
        for (int64_t b = 0; b < w3; b++) chunk_add(y + b * p_.contract.stride(), to + b * maps, maps);
      }
    });
  }

  const ChunkStep& step_;
  const ChunkPlan& p_;
  const ChunkShape& n_;
  FrontRoom room_;
};

}  // namespace FASTASR_SIMD
}  // namespace fastasr::cpu
