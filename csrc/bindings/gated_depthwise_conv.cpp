// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/gated_depthwise_conv.h"

#include <array>
#include <memory>
#include <tuple>
#include <vector>

#include "bindings/layer_parts.h"
#include "bindings/packed.h"
#include "bindings/pooled.h"

namespace fastasr::bindings::gated_depthwise_conv {
namespace {

using cpu::GatedDepthwiseConv;

struct Operands {
  const Tensor &h, &weight;
  const Optional &bias, &causal_weight, &causal_bias, &chunk_scale, &mask, &cache;
  int64_t chunk, delay, activation;
  std::vector<int64_t> starts = {};  // of packed sequences, and the end of the last
};

// Returns the starts of packed sequences of these lengths, the rows of h (N, 1, 2 C).
std::vector<int64_t> starts_of(const std::vector<int64_t>& lengths, const Tensor& h, const char* op) {
  check(h.dim() == 3 && h.size(1) == 1, op, "h is not (N, 1, 2 C)");
  return packed_starts(lengths, h.size(0), op);
}

void check_shape(const Optional& t, const Tensor& h, std::initializer_list<int64_t> sizes, const char* op,
                 const char* name) {
  if (!t.has_value()) return;
  check_like(*t, h, op, name);
  check(has_sizes(*t, sizes), op, name, " has another shape");
}

// Rows of x (T, B, channels) have contiguous channels; the other strides are x's.
void check_rows(const Tensor& x, const Tensor& h, int64_t channels, const char* op, const char* name) {
  check(dtype_of(x) == dtype_of(h), op, name, " has another dtype");
  check(has_sizes(x, {h.size(0), h.size(1), channels}), op, name, " has another shape");
  check(channels <= 1 || !x.numel() || x.stride(2) == 1, op, "the channels of ", name, " are not contiguous");
}

template <typename T>
GatedDepthwiseConv<T> checked(const Operands& o, const char* op) {
  check(o.h.dim() == 3 && o.h.size(2) % 2 == 0, op, "h is not (T, B, 2 C)");
  const int64_t frames = o.h.size(0), batch = o.h.size(1), channels = o.h.size(2) / 2;
  check_rows(o.h, o.h, 2 * channels, op, "h");
  check_like(o.weight, o.h, op, "weight");
  check(o.weight.dim() >= 2, op, "weight has another shape");
  const int64_t taps = o.weight.size(o.weight.dim() - 1), causal = taps / 2 + 1;
  check(taps > 0 && (has_sizes(o.weight, {channels, 1, taps}) || has_sizes(o.weight, {channels, taps})), op,
        "weight has another shape");
  const bool chunked = o.causal_weight.has_value();
  check(chunked == o.chunk_scale.has_value() && (chunked || !o.causal_bias.has_value()), op,
        "chunk-causal form needs causal_weight and chunk_scale, plain form takes neither");
  check(!chunked || (taps % 2 == 1 && o.delay == 0), op, "chunk-causal form needs an odd number of taps and no delay");
  const int64_t past = taps / 2 + o.delay;
  check(past >= 0 && past < taps, op, "delay");
  check(o.activation >= 0 && o.activation <= static_cast<int64_t>(cpu::GatedActivation::silu), op, "activation");
  check_shape(o.bias, o.h, {channels}, op, "bias");
  if (chunked) {
    check_like(*o.causal_weight, o.h, op, "causal_weight");
    check(has_sizes(*o.causal_weight, {channels, 1, causal}) || has_sizes(*o.causal_weight, {channels, causal}), op,
          "causal_weight has another shape");
  }
  check_shape(o.causal_bias, o.h, {channels}, op, "causal_bias");
  check_shape(o.chunk_scale, o.h, {2, channels, taps}, op, "chunk_scale");
  check_shape(o.cache, o.h, {batch, channels, past}, op, "cache");
  if (o.mask.has_value())
    check(is_dense(*o.mask, ScalarType::Bool, {batch, frames}), op,
          "padding_mask is not a contiguous bool tensor (B, T)");
  check(o.chunk != 0, op, "chunk_size is 0");
  const bool packed = !o.starts.empty();
  const int64_t whole = std::max<int64_t>(1, frames);
  return {data<T>(o.h),
          o.h.stride(0),
          o.h.stride(1),
          data<T>(o.weight),
          data_or_null<T>(o.bias),
          data_or_null<T>(o.causal_weight),
          data_or_null<T>(o.causal_bias),
          data_or_null<T>(o.chunk_scale),
          data_or_null<bool>(o.mask),
          data_or_null<T>(o.cache),
          frames,
          packed ? static_cast<int64_t>(o.starts.size()) - 1 : batch,
          channels,
          taps,
          past,
          chunked && o.chunk > 0 ? std::min(o.chunk, whole) : whole,
          static_cast<cpu::GatedActivation>(o.activation),
          packed ? o.starts.data() : nullptr};
}

Tensor new_like_if(const Optional& t, const Tensor& h) {
  return t.has_value() ? new_like(*t) : new_without_elements(h);
}

template <typename T>
T* mutable_or_null(const Tensor& t, bool wanted) {
  return wanted ? mutable_data<T>(t) : nullptr;
}

// A thread of its own pays off for this many of the tasks into which all frames are cut.
template <typename T>
int64_t grain(const GatedDepthwiseConv<T>& conv, int64_t tasks_of_a_stripe, int64_t passes) {
  const int64_t frames = conv.frames * (conv.starts ? 1 : conv.batch) / std::max<int64_t>(1, tasks_of_a_stripe);
  return std::max<int64_t>(
      1, 2 * kGrain / std::max<int64_t>(1, passes * frames * cpu::kGatedStripe * (conv.taps / 8 + 1)));
}

std::tuple<Tensor, Tensor> forward(const Operands& operands, bool need_cache, const char* op) {
  const Tensor& h = operands.h;
  Tensor y = new_without_elements(h), new_cache = y;
  with_kernel_type(dtype_of(h), op, [&]<typename T>() {
    const GatedDepthwiseConv<T> conv = checked<T>(operands, op);
    y = new_pooled(h, {h.size(0), h.size(1), conv.channels});
    if (need_cache) new_cache = new_contiguous(h, {conv.batch, conv.channels, conv.past});
    T *yp = mutable_data<T>(y), *cp = mutable_or_null<T>(new_cache, need_cache);
    const auto& kernel = cpu::kernels<cpu::GatedDepthwiseConvForward<T>>();
    const int64_t stripes = (conv.channels + cpu::kGatedStripe - 1) / cpu::kGatedStripe;
    parallel_range(stripes * conv.batch, grain(conv, conv.batch, 1),
                   [&](int64_t b, int64_t e) { kernel.run(conv, yp, cp, b, e); });
  });
  return {y, new_cache};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& grad, const Operands& o, const char* op) {
  const Tensor& h = o.h;
  Tensor dh = new_without_elements(h);
  Tensor dweight = new_like(o.weight), dbias = new_like_if(o.bias, h), dcausal_weight = new_like_if(o.causal_weight, h),
         dcausal_bias = new_like_if(o.causal_bias, h), dchunk_scale = new_like_if(o.chunk_scale, h),
         dcache = new_like_if(o.cache, h);
  with_kernel_type(dtype_of(h), op, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    const GatedDepthwiseConv<T> conv = checked<T>(o, op);
    check_rows(grad, h, conv.channels, op, "grad");
    dh = new_contiguous(h, {h.size(0), h.size(1), 2 * conv.channels});
    const T* gp = data<T>(grad);
    T *dp = mutable_data<T>(dh), *dcp = mutable_or_null<T>(dcache, o.cache.has_value());
    const int64_t stripes = (conv.channels + cpu::kGatedStripe - 1) / cpu::kGatedStripe;
    const auto& kernel = cpu::kernels<cpu::GatedDepthwiseConvBackward<T>>();
    const int64_t groups = std::min(conv.batch, cpu::kGatedGroups);
    const std::unique_ptr<C[]> parts(new C[static_cast<size_t>(groups * conv.sums() * conv.channels)]);
    parallel_range(stripes * groups, grain(conv, groups, 2), [&](int64_t b, int64_t e) {
      kernel.run(conv, gp, grad.stride(0), grad.stride(1), dp, dcp, parts.get(), groups, b, e);
    });
    kernel.reduce(conv, parts.get(), groups, mutable_data<T>(dweight), mutable_or_null<T>(dbias, o.bias.has_value()),
                  mutable_or_null<T>(dcausal_weight, o.causal_weight.has_value()),
                  mutable_or_null<T>(dcausal_bias, o.causal_bias.has_value()),
                  mutable_or_null<T>(dchunk_scale, o.chunk_scale.has_value()));
  });
  return {dh, dweight, dbias, dcausal_weight, dcausal_bias, dchunk_scale, dcache};
}

}  // namespace

