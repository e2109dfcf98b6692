// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <vector>

#include "bindings/layer_parts.h"
#include "bindings/pooled.h"
#include "cpu/conv/gated_depthwise_conv.h"
#include "cpu/rows/add.h"

// A whole layer of Zipformer's encoder in inference, in float32: the kernels of its ops one after the other, as
// fastasr/models/zipformer/layer.py calls them. Python and torch's dispatcher take half a millisecond for the 45 calls
// of a layer; the bits are those of the calls.
namespace fastasr::bindings::zipformer_layer {
namespace {

constexpr const char* kOp = "zipformer_layer";

// What computes a product. The last two are cpu::WeightFormat's formats, after kReduced.
constexpr int64_t kTorch = 0, kGemm = 1, kFewRows = 2, kReduced = 2;

// The products of a layer in the order of `weights`. Two follow each other in every module: in_proj and out_proj.
enum Product : size_t {
  kScores,  // in_proj of the attention weights, then linear_pos
  kPositions,
  kFeedForward1,
  kNonlinAttention = kFeedForward1 + 2,
  kAttention1 = kNonlinAttention + 2,
  kConvolution1 = kAttention1 + 2,
  kFeedForward2 = kConvolution1 + 2,
  kAttention2 = kFeedForward2 + 2,
  kConvolution2 = kAttention2 + 2,
  kFeedForward3 = kConvolution2 + 2,
  kProducts = kFeedForward3 + 2
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

// Its functions add what a module computes to `x`, the module's input.
struct Layer {
  const Tensors &weights, &biases;
  const std::vector<int64_t>&ways, &outputs;
  int64_t first_head_way;

  // Returns f(x) weightᵀ + bias, where f is SwooshL, SwooshR or nothing, and `onto` more if that is given.
  Tensor linear(size_t i, const Tensor& x, cpu::ReducedInput f = cpu::ReducedInput::x,
                const Optional& onto = {}) const {
    if (ways[i] > kReduced) {
      const int64_t n = outputs[i];
      const Tensor y = new_pooled(x, {x.size(0), x.size(1), n});
      cpu::ReducedGemm g{};
      g.x = data<float>(x), g.x_row = g.k = x.size(2), g.bias = data_or_null<float>(bias(i));
      g.y = mutable_data<float>(y), g.y_row = g.n = n, g.m = x.size(0) * x.size(1);
      g.format = static_cast<cpu::WeightFormat>(ways[i] - kReduced), g.input = f;
      reduced_gemm::multiply(g, weights[i]);
      return onto ? plus(*onto, y) : y;
    }
    if (f != cpu::ReducedInput::x)
      return multiplied(i, swoosh::swoosh_forward(x, f == cpu::ReducedInput::swoosh_r, {}, -1), onto);
    return multiplied(i, x, onto);
  }

  Optional bias(size_t i) const { return biases[i].numel() ? Optional(biases[i]) : Optional(); }

