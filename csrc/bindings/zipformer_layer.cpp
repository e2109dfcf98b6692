// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "bindings/layer_parts.h"
#include "bindings/pooled.h"
#include "bindings/written/bias_norm.h"
#include "bindings/written/bypass.h"
#include "bindings/written/gated_depthwise_conv.h"
#include "bindings/written/zipformer_attention_weights.h"
#include "cpu/conv/gated_depthwise_conv.h"
#include "cpu/rows/add.h"
#include "cpu/streaming/zipformer_order.h"

// A whole layer of Zipformer's encoder in inference, in float32: the kernels of its ops one after the other, as
// fastasr/models/zipformer/layer.py calls them. Python and torch's dispatcher take half a millisecond for the 45 calls
// of a layer; the bits equal those of the calls.
namespace fastasr::bindings::zipformer_layer {
namespace {

constexpr const char* kOp = "zipformer_layer";

// The way a product is computed. The last two are cpu::WeightFormat's formats, after kReduced.
constexpr int64_t kTorch = 0, kGemm = 1, kFewRows = 2, kReduced = 2;

struct Product {
  const Tensor *weight, *bias;  // the weight is a matrix, or a packed copy where `way` says so
  int64_t way, outputs;
};
struct Module {
  Product in, out;
};
// The convolution's tensors; the last three are null but in the chunk-causal form.
struct Convolution {
  const Tensor *weight, *bias, *causal_weight, *causal_bias, *chunk_scale;
};

struct Weights {
  Product scores, positions;  // products of the attention weights
  Module forward[3], nonlin, attention[2], convolution[2];

