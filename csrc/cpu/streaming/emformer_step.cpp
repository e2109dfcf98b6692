// SPDX-License-Identifier: Apache-2.0
#include "cpu/streaming/emformer_step.h"

#include <algorithm>
#include <cstring>

namespace fastasr::cpu {
namespace {

constexpr int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

}  // namespace

EmformerLayout::EmformerLayout(const EmformerShape& s) : shape(s) {
  const int64_t in[kEmformerProducts] = {s.dim, s.dim, s.dim, s.dim, s.inner};
  const int64_t out[kEmformerProducts] = {2 * s.dim, s.dim, s.dim, s.inner, s.dim};
  int64_t at = 0;
  const auto take = [&](int64_t floats) {
    const int64_t here = at;
    at += aligned(floats);
    return here;
  };
  for (int i = 0; i < kEmformerNorms; i++) norm_weight[i] = take(s.dim), norm_bias[i] = take(s.dim);
  for (int i = 0; i < kEmformerProducts; i++)
    inputs[i] = in[i], outputs[i] = out[i], bias[i] = take(panel_count(out[i]) * kPanelColumns);
  for (int i = 0; i < kEmformerProducts; i++) weight[i] = take(packed_size(out[i], in[i]));
  total = at;
}

void emformer_pack_product(const EmformerLayout& l, EmformerProduct p, const float* w, const float* bias,
                           float* arena) {
  const int64_t n = l.outputs[p], k = l.inputs[p];
  pack_panels(w, n, k, k, WeightFormat::fp32, arena + l.weight[p], nullptr, 0, panel_count(n));
  std::copy_n(bias, n, arena + l.bias[p]);
  std::fill(arena + l.bias[p] + n, arena + l.bias[p] + l.stride(p), 0.0f);
}

void emformer_pack_norm(const EmformerLayout& l, EmformerNorm n, const float* weight, const float* bias, float* arena) {
  std::copy_n(weight, l.shape.dim, arena + l.norm_weight[n]);
  std::copy_n(bias, l.shape.dim, arena + l.norm_bias[n]);
}

}  // namespace fastasr::cpu