  Tensor multiplied(size_t i, const Tensor& x, const Optional& onto, bool swoosh_l = false) const {
    using torch::stable::detail::from;
    const Tensor& weight = weights[i];
    const int64_t k = x.size(2), n = outputs[i];
    check(weight.dim() == 2 && weight.size(0) == n && weight.size(1) == k, kOp, "a weight has another shape");
    if (ways[i] == kTorch || ways[i] == kFewRows) {
      const Tensor y = ways[i] == kTorch ? by_torch("aten::linear", {from(x), from(weight), from(bias(i))})
                                         : gemm::linear_few_rows(x, weight, bias(i));
      return onto ? plus(*onto, y) : y;
    }
    const Tensor y = new_pooled(x, {x.size(0), x.size(1), n});
    cpu::Gemm<float> g{};
    g.a = data<float>(x), g.a_row = k, g.a_depth = 1;
    g.bias = data_or_null<float>(bias(i));
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

  Tensor feed_forward(size_t i, const Tensor& x) const {
    if (ways[i] != kGemm || ways[i + 1] > kReduced) return linear(i + 1, linear(i, x), cpu::ReducedInput::swoosh_l, x);
    return linear(i + 1, multiplied(i, x, {}, true), cpu::ReducedInput::x, x);
  }

  Tensor self_attention(size_t i, const Tensor& x, const Tensor& attention) const {
    const Tensor y = weighted_values::weighted_values(attention, linear(i, x));
    return linear(i + 1, y, cpu::ReducedInput::x, x);
  }

  // tensors are weight and bias, and in the chunk-causal form causal_weight, causal_bias and chunk_scale.
  Tensor convolution(size_t i, const Tensor& x, const Tensors& tensors, size_t first, size_t count,
                     const Optional& padding, int64_t chunk) const {
    const auto at = [&](size_t j) { return j < count ? Optional(tensors[first + j]) : Optional(); };
    const auto swoosh_r = static_cast<int64_t>(cpu::GatedActivation::swoosh_r);
    const Tensor y = std::get<0>(gated_depthwise_conv::gated_depthwise_conv_forward(
        linear(i, x), tensors[first], at(1), at(2), at(3), at(4), padding, {}, chunk, swoosh_r, false, 0));
    return linear(i + 1, y, cpu::ReducedInput::x, x);
  }

  Tensor nonlin_attention(const Tensor& x, const Tensor& attention) const {
    const Tensor projected = linear(kNonlinAttention, x);
    const Tensor o = of_first_head(attention, bindings::nonlin_attention::gate(projected));
    return linear(kNonlinAttention + 1, bindings::nonlin_attention::product(projected, o), cpu::ReducedInput::x, x);
  }

  // Returns (batch, time, channels) for values (time, batch, channels).
  Tensor of_first_head(const Tensor& attention, const Tensor& values) const {
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

// Takes src (time, batch, channels), contiguous, and positions (1 or batch, 2 time - 1, pos_dim). weights are matrices,
// or packed copies where `ways` says so; an absent bias has no elements. convolutions are the tensors of both modules,
// scales the bypass in the middle, the norm's bias and log_scale, and the last bypass. ways has one more number, that
// of the first head's product. chunk and left_chunks are those of attention, conv_chunk is the convolutions'.
Tensor zipformer_layer(const Tensor& src, const Tensor& positions, const Optional& padding, const Optional& mask,
                       Tensors weights, Tensors biases, Tensors convolutions, Tensors scales, std::vector<int64_t> ways,
                       std::vector<int64_t> outputs, int64_t heads, int64_t query_dim, int64_t chunk,
                       int64_t left_chunks, int64_t conv_chunk) {
  check(src.dim() == 3 && src.is_cpu() && is_dense(src, ScalarType::Float, {src.size(0), src.size(1), src.size(2)}),
        kOp, "src");
  check(positions.dim() == 3 && positions.is_contiguous() && dtype_of(positions) == ScalarType::Float, kOp,
        "positions");
  check(weights.size() == kProducts && biases.size() == kProducts && outputs.size() == kProducts &&
            ways.size() == kProducts + 1 && scales.size() == 4,
        kOp, "wrong number of tensors");
  for (const Tensors* list : {&weights, &biases, &convolutions, &scales})
    for (const Tensor& t : *list)
      check(t.is_cpu() && t.is_contiguous() && dtype_of(t) == ScalarType::Float, kOp, "a parameter");
  for (size_t i = 0; i < kProducts; i++)
    check(biases[i].numel() == 0 || biases[i].numel() == outputs[i], kOp, "a bias has another size");
  const size_t each = convolutions.size() / 2;
  check(convolutions.size() % 2 == 0 && (each == 2 || each == 5), kOp, "convolutions");

  const Layer layer{weights, biases, ways, outputs, ways[kProducts]};
  const Tensor attention = zipformer_attention_weights::zipformer_attention_weights_forward(
      layer.linear(kScores, src), layer.linear(kPositions, positions), {}, padding, mask, heads, query_dim, chunk,
      left_chunks);
  Tensor x = layer.feed_forward(kFeedForward1, src);
  x = layer.nonlin_attention(x, attention);
  x = layer.self_attention(kAttention1, x, attention);
  x = layer.convolution(kConvolution1, x, convolutions, 0, each, padding, conv_chunk);
  x = layer.feed_forward(kFeedForward2, x);
  x = bypass::bypass_forward(src, x, scales[0]);
  x = layer.self_attention(kAttention2, x, attention);
  x = layer.convolution(kConvolution2, x, convolutions, each, each, padding, conv_chunk);
  x = layer.feed_forward(kFeedForward3, x);
  return bypass::bypass_forward(src, bias_norm::bias_norm_forward(x, scales[1], scales[2]), scales[3]);
}

}  // namespace

FASTASR_OPERATORS(
    {"zipformer_layer(Tensor src, Tensor positions, Tensor? key_padding_mask, Tensor? attn_mask, "
     "Tensor[] weights, Tensor[] biases, Tensor[] convolutions, Tensor[] scales, int[] ways, "
     "int[] outputs, int num_heads, int query_head_dim, int chunk_size, int left_context_chunks, "
     "int conv_chunk_size) -> Tensor",
     Boxed<zipformer_layer>::call})

}  // namespace fastasr::bindings::zipformer_layer
