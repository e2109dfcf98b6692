// SPDX-License-Identifier: Apache-2.0
#include "cpu/decoding/greedy_search.h"

#include <algorithm>
#include <vector>

namespace fastasr::cpu {
namespace {

constexpr int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

float* floats(char* arena, int64_t at) { return reinterpret_cast<float*>(arena + at); }

void pack(const GreedyLayout& l, const GreedyLayout::Product& p, const float* weight, int64_t outputs,
          const float* bias, char* arena) {
  float* const scale = l.shape.format == WeightFormat::int8 ? floats(arena, p.scale) : nullptr;
  pack_panels(weight, outputs, p.inputs, p.inputs, l.shape.format, arena + p.weight, scale, 0, panel_count(p.outputs));
  float* const to = floats(arena, p.bias);
  for (int64_t i = 0; i < l.stride(p); i++) to[i] = bias && i < outputs ? bias[i] : 0.0f;
}

}  // namespace

GreedyLayout::GreedyLayout(const GreedyShape& s) : shape(s) {
  const int64_t units = (s.hidden + kGateUnits - 1) / kGateUnits * kGateUnits;
  for (int64_t i = 0; i < s.layers; i++)
    product[i] = {(i ? s.hidden : s.embedding) + s.hidden, s.gate_norm ? 4 * s.hidden : 4 * units, 0, 0, 0};
  product[s.layers] = {s.stateless() ? s.embedding : s.hidden, s.joint, 0, 0, 0};
  product[s.layers + 1] = {s.joint, s.tokens + s.durations, 0, 0, 0};
  int64_t at = 0;
  const auto take = [&](int64_t size) {
    const int64_t here = at;
    at += aligned(size);
    return here;
  };
  convolution = take(4 * s.embedding * s.group * s.context);
  norm_weight = take(s.norm ? 4 * s.joint : 0), norm_bias = take(s.norm ? 4 * s.joint : 0);
  for (int64_t i = 0; i < s.layers; i++) gate_norm[i] = take(s.gate_norm ? 4 * 10 * s.hidden : 0);
  for (int64_t i = 0; i < s.products(); i++) {
    Product& p = product[i];
    p.bias = take(4 * stride(p));
    p.scale = take(s.format == WeightFormat::int8 ? 4 * stride(p) : 0);
    p.weight = take(packed_size(p.outputs, p.inputs) * weight_bytes(s.format));
  }
  bytes = at;
  state_floats = 2 * s.layers * s.hidden + s.joint;
  counter_fields = kGreedyTokens + (s.stateless() ? s.context : 1);
}

void greedy_pack_lstm(const GreedyLayout& l, int64_t layer, const float* w_ih, const float* w_hh, const float* bias_ih,
                      const float* bias_hh, char* arena) {
  const GreedyLayout::Product& p = l.product[layer];
  const int64_t hidden = l.shape.hidden, inputs = p.inputs - hidden;
  std::vector<float> weight(static_cast<size_t>(p.outputs * p.inputs)), bias(static_cast<size_t>(p.outputs));
  for (int64_t unit = 0; unit < hidden; unit++)
    for (int64_t gate = 0; gate < 4; gate++) {
      const int64_t from = gate * hidden + unit;
      // A panel has all gates of its units, unless a norm must have seen them all.
      const int64_t apart = unit / kGateUnits * kPanelColumns + gate * kGateUnits + unit % kGateUnits;
      const int64_t to = l.shape.gate_norm ? from : apart;
      float* const row = weight.data() + to * p.inputs;
      std::copy_n(w_ih + from * inputs, inputs, row);
      std::copy_n(w_hh + from * hidden, hidden, row + inputs);
      bias[static_cast<size_t>(to)] = (bias_ih ? bias_ih[from] : 0.0f) + (bias_hh ? bias_hh[from] : 0.0f);
    }
  pack(l, p, weight.data(), p.outputs, bias.data(), arena);
}

void greedy_pack_linear(const GreedyLayout& l, bool head, const float* weight, const float* bias, char* arena) {
  const GreedyLayout::Product& p = head ? l.head() : l.projector();
  pack(l, p, weight, p.outputs, bias, arena);
}

void greedy_pack_vectors(const GreedyLayout& l, const float* convolution, const float* norm_weight,
                         const float* norm_bias, char* arena) {
  const GreedyShape& s = l.shape;
  if (s.group) std::copy_n(convolution, s.embedding * s.group * s.context, floats(arena, l.convolution));
  if (!s.norm) return;
  std::copy_n(norm_weight, s.joint, floats(arena, l.norm_weight));
  std::copy_n(norm_bias, s.joint, floats(arena, l.norm_bias));
}

void greedy_pack_gate_norm(const GreedyLayout& l, int64_t layer, const float* const parameters[4], char* arena) {
  float* to = floats(arena, l.gate_norm[layer]);
  for (int i = 0; i < 4; i++) to = std::copy_n(parameters[i], (i < 2 ? 4 : 1) * l.shape.hidden, to);
}

}  // namespace fastasr::cpu
