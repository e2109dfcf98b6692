// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace fastasr::cpu {

// Runs a layer of Zipformer's encoder: calls the modules in their order. `modules` computes them, each from the stream
// x, which begins as the layer's input, and adds what a module computes to x. Whole sequences
// (bindings/zipformer_layer.cpp) and chunks (zipformer_chunk_layer.simd.h) have modules of their own.
template <typename Modules>
void run_zipformer_layer(Modules& modules) {
  modules.attention_weights();
  modules.feed_forward(0);
  modules.nonlin_attention();
  modules.self_attention(0);
  modules.convolution(0);
  modules.feed_forward(1);
  modules.bypass_mid();
  modules.self_attention(1);
  modules.convolution(1);
  modules.feed_forward(2);
  modules.norm_and_bypass();
}

}  // namespace fastasr::cpu
