// SPDX-License-Identifier: Apache-2.0
#include "cpu/streaming/mega_step.h"

#include <algorithm>
#include <cmath>

#include "cpu/gemm/skinny_gemm.h"

namespace fastasr::cpu {
namespace {

constexpr int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

}  // namespace

MegaLayout::MegaLayout(const MegaShape& s) : shape(s) {
  const int64_t average_size = s.size * s.orders;
  const int64_t sizes[kMegaVectors] = {average_size, average_size, average_size, s.size, s.key,  s.key,  s.key,
                                       s.key,        s.size,       s.size,       1,      s.size, s.size, 1};
  const int64_t in[kMegaProducts] = {s.size, s.size, s.size, s.size, s.size, s.value, s.size, s.inner};
  const int64_t out[kMegaProducts] = {s.value, s.size, s.key, s.value, s.size, s.size, s.inner, s.size};
  int64_t at = 0;
  for (int i = 0; i < kMegaVectors; i++) {
    vector[i] = at, vector_size[i] = sizes[i];
    at += aligned(sizes[i]);
  }
  for (int i = 0; i < kMegaProducts; i++) {
    inputs[i] = in[i], outputs[i] = out[i], stride[i] = panel_count(out[i]) * kPanelColumns;
    bias[i] = at;
    at += stride[i];
  }
  for (int i = 0; i < kMegaProducts; i++) {
    weight[i] = at;
    at += packed_size(out[i], in[i]);
  }
  block = at;
  final_scale = s.blocks * block;
  final_bias = final_scale + aligned(s.size);
  final_eps = final_bias + aligned(s.size);
  total = final_eps + aligned(1);
}

void mega_pack_block(const MegaLayout& l, const MegaParameters& p, float* block) {
  const MegaShape& s = l.shape;
  const auto logistic = [](float x) { return 1 / (1 + std::exp(-static_cast<double>(x))); };
  const double scaling = std::sqrt(1.0 / static_cast<double>(s.orders));
  for (int64_t i = 0; i < s.size * s.orders; i++) {
    const double damping = logistic(p.damping[i]);
    block[l.vector[kMegaInput] + i] = static_cast<float>(damping * static_cast<double>(p.expansion[i]));
    block[l.vector[kMegaDecay] + i] = static_cast<float>(1 - damping * logistic(p.decay[i]));
    block[l.vector[kMegaProjection] + i] = static_cast<float>(scaling * static_cast<double>(p.projection[i]));
  }
  const auto copy = [&](MegaVector to, const float* from, double factor, float missing) {
    for (int64_t i = 0; i < l.vector_size[to]; i++)
      block[l.vector[to] + i] = from ? static_cast<float>(factor * static_cast<double>(from[i])) : missing;
  };
  const double root = 1 / std::sqrt(static_cast<double>(s.key));
  copy(kMegaResidual, p.residual, 1, 0);
  copy(kMegaQueryScale, p.qk_weight, root, 0);
  copy(kMegaQueryBias, p.qk_bias, root, 0);
  copy(kMegaKeyScale, p.qk_weight + s.key, 1, 0);
  copy(kMegaKeyBias, p.qk_bias + s.key, 1, 0);
  copy(kMegaNormScale, p.norm_weight, 1, 1);
  copy(kMegaNormBias, p.norm_bias, 1, 0);
  copy(kMegaNormEps, &p.norm_eps, 1, 0);
  copy(kMegaOuterNormScale, p.outer_norm_weight, 1, 1);
  copy(kMegaOuterNormBias, p.outer_norm_bias, 1, 0);
  copy(kMegaOuterNormEps, &p.outer_norm_eps, 1, 0);

  const auto product = [&](MegaProduct to, const float* weight, const float* bias) {
    const int64_t n = l.outputs[to], k = l.inputs[to];
    pack_panels(weight, n, k, k, WeightFormat::fp32, block + l.weight[to], nullptr, 0, panel_count(n));
    for (int64_t i = 0; i < l.stride[to]; i++) block[l.bias[to] + i] = bias && i < n ? bias[i] : 0.0f;
  };
  product(kMegaV, p.v_weight, p.v_bias);
  int64_t row = 0;
  for (const MegaProduct part : {kMegaU, kMegaZ, kMegaR, kMegaHx}) {
    product(part, p.mx_weight + row * s.size, p.mx_bias ? p.mx_bias + row : nullptr);
    row += l.outputs[part];
  }
  product(kMegaH, p.h_weight, p.h_bias);
  product(kMegaI, p.inner_weight, p.inner_bias);
  product(kMegaO, p.outer_weight, p.outer_bias);
}

void mega_pack_final(const MegaLayout& l, const float* weight, const float* bias, float eps, float* arena) {
  for (int64_t i = 0; i < l.shape.size; i++) {
    arena[l.final_scale + i] = weight ? weight[i] : 1.0f;
    arena[l.final_bias + i] = bias ? bias[i] : 0.0f;
  }
  arena[l.final_eps] = eps;
}

}  // namespace fastasr::cpu
