// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

// What the native calls of a layer of Zipformer's encoder share: its sizes, its products and the order of its modules.
// Two calls compute the modules. Whole sequences (bindings/zipformer_layer.cpp) give the bits of the model's own
// submodules, so they run the kernels of these on the model's own weights. A chunk (zipformer_chunk_layer.simd.h) takes
// as long as reading the weights, so it reads packed ones.
namespace fastasr::cpu {

// The sizes of a stack of equal layers, or of a layer alone, whose factor and layers are 1.
struct ZipformerSizes {
  int64_t dim, factor, layers, heads, query, value, pos, taps, inner[3], hidden;

  // Calls f(name, field) for every size, in the order in which a list of ints has them. ZipformerSizes in
  // fastasr/models/zipformer/packing.py has the same names.
  template <typename F>
  void each_size(const F& f) {
    f("dim", dim), f("factor", factor), f("layers", layers), f("heads", heads), f("query", query), f("value", value);
    f("pos", pos), f("taps", taps), f("inner1", inner[0]), f("inner2", inner[1]), f("inner3", inner[2]);
    f("hidden", hidden);
  }
};

// Reads the sizes of stacks from `sizes`, from index `at` to the end. It returns none if they do not describe stacks.
std::vector<ZipformerSizes> read_stacks(const std::vector<int64_t>& sizes, size_t at);

// The products of a layer but that of the positions, which a chunk multiplies when it packs.
template <typename Product>
struct ZipformerProducts {
  struct Module {
    Product in, out;
  };
  Product scores;  // of queries, keys and the queries of positions
  Module feed_forward[3], nonlin, attention[2], convolution[2];

  // Calls f(name, product, inputs, outputs) for every product, in the order in which they run and in which lists have
  // them. PRODUCTS in fastasr/models/zipformer/packing.py has the same names.
  template <typename F>
  void each_product(const ZipformerSizes& n, const F& f) {
    const auto module = [&](const char* in, const char* out, Module& m, int64_t projected, int64_t hidden) {
      f(in, m.in, n.dim, projected), f(out, m.out, hidden, n.dim);
    };
    const int64_t values = n.heads * n.value;
    f("self_attn_weights.in_proj", scores, n.dim, n.heads * (2 * n.query + n.pos));
    module("feed_forward1.in_proj", "feed_forward1.out_proj", feed_forward[0], n.inner[0], n.inner[0]);
    module("nonlin_attention.in_proj", "nonlin_attention.out_proj", nonlin, 3 * n.hidden, n.hidden);
    module("self_attn1.in_proj", "self_attn1.out_proj", attention[0], values, values);
    module("conv_module1.in_proj", "conv_module1.out_proj", convolution[0], 2 * n.dim, n.dim);
    module("feed_forward2.in_proj", "feed_forward2.out_proj", feed_forward[1], n.inner[1], n.inner[1]);
    module("self_attn2.in_proj", "self_attn2.out_proj", attention[1], values, values);
    module("conv_module2.in_proj", "conv_module2.out_proj", convolution[1], 2 * n.dim, n.dim);
    module("feed_forward3.in_proj", "feed_forward3.out_proj", feed_forward[2], n.inner[2], n.inner[2]);
  }
};

// Calls the modules of a layer in their order. `modules` computes them, each from the stream x, which begins as the
// layer's input, and adds what a module computes to x.
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
