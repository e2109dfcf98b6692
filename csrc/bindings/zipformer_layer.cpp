// SPDX-License-Identifier: Apache-2.0
#include <array>

#include "bindings/layer_parts.h"
#include "bindings/layer_products.h"
#include "bindings/packed.h"
#include "bindings/written/bias_norm.h"
#include "bindings/written/bypass.h"
#include "bindings/written/gated_depthwise_conv.h"
#include "bindings/written/zipformer_attention_weights.h"
#include "cpu/conv/gated_depthwise_conv.h"
#include "cpu/streaming/zipformer_layer.h"

// A whole layer of Zipformer's encoder in inference, in float32: the kernels of its ops one after the other, as
// fastasr/models/zipformer/layer.py calls them, on a padded batch or on the frames of recordings one after the other.
// Python and torch's dispatcher take half a millisecond for the 45 calls of a layer; the bits equal those of the calls.
namespace fastasr::bindings::zipformer_layer {
namespace {

constexpr const char* kOp = "zipformer_layer";

// The kernel for few columns computes the first head's sums up to so many columns, and of recordings up to this length
// for any number of columns, as in fastasr/models/zipformer/packed_weights.py.
constexpr int64_t kFewColumns = 32, kMostFrames = 128;

using namespace layer_products;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

using Products = cpu::ZipformerProducts<Product>;

// The modules, see cpu::run_zipformer_layer.
struct Layer {
  const cpu::ZipformerSizes& sizes;
  const Products& products;
  const Product& of_positions;
  int64_t first_head_way;
  const Tensor &src, &positions;
  const Tensors& tables;  // the convolutions' tensors, then those of the bypasses and the norm
  const Optional &padding, &mask;
  const Ints& lengths;     // of recordings, the rows of src (N, 1, channels); none: src is a padded batch
  const Optional& starts;  // of the recordings
  int64_t chunk, left_chunks, conv_chunk;
  Tensor x = src;
  Tensors attention = {};  // of the batch, or of each recording that has frames

  void attention_weights() {
    using namespace zipformer_attention_weights;
    const Tensor projected = linear(products.scores, x);
    const Optional pos = linear(of_positions, positions);
    if (lengths.empty())
      attention = {zipformer_attention_weights_forward(checked(ZipformerAttentionWeightsForward{
          projected, pos, {}, padding, mask, {}, sizes.heads, sizes.query, chunk, left_chunks}))};
    else
      attention = zipformer_attention_weights_packed_forward(projected, pos, lengths, sizes.heads, sizes.query, chunk,
                                                             left_chunks);
  }

  void feed_forward(int i) {
    const Products::Module& m = products.feed_forward[i];
    if (m.in.way > kGemm || m.out.way > kReduced)
      x = linear(m.out, linear(m.in, x), cpu::ReducedInput::swoosh_l, x);
    else
      x = linear(m.out, swoosh_l_of_linear(m.in, x), cpu::ReducedInput::x, x);
  }

  void nonlin_attention() {
    const Tensor projected = linear(products.nonlin.in, x);
    const Tensor gated = bindings::nonlin_attention::nonlin_attention_gate(projected);
    const Tensor o = lengths.empty() ? of_first_head(gated) : of_first_heads(gated);
    x = linear(products.nonlin.out, bindings::nonlin_attention::nonlin_attention_product(projected, o),
               cpu::ReducedInput::x, x);
  }

  void self_attention(int i) {
    using namespace weighted_values;
    const Products::Module& m = products.attention[i];
    const Tensor values = linear(m.in, x);
    const Tensor sums = lengths.empty() ? weighted_values::weighted_values(attention[0], values)
                                        : weighted_values_packed(attention, values);
    x = linear(m.out, sums, cpu::ReducedInput::x, x);
  }

  void convolution(int i) {
    const Products::Module& m = products.convolution[i];
    x = linear(m.out, convolved(linear(m.in, x), i), cpu::ReducedInput::x, x);
  }

  void bypass_mid() { x = bypass::bypass_forward(checked(bypass::BypassForward{src, x, table(3)})); }

  void norm_and_bypass() {
    const Tensor normed = bias_norm::bias_norm_forward(checked(bias_norm::BiasNormForward{x, table(1), table(0)}));
    x = bypass::bypass_forward(checked(bypass::BypassForward{src, normed, table(2)}));
  }

 private:
  // Returns a tensor behind the convolutions': mid, bypass, bias and log_scale, from the end.
  const Tensor& table(size_t from_end) const { return tables[tables.size() - 1 - from_end]; }

  // Returns weights (B, T, T) times values (T, B, channels), (B, T, channels).
  static Tensor batched(const Tensor& weights, const Tensor& values) {
    using torch::stable::detail::from;
    std::array<StableIValue, 2> stack{from(weights), from(torch::stable::transpose(values, 0, 1))};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }

  Tensor first_head(const Tensor& weights) const { return torch::stable::select(weights, 0, 0); }

  // Returns (batch, time, channels) for values (time, batch, channels).
  Tensor of_first_head(const Tensor& values) const {
    const int64_t frames = values.size(0), batch = values.size(1), channels = values.size(2);
    const Tensor& weights = attention[0];
    if (first_head_way == kTorch) return batched(first_head(weights), values);
    const Tensor o = new_contiguous(values, {batch, frames, channels});
    for (int64_t b = 0; b < batch; b++) {
      cpu::Gemm<float> g{};
      g.a = data<float>(weights) + b * weights.stride(1), g.a_row = weights.stride(2), g.a_depth = 1;
      g.b = data<float>(values) + b * channels, g.b_depth = batch * channels, g.b_column = 1;
      g.c = mutable_data<float>(o) + b * frames * channels, g.c_row = channels;
      g.m = g.k = frames, g.n = channels;
      gemm::multiply(g);
    }
    return o;
  }