  // Calls f(name, product) for every product in the order in which lists have them.
  template <typename F>
  void each_product(const F& f) {
    f("self_attn_weights.in_proj", scores), f("self_attn_weights.linear_pos", positions);
    f("feed_forward1.in_proj", forward[0].in), f("feed_forward1.out_proj", forward[0].out);
    f("nonlin_attention.in_proj", nonlin.in), f("nonlin_attention.out_proj", nonlin.out);
    f("self_attn1.in_proj", attention[0].in), f("self_attn1.out_proj", attention[0].out);
    f("conv_module1.in_proj", convolution[0].in), f("conv_module1.out_proj", convolution[0].out);
    f("feed_forward2.in_proj", forward[1].in), f("feed_forward2.out_proj", forward[1].out);
    f("self_attn2.in_proj", attention[1].in), f("self_attn2.out_proj", attention[1].out);
    f("conv_module2.in_proj", convolution[1].in), f("conv_module2.out_proj", convolution[1].out);
    f("feed_forward3.in_proj", forward[2].in), f("feed_forward3.out_proj", forward[2].out);
  }
};

using Tensors = std::vector<Tensor>;

Tensor by_torch(const char* name, std::array<StableIValue, 3> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Adds x to y and returns it.
Tensor plus(const Tensor& x, Tensor y) {
  check_same_size(x, y, kOp, "a sum");
  const auto& kernel = cpu::kernels<cpu::AddKernel>();
  const float* const xp = data<float>(x);
  float* const yp = mutable_data<float>(y);
  parallel_range(y.numel(), kGrain,
                 [&](int64_t begin, int64_t end) { kernel.run(xp + begin, yp + begin, end - begin); });
  return y;
}

// The modules, see cpu::run_zipformer_layer.
struct Layer {
  const Weights& weights;
  const Convolution (&convolutions)[2];
  int64_t first_head_way;
  const Tensor &src, &positions, &mid, &norm_bias, &norm_log_scale, &bypass;
  const Optional &padding, &mask;
  int64_t heads, query_dim, chunk, left_chunks, conv_chunk;
  Tensor x = src, attention = src;

  void attention_weights() {
    using zipformer_attention_weights::ZipformerAttentionWeightsForward;
    const Tensor projected = linear(weights.scores, x);
    const Optional pos = linear(weights.positions, positions);
    attention = zipformer_attention_weights_forward(checked(
        ZipformerAttentionWeightsForward{projected, pos, {}, padding, mask, heads, query_dim, chunk, left_chunks}));
  }

  void feed_forward(int i) {
    const Module& m = weights.forward[i];
    if (m.in.way != kGemm || m.out.way > kReduced)
      x = linear(m.out, linear(m.in, x), cpu::ReducedInput::swoosh_l, x);
    else
      x = linear(m.out, multiplied(m.in, x, {}, true), cpu::ReducedInput::x, x);
  }

  void nonlin_attention() {
    const Tensor projected = linear(weights.nonlin.in, x);
    const Tensor o = of_first_head(bindings::nonlin_attention::gate(projected));
    x = linear(weights.nonlin.out, bindings::nonlin_attention::product(projected, o), cpu::ReducedInput::x, x);
  }

  void self_attention(int i) {
    const Module& m = weights.attention[i];
    x = linear(m.out, weighted_values::weighted_values(attention, linear(m.in, x)), cpu::ReducedInput::x, x);
  }

  void convolution(int i) {
    const Module& m = weights.convolution[i];
    const Convolution& c = convolutions[i];
    const auto at = [](const Tensor* t) { return t ? Optional(*t) : Optional(); };
    const auto swoosh_r = static_cast<int64_t>(cpu::GatedActivation::swoosh_r);
    const auto sigmoid = static_cast<int64_t>(cpu::Gate::sigmoid);
    const Tensor h = linear(m.in, x);
    const Tensor y = std::get<0>(
        gated_depthwise_conv_forward(checked(gated_depthwise_conv::GatedDepthwiseConvForward{h,
                                                                                             *c.weight,
                                                                                             at(c.bias),
                                                                                             at(c.causal_weight),
                                                                                             at(c.causal_bias),
                                                                                             at(c.chunk_scale),
                                                                                             padding,
                                                                                             {},
                                                                                             conv_chunk,
                                                                                             swoosh_r,
                                                                                             false,
                                                                                             0,
                                                                                             sigmoid})));
    x = linear(m.out, y, cpu::ReducedInput::x, x);
  }

  void bypass_mid() { x = bypass::bypass_forward(checked(bypass::BypassForward{src, x, mid})); }

  void norm_and_bypass() {
    const Tensor normed =
        bias_norm::bias_norm_forward(checked(bias_norm::BiasNormForward{x, norm_bias, norm_log_scale}));
    x = bypass::bypass_forward(checked(bypass::BypassForward{src, normed, bypass}));
  }

 private:
  // Returns f(x) weightᵀ + bias, where f is SwooshL, SwooshR or nothing, and `onto` more if that is given.
  static Tensor linear(const Product& p, const Tensor& x, cpu::ReducedInput f = cpu::ReducedInput::x,
                       const Optional& onto = {}) {
    if (p.way > kReduced) {
      const Tensor y = new_pooled(x, {x.size(0), x.size(1), p.outputs});
      cpu::ReducedGemm g{};
      g.x = data<float>(x), g.x_row = g.k = x.size(2), g.bias = data_or_null<float>(bias(p));
      g.y = mutable_data<float>(y), g.y_row = g.n = p.outputs, g.m = x.size(0) * x.size(1);
      g.format = static_cast<cpu::WeightFormat>(p.way - kReduced), g.input = f;
      reduced_gemm::multiply(g, *p.weight);
      return onto ? plus(*onto, y) : y;
    }
    if (f != cpu::ReducedInput::x)
      return multiplied(p, swoosh::swoosh_forward(x, f == cpu::ReducedInput::swoosh_r, {}, -1), onto);
    return multiplied(p, x, onto);
  }

  static Optional bias(const Product& p) { return p.bias->numel() ? Optional(*p.bias) : Optional(); }

  static Tensor multiplied(const Product& p, const Tensor& x, const Optional& onto, bool swoosh_l = false) {
    using torch::stable::detail::from;
    const Tensor& weight = *p.weight;
    const int64_t k = x.size(2), n = p.outputs;
    check(weight.dim() == 2 && weight.size(0) == n && weight.size(1) == k, kOp, "a weight has another shape");
    if (p.way == kTorch || p.way == kFewRows) {
      const Tensor y = p.way == kTorch ? by_torch("aten::linear", {from(x), from(weight), from(bias(p))})
                                       : gemm::linear_few_rows(x, weight, bias(p));
      return onto ? plus(*onto, y) : y;
    }
    const Tensor y = new_pooled(x, {x.size(0), x.size(1), n});
    cpu::Gemm<float> g{};
    g.a = data<float>(x), g.a_row = k, g.a_depth = 1;
    g.bias = data_or_null<float>(bias(p));
    g.c = mutable_data<float>(y), g.c_row = n, g.m = x.size(0) * x.size(1), g.n = n, g.k = k;
    g.swoosh_l = swoosh_l;
    if (onto) {
      check_same_size(y, *onto, kOp, "a sum");
      g.onto = data<float>(*onto), g.onto_row = n;
    }
    g.b = data<float>(weight), g.b_depth = weight.stride(1), g.b_column = weight.stride(0);
    gemm::multiply(g);
    return y;
  }

  // Returns (batch, time, channels) for values (time, batch, channels).
  Tensor of_first_head(const Tensor& values) const {
    const int64_t frames = values.size(0), batch = values.size(1), channels = values.size(2);
    if (first_head_way == kTorch) {
      using torch::stable::detail::from;
      std::array<StableIValue, 2> stack{from(torch::stable::select(attention, 0, 0)),
                                        from(torch::stable::transpose(values, 0, 1))};
      STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "", stack.data(), TORCH_ABI_VERSION));
      return torch::stable::detail::to<Tensor>(stack[0]);
    }
    const Tensor o = new_pooled(values, {batch, frames, channels});
    for (int64_t b = 0; b < batch; b++) {
      cpu::Gemm<float> g{};
      g.a = data<float>(attention) + b * attention.stride(1), g.a_row = attention.stride(2), g.a_depth = 1;
      g.b = data<float>(values) + b * channels, g.b_depth = batch * channels, g.b_column = 1;
      g.c = mutable_data<float>(o) + b * frames * channels, g.c_row = channels;
      g.m = g.k = frames, g.n = channels;
      gemm::multiply(g);
    }
    return o;
  }
};

// Returns the names of the products, in their order.
std::string zipformer_layer_names() {
  std::string names;
  Weights().each_product([&](const char* name, const Product&) { names += name, names += ' '; });
  return names;
}

Convolution convolution_of(const Tensors& tensors, size_t which) {
  const size_t each = tensors.size() / 2;
  const auto at = [&](size_t i) { return i < each ? &tensors[which * each + i] : nullptr; };
  return {at(0), at(1), at(2), at(3), at(4)};
}

// Takes src (time, batch, channels), contiguous, and positions (1 or batch, 2 time - 1, pos_dim). weights, biases, ways
// and outputs have the order of zipformer_layer_names; an absent bias has no elements. convolutions are the tensors of
// both modules. chunk and left_chunks belong to attention, conv_chunk to the convolutions.
Tensor zipformer_layer(const Tensor& src, const Tensor& positions, const Optional& padding, const Optional& mask,
                       Tensors weights, Tensors biases, std::vector<int64_t> ways, std::vector<int64_t> outputs,
                       int64_t first_head_way, Tensors convolutions, Tensor bypass_mid, Tensor norm_bias,
                       Tensor norm_log_scale, Tensor bypass, int64_t heads, int64_t query_dim, int64_t chunk,
                       int64_t left_chunks, int64_t conv_chunk) {
  check(src.dim() == 3 && src.is_cpu() && is_dense(src, ScalarType::Float, {src.size(0), src.size(1), src.size(2)}),
        kOp, "src");
  check(positions.dim() == 3 && positions.is_contiguous() && dtype_of(positions) == ScalarType::Float, kOp,
        "positions");
  const auto check_parameter = [](const Tensor& t) {
    check(t.is_cpu() && t.is_contiguous() && dtype_of(t) == ScalarType::Float, kOp, "a parameter");
  };
  for (const Tensors* list : {&weights, &biases, &convolutions})
    for (const Tensor& t : *list) check_parameter(t);
  for (const Tensor* t : {&bypass_mid, &norm_bias, &norm_log_scale, &bypass}) check_parameter(*t);
  check(convolutions.size() == 4 || convolutions.size() == 10, kOp, "convolutions");
  Weights products{};
  size_t count = 0;
  products.each_product([&](const char* name, Product& p) {
    const size_t i = count++;
    check(i < std::min({weights.size(), biases.size(), ways.size(), outputs.size()}), kOp, name, " is missing");
    p = {&weights[i], &biases[i], ways[i], outputs[i]};
    check(p.bias->numel() == 0 || p.bias->numel() == p.outputs, kOp, "the bias of ", name, " has another size");
  });
  const Convolution both[2] = {convolution_of(convolutions, 0), convolution_of(convolutions, 1)};
  Layer layer{products, both,    first_head_way, src,   positions, bypass_mid, norm_bias,   norm_log_scale,
              bypass,   padding, mask,           heads, query_dim, chunk,      left_chunks, conv_chunk};
  cpu::run_zipformer_layer(layer);
  return layer.x;
}

}  // namespace

FASTASR_UNDECLARED(
    "fastasr/models/zipformer/whole_layer.py calls it without gradients, with tensors of a layer that it checked",

    {"zipformer_layer_names() -> str", Boxed<zipformer_layer_names>::call},
    {"zipformer_layer(Tensor src, Tensor positions, Tensor? key_padding_mask, Tensor? attn_mask, "
     "Tensor[] weights, Tensor[] biases, int[] ways, int[] outputs, int first_head_way, Tensor[] convolutions, "
     "Tensor bypass_mid, Tensor norm_bias, Tensor norm_log_scale, Tensor bypass, int num_heads, int query_head_dim, "
     "int chunk_size, int left_context_chunks, int conv_chunk_size) -> Tensor",
     Boxed<zipformer_layer>::call})

STABLE_TORCH_LIBRARY_IMPL(fastasr_cpu, CompositeExplicitAutograd, m) {
  m.impl("zipformer_layer_names", Boxed<zipformer_layer_names>::call);
}

}  // namespace fastasr::bindings::zipformer_layer
