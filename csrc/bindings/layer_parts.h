// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bindings/dispatch.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/reduced_gemm.h"

// The functions of operators that the operator of a whole layer calls. The schemas beside their definitions describe
// the arguments; a struct of arguments is checked before (`checked`).
namespace fastasr::bindings {

namespace gemm {
void multiply(const cpu::Gemm<float>& g);
Tensor linear_few_rows(const Tensor& x, const Tensor& weight, const Optional& bias);
}  // namespace gemm

namespace reduced_gemm {
// Takes x, y, bias, sizes, format and input from g.
void multiply(cpu::ReducedGemm g, const Tensor& packed);
}  // namespace reduced_gemm

namespace linear_activation {
Tensor linear_activation_forward(const Tensor& z, int64_t activation, bool in_place, bool gated, double p,
                                 const Optional& seed, const Optional& keep, const Optional& bias = {});
}  // namespace linear_activation

namespace swoosh {
Tensor swoosh_forward(const Tensor& x, bool swoosh_r, const Optional& mask, int64_t shared_dim,
                      const Optional& mask_row);
}  // namespace swoosh

namespace bypass {
struct BypassForward;
Tensor bypass_forward(const BypassForward& a);
}  // namespace bypass

namespace bias_norm {
struct BiasNormForward;
Tensor bias_norm_forward(const BiasNormForward& a);
}  // namespace bias_norm

namespace nonlin_attention {
Tensor nonlin_attention_gate(const Tensor& projected);
Tensor nonlin_attention_product(const Tensor& projected, const Tensor& o);
}  // namespace nonlin_attention

namespace weighted_values {
Tensor weighted_values(const Tensor& weights, const Tensor& values);  // returns (rows, batch, width)
Tensor weighted_values_packed(std::vector<Tensor> weights, const Tensor& values);
}  // namespace weighted_values

namespace zipformer_attention_weights {
struct ZipformerAttentionWeightsForward;
Tensor zipformer_attention_weights_forward(const ZipformerAttentionWeightsForward& a);
std::vector<Tensor> zipformer_attention_weights_packed_forward(const Tensor& x, const Optional& pos,
                                                               std::vector<int64_t> lengths, int64_t heads,
                                                               int64_t query_dim, int64_t chunk, int64_t left_chunks);
}  // namespace zipformer_attention_weights

namespace gated_depthwise_conv {
struct GatedDepthwiseConvForward;
std::tuple<Tensor, Tensor> gated_depthwise_conv_forward(const GatedDepthwiseConvForward& a);
}  // namespace gated_depthwise_conv

}  // namespace fastasr::bindings