std::tuple<Tensor, Tensor> gated_depthwise_conv_forward(const Tensor& h, const Tensor& weight, const Optional& bias,
                                                        const Optional& causal_weight, const Optional& causal_bias,
                                                        const Optional& chunk_scale, const Optional& padding_mask,
                                                        const Optional& cache, int64_t chunk_size, int64_t activation,
                                                        bool need_cache, int64_t delay) {
  return forward(
      {h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache, chunk_size, delay, activation},
      need_cache, "gated_depthwise_conv_forward");
}

namespace {

Gradients gated_depthwise_conv_backward(const Tensor& grad, const Tensor& h, const Tensor& weight, const Optional& bias,
                                        const Optional& causal_weight, const Optional& causal_bias,
                                        const Optional& chunk_scale, const Optional& padding_mask,
                                        const Optional& cache, int64_t chunk_size, int64_t activation, int64_t delay) {
  return backward(
      grad,
      {h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache, chunk_size, delay, activation},
      "gated_depthwise_conv_backward");
}

// The plain form for sequences of these lengths, which lie one after the other as rows of h (N, 1, 2 C). Returns y (N,
// 1, C).
Tensor gated_depthwise_conv_packed_forward(const Tensor& h, const Tensor& weight, const Optional& bias,
                                           std::vector<int64_t> lengths, int64_t activation, int64_t delay) {
  const char* op = "gated_depthwise_conv_packed_forward";
  const Optional none;
  return std::get<0>(forward(
      {h, weight, bias, none, none, none, none, none, -1, delay, activation, starts_of(lengths, h, op)}, false, op));
}

// Returns dh, dweight and dbias, which has no elements without a bias.
std::tuple<Tensor, Tensor, Tensor> gated_depthwise_conv_packed_backward(const Tensor& grad, const Tensor& h,
                                                                        const Tensor& weight, const Optional& bias,
                                                                        std::vector<int64_t> lengths,
                                                                        int64_t activation, int64_t delay) {
  const char* op = "gated_depthwise_conv_packed_backward";
  const Optional none;
  const Gradients found = backward(
      grad, {h, weight, bias, none, none, none, none, none, -1, delay, activation, starts_of(lengths, h, op)}, op);
  return {std::get<0>(found), std::get<1>(found), std::get<2>(found)};
}

}  // namespace