  // Returns (1, N, channels) for the values (N, 1, channels) of recordings.
  Tensor of_first_heads(const Tensor& values) const {
    Tensor o = new_contiguous(values, {1, values.size(0), values.size(2)});
    if (values.size(2) <= kFewColumns || *std::max_element(lengths.begin(), lengths.end()) <= kMostFrames) {
      Tensors first;
      for (Tensor weights : attention) first.push_back(torch::stable::narrow(weights, 0, 0, 1));
      return torch::stable::transpose(weighted_values::weighted_values_packed(first, values), 0, 1);
    }
    each_recording(values, o, [&](const Tensor& rows, size_t i) { return batched(first_head(attention[i]), rows); });
    return o;
  }

  // Writes f(rows (T, 1, channels) of a recording, its number among those that have frames) to its rows of y.
  template <typename F>
  void each_recording(Tensor rows, const Tensor& y, const F& f) const {
    int64_t first = 0;
    size_t i = 0;
    float* to = mutable_data<float>(y);
    for (const int64_t frames : lengths)
      if (frames) {
        const Tensor one = f(torch::stable::narrow(rows, 0, first, frames), i++);
        to = std::copy_n(data<float>(one), one.numel(), to), first += frames;
      }
  }

  // Returns SwooshR of the convolution of gated h (time, batch, 2 channels).
  Tensor convolved(const Tensor& h, int which) const {
    using namespace gated_depthwise_conv;
    constexpr size_t kOthers = 4;
    const size_t each = (tables.size() - kOthers) / 2, first = static_cast<size_t>(which) * each;
    const auto at = [&](size_t i) { return i < each ? Optional(tables[first + i]) : Optional(); };
    const Optional bias = at(1), causal = at(2), causal_bias = at(3), scale = at(4);
    constexpr auto kSwooshR = static_cast<int64_t>(cpu::GatedActivation::swoosh_r);
    constexpr auto kSigmoid = static_cast<int64_t>(cpu::Gate::sigmoid);
    GatedDepthwiseConvForward a{h,  tables[first], bias,       causal,   causal_bias, scale, padding,
                                {}, starts,        conv_chunk, kSwooshR, false,       0,     kSigmoid};
    return std::get<0>(gated_depthwise_conv_forward(checked(a)));
  }
};

// Takes src (time, batch, channels), contiguous, and positions (1 or batch, 2 time - 1, pos_dim); or src (N, 1,
// channels), the frames of recordings of these `lengths`, and the positions of the longest. `weights`, `biases` and
// `ways` have the order of cpu::ZipformerProducts, then the product of the positions, then the first head's way; an
// absent bias has no elements. Tables: see Layer. chunk and left_chunks belong to attention, conv_chunk to the
// convolutions.
Tensor zipformer_layer(Ints numbers, const Tensor& src, const Tensor& positions, const Optional& padding,
                       const Optional& mask, Ints lengths, Tensors weights, Tensors biases, Ints ways, Tensors tables,
                       int64_t chunk, int64_t left_chunks, int64_t conv_chunk) {
  std::vector<cpu::ZipformerSizes> stacks = cpu::read_stacks(numbers, 0);
  check(stacks.size() == 1, kOp, "the sizes describe no layer");
  const cpu::ZipformerSizes& n = stacks[0];
  check(src.dim() == 3 && src.is_cpu() && is_dense(src, ScalarType::Float, {src.size(0), src.size(1), n.dim}), kOp,
        "src");
  check(positions.dim() == 3 && positions.is_contiguous() && dtype_of(positions) == ScalarType::Float, kOp,
        "positions");
  check(lengths.empty() || (!padding && !mask), kOp, "recordings have no masks");
  Optional starts;
  if (!lengths.empty()) {
    const Ints rows = packed_starts(lengths, src.size(0), kOp);
    starts = new_contiguous(src, {static_cast<int64_t>(rows.size())}, ScalarType::Long);
    std::copy(rows.begin(), rows.end(), mutable_data<int64_t>(*starts));
  }
  for (const Tensor& t : tables)
    check(t.is_cpu() && t.is_contiguous() && dtype_of(t) == ScalarType::Float, kOp, "a parameter");
  check(tables.size() == 8 || tables.size() == 14, kOp, "tables");
  check(weights.size() == biases.size() && ways.size() == weights.size() + 1, kOp, "products");
  layer_products::Reader reader(weights, biases, ways, kOp);
  Products products{};
  products.each_product(n, [&](const char* name, Product& p, int64_t inputs, int64_t outputs) {
    p = reader.next(name, inputs, outputs);
  });
  const Product of_positions = reader.next("self_attn_weights.linear_pos", positions.size(2), n.heads * n.pos);
  Layer layer{n,       products, of_positions, ways.back(), src,   positions,   tables,
              padding, mask,     lengths,      starts,      chunk, left_chunks, conv_chunk};
  cpu::run_zipformer_layer(layer);
  return layer.x;
}

}  // namespace

FASTASR_UNDECLARED(
    "fastasr/models/zipformer/native_layer.py calls it without gradients, with tensors of a layer that it checked",
    FASTASR_TYPED(zipformer_layer))

}  // namespace fastasr::bindings::zipformer_layer
