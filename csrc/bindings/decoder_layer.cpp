// SPDX-License-Identifier: Apache-2.0
#include <limits>

#include "bindings/layer_parts.h"
#include "bindings/layer_products.h"
#include "bindings/scratch.h"
#include "cpu/attention/few_queries.h"
#include "cpu/gemm/gemm.h"
#include "cpu/math/activation.h"
#include "cpu/rows/add_norm.h"
#include "cpu/rows/norm_activation.h"

// One token of each hypothesis through a layer of a Transformer's decoder in inference, in float32:
//   x + attention(norm(x), earlier tokens), then + attention(norm, an encoder's frames), then + feed_forward(norm),
// or, where norms come behind the blocks, norm(x + attention(x, earlier tokens)) and so on. A language model's layer
// has no frames.
// Between the two operators the caller appends keys and values to its cache. The hypotheses of one recording read its
// frames once.
namespace fastasr::bindings::decoder_layer {
namespace {

using namespace layer_products;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Doubles = std::vector<double>;

constexpr const char* kOp = "decoder_layer";

bool is_floats(const Tensor& t, Sizes sizes) { return is_dense(t, ScalarType::Float, sizes); }

void check_token(const Tensor& x) {
  check(x.dim() == 3 && x.is_cpu() && is_floats(x, {x.size(0), 1, x.size(2)}) && x.numel() > 0, kOp,
        "x is (hypotheses, 1, width)");
}

// Returns x + update, or x, and its LayerNorm. norm: weight and bias, which has no elements where there is none.
std::pair<Tensor, Tensor> with_norm(const Tensor& x, const Optional& update, const Tensor* norm, double eps) {
  const int64_t width = x.size(2), rows = x.size(0);
  for (int i = 0; i < 2; i++)
    check(norm[i].is_cpu() && (is_floats(norm[i], {width}) || (i && norm[i].numel() == 0)), kOp, "a norm's parameter");
  const float *const weight = data<float>(norm[0]), *const bias = norm[1].numel() ? data<float>(norm[1]) : nullptr;
  constexpr float kNone = std::numeric_limits<float>::infinity();
  const Tensor y = new_like(x);
  if (!update) {
    const cpu::NormActivation<float> p{
        data<float>(x), weight, bias, eps, kNone, true, static_cast<int>(cpu::Activation::identity), width};
    const Scratch<float> scratch(cpu::norm_activation_scratch(width));
    cpu::kernels<cpu::NormActivationKernels<float>>().forward(p, 0, rows, mutable_data<float>(y), nullptr,
                                                              scratch.data());
    return {x, y};
  }
  check_same_size(*update, x, kOp, "a sum");
  const cpu::AddNorm<float> p{data<float>(x), data<float>(*update), nullptr, weight, bias, eps, 1, kNone, kNone, true,
                              width};
  const Tensor sum = new_like(x);
  const Scratch<float> scratch(cpu::add_norm_scratch(width));
  cpu::kernels<cpu::AddNormKernels<float>>().forward(p, 0, rows, mutable_data<float>(sum), mutable_data<float>(y),
                                                     scratch.data());
  return {sum, y};
}

// Returns what is added to scores (R or 1, K), for a mask (R or 1, 1, 1, K) of that or of bools: True where a key is
// seen.
Optional added_to_scores(const Optional& mask, int64_t rows, int64_t keys) {
  if (!mask) return {};
  const int64_t count = mask->dim() == 4 ? mask->size(0) : 0;
  check(mask->is_cpu() && (count == rows || count == 1) && has_sizes(*mask, {count, 1, 1, keys}), kOp, "mask");
  const Tensor m = mask->is_contiguous() ? *mask : torch::stable::contiguous(*mask);
  if (dtype_of(m) == ScalarType::Float) return m;
  check(dtype_of(m) == ScalarType::Bool, kOp, "mask is of float32 or bool");
  const Tensor numbers = new_contiguous(m, {count, keys}, ScalarType::Float);
  std::transform(data<bool>(m), data<bool>(m) + m.numel(), mutable_data<float>(numbers),
                 [](bool seen) { return seen ? 0 : -std::numeric_limits<float>::infinity(); });
  return numbers;
}

// Returns the attention (R, 1, width) of queries (R, 1, width) to keys and values (B, heads, K, width / heads), where
// R is a multiple of B. weights: gets its weights (R, heads, 1, K), if not null.
Tensor attention(const Tensor& q, const Tensor& keys, const Tensor& values, const Optional& mask, int64_t heads,
                 double scale, Tensors* weights) {
  const int64_t rows = q.size(0), width = q.size(2), batch = keys.dim() == 4 ? keys.size(0) : 0;
  check(batch > 0 && rows % batch == 0 && heads > 0 && width % heads == 0, kOp, "keys and hypotheses");
  const int64_t dim = width / heads, count = keys.size(2);
  for (const Tensor* t : {&keys, &values})
    check(t->is_cpu() && dtype_of(*t) == ScalarType::Float && has_sizes(*t, {batch, heads, count, dim}) && count > 0 &&
              (dim == 1 || t->stride(3) == 1),
          kOp, "keys or values");
  const Tensor y = new_like(q);
  float* wp = nullptr;
  if (weights) {
    weights->push_back(new_contiguous(q, {rows, heads, 1, count}));
    wp = mutable_data<float>(weights->back());
  }
  const int64_t beams = rows / batch;
  const Optional added = added_to_scores(mask, rows, count);
  const float* const mp = data_or_null<float>(added);
  const int64_t mask_row = added && added->size(0) > 1 ? count : 0;
  const float *const qp = data<float>(q), *const kp = data<float>(keys), *const vp = data<float>(values);
  float* const yp = mutable_data<float>(y);
  parallel_tasks(batch * heads, 2 * count * dim, [&](int64_t begin, int64_t end) {
    cpu::FewQueries a{nullptr,
                      width,
                      nullptr,
                      keys.stride(2),
                      nullptr,
                      values.stride(2),
                      nullptr,
                      width,
                      std::min(beams, cpu::kFewRows),
                      count,
                      dim,
                      dim,
                      static_cast<float>(scale),
                      nullptr,
                      mask_row,
                      nullptr,
                      heads * count};
    const Scratch<float> scratch(a.scratch());
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / heads, head = i % heads;
      a.k = kp + b * keys.stride(0) + head * keys.stride(1);
      a.v = vp + b * values.stride(0) + head * values.stride(1);
      for (int64_t row = b * beams; row < (b + 1) * beams; row += a.queries) {
        a.queries = std::min((b + 1) * beams - row, cpu::kFewRows);
        a.q = qp + row * width + head * dim, a.y = yp + row * width + head * dim;
        if (mp) a.mask = mp + row * mask_row;
        if (wp) a.weights = wp + (row * heads + head) * count;
        cpu::kernels<cpu::FewQueriesKernels>().attend(a, scratch.data());
      }
    }
  });
  return y;
}

// Returns the queries, keys and values (R, 1, width) of x (R, 1, width). norm: weight and bias, or nothing if there is
// none before them. weights, biases and ways: those of queries, keys and values.
Tensors decoder_layer_projections(const Tensor& x, Tensors norm, Doubles eps, Tensors weights, Tensors biases,
                                  Ints ways) {
  check_token(x);
  check(eps.size() <= 1 && norm.size() == 2 * eps.size(), kOp, "a norm");
  const Tensor y = norm.empty() ? x : with_norm(x, {}, norm.data(), eps[0]).second;
  Reader reader(weights, biases, ways, kOp);
  Tensors found;
  for (const char* name : {"queries", "keys", "values"})
    found.push_back(linear(reader.next(name, x.size(2), x.size(2)), y));
  return found;
}

// Returns the layer's output (R, 1, width) for its input x, the queries (R, 1, width), keys and values (R, heads, T,
// width / heads) of all tokens, and those of the frames (B, heads, K, width / heads), if there are any, with their
// masks; and, if `attended`, the weights (R, heads, 1, T) and (R, heads, 1, K) of the attentions. weights, biases and
// ways: those behind the first attention, of the second one's queries, behind it, and of the feed-forward block. norms:
// weight and bias of all norms but the first one, or of all if they come behind the blocks. hidden: the channels inside
// the feed-forward block. scales: of the scores of the attentions.
Tensors decoder_layer(const Tensor& x, const Tensor& queries, const Tensor& keys, const Tensor& values,
                      const Optional& frame_keys, const Optional& frame_values, const Optional& mask,
                      const Optional& frame_mask, Tensors norms, Doubles eps, Tensors weights, Tensors biases,
                      Ints ways, int64_t heads, int64_t hidden, int64_t activation, bool gated, Doubles scales,
                      bool attended) {
  check_token(x);
  check(frame_keys.has_value() == frame_values.has_value(), kOp, "keys and values of the frames");
  const size_t attentions = frame_keys ? 2 : 1;
  const bool behind = eps.size() == attentions + 1;
  check((behind || eps.size() == attentions) && eps.size() * 2 == norms.size(), kOp, "norms");
  check(scales.size() == attentions && weights.size() == 1 + 2 * attentions, kOp, "scales or products");
  check(queries.is_cpu() && is_floats(queries, x.sizes()), kOp, "queries");
  check(keys.dim() == 4 && keys.size(0) == x.size(0), kOp, "keys");
  const int64_t width = x.size(2);
  Reader reader(weights, biases, ways, kOp);
  Tensors kept;
  Tensors* const keep = attended ? &kept : nullptr;
  const auto projected = [&](const char* name, const Tensor& t) { return linear(reader.next(name, width, width), t); };
  // what the next block's result is added to, and the block's input
  std::pair<Tensor, Tensor> now(x, x);
  size_t norm = 0;
  const auto add = [&](const Tensor& update) {
    now = with_norm(now.first, update, norms.data() + 2 * norm, eps[norm]);
    if (behind) now.first = now.second;
    norm++;
  };
  add(projected("the first attention's output", attention(queries, keys, values, mask, heads, scales[0], keep)));
  if (frame_keys) {
    const Tensor q = projected("the second attention's queries", now.second);
    add(projected("the second attention's output",
                  attention(q, *frame_keys, *frame_values, frame_mask, heads, scales[1], keep)));
  }
  const Tensor z =
      linear(reader.next("the feed-forward block's first product", width, gated ? 2 * hidden : hidden), now.second);
  const Tensor h = linear_activation::linear_activation_forward(z, activation, true, gated, 0, {}, {});
  const Tensor y =
      linear(reader.next("the feed-forward block's second product", hidden, width), h, cpu::ReducedInput::x, now.first);
  kept.insert(kept.begin(), behind ? with_norm(y, {}, norms.data() + 2 * norm, eps[norm]).second : y);
  return kept;
}

}  // namespace

FASTASR_UNDECLARED(
    "fastasr/swap/forwards/decoder_step.py calls it without gradients, with tensors of a layer that it checked",
    FASTASR_TYPED(decoder_layer_projections), FASTASR_TYPED(decoder_layer))

}  // namespace fastasr::bindings::decoder_layer