FASTASR_OPERATORS(
    {"gated_depthwise_conv_forward(Tensor h, Tensor weight, Tensor? bias, Tensor? causal_weight, Tensor? causal_bias, "
     "Tensor? chunk_scale, Tensor? padding_mask, Tensor? cache, int chunk_size, int activation, bool need_cache, int "
     "delay) -> (Tensor, Tensor)",
     Boxed<gated_depthwise_conv_forward>::call},
    {"gated_depthwise_conv_backward(Tensor grad, Tensor h, Tensor weight, Tensor? bias, Tensor? causal_weight, "
     "Tensor? causal_bias, Tensor? chunk_scale, Tensor? padding_mask, Tensor? cache, int chunk_size, int activation, "
     "int "
     "delay) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
     Boxed<gated_depthwise_conv_backward>::call},
    {"gated_depthwise_conv_packed_forward(Tensor h, Tensor weight, Tensor? bias, int[] lengths, int activation, "
     "int delay) -> Tensor",
     Boxed<gated_depthwise_conv_packed_forward>::call},
    {"gated_depthwise_conv_packed_backward(Tensor grad, Tensor h, Tensor weight, Tensor? bias, int[] lengths, "
     "int activation, int delay) -> (Tensor, Tensor, Tensor)",
     Boxed<gated_depthwise_conv_packed_backward>::call})

}  // namespace fastasr::bindings::gated_depthwise_conv
