// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/gated_depthwise_conv.h"

#include <array>
#include <memory>
#include <tuple>
#include <vector>

#include "bindings/layer_parts.h"
#include "bindings/packed.h"
#include "bindings/pooled.h"
#include "bindings/written/gated_depthwise_conv.h"

namespace fastasr::bindings::gated_depthwise_conv {
namespace {

using cpu::GatedDepthwiseConv;

// Returns the starts of packed sequences of these lengths, the rows of h (N, 1, 2 C).
std::vector<int64_t> starts_of(const std::vector<int64_t>& lengths, const Tensor& h, const char* op) {
  check(h.dim() == 3 && h.size(1) == 1, op, "h is not (N, 1, 2 C)");
  return packed_starts(lengths, h.size(0), op);
}

// Checks what the arguments have to do with each other. `starts` are those of packed sequences, and the end of the
// last.
template <typename T>
GatedDepthwiseConv<T> problem(const auto& a, const std::vector<int64_t>& starts) {
  const bool chunked = a.causal_weight.has_value();
  check(chunked == a.chunk_scale.has_value() && (chunked || !a.causal_bias), a.kName,
        "chunk-causal form needs causal_weight and chunk_scale, plain form takes neither");
  check(!chunked || (a.K % 2 == 1 && a.delay == 0), a.kName,
        "chunk-causal form needs an odd number of taps and no delay");
  const int64_t past = a.K / 2 + a.delay, whole = std::max<int64_t>(1, a.T);
  check(past >= 0 && past < a.K, a.kName, "delay");
  return {data<T>(a.h),
          a.h.stride(0),
          a.h.stride(1),
          data<T>(a.weight),
          data_or_null<T>(a.bias),
          data_or_null<T>(a.causal_weight),
          data_or_null<T>(a.causal_bias),
          data_or_null<T>(a.chunk_scale),
          data_or_null<bool>(a.padding_mask),
          data_or_null<T>(a.cache),
          a.T,
          starts.empty() ? a.B : static_cast<int64_t>(starts.size()) - 1,
          a.C,
          a.K,
          past,
          chunked && a.chunk_size > 0 ? std::min(a.chunk_size, whole) : whole,
          static_cast<cpu::GatedActivation>(a.activation),
          static_cast<cpu::Gate>(a.gate),
          starts.empty() ? nullptr : starts.data()};
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

std::tuple<Tensor, Tensor> forward(const GatedDepthwiseConvForward& a, const std::vector<int64_t>& starts = {}) {
  const Tensor& h = a.h;
  const bool need_cache = a.return_cache;
  Tensor y = new_without_elements(h), new_cache = y;
  with_kernel_type(dtype_of(h), a.kName, [&]<typename T>() {
    const GatedDepthwiseConv<T> conv = problem<T>(a, starts);
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

Gradients backward(const GatedDepthwiseConvBackward& a, const std::vector<int64_t>& starts = {}) {
  const Tensor &h = a.h, &grad = a.grad_y;
  Tensor dh = new_without_elements(h);
  Tensor dweight = new_like(a.weight), dbias = new_like_if(a.bias, h), dcausal_weight = new_like_if(a.causal_weight, h),
         dcausal_bias = new_like_if(a.causal_bias, h), dchunk_scale = new_like_if(a.chunk_scale, h),
         dcache = new_like_if(a.cache, h);
  with_kernel_type(dtype_of(h), a.kName, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    const GatedDepthwiseConv<T> conv = problem<T>(a, starts);
    dh = new_contiguous(h, {h.size(0), h.size(1), 2 * conv.channels});
    const T* gp = data<T>(grad);
    T *dp = mutable_data<T>(dh), *dcp = mutable_or_null<T>(dcache, a.cache.has_value());
    const int64_t stripes = (conv.channels + cpu::kGatedStripe - 1) / cpu::kGatedStripe;
    const auto& kernel = cpu::kernels<cpu::GatedDepthwiseConvBackward<T>>();
    const int64_t groups = std::min(conv.batch, cpu::kGatedGroups);
    const std::unique_ptr<C[]> parts(new C[static_cast<size_t>(groups * conv.sums() * conv.channels)]);
    parallel_range(stripes * groups, grain(conv, groups, 2), [&](int64_t b, int64_t e) {
      kernel.run(conv, gp, grad.stride(0), grad.stride(1), dp, dcp, parts.get(), groups, b, e);
    });
    kernel.reduce(conv, parts.get(), groups, mutable_data<T>(dweight), mutable_or_null<T>(dbias, a.bias.has_value()),
                  mutable_or_null<T>(dcausal_weight, a.causal_weight.has_value()),
                  mutable_or_null<T>(dcausal_bias, a.causal_bias.has_value()),
                  mutable_or_null<T>(dchunk_scale, a.chunk_scale.has_value()));
  });
  return {dh, dweight, dbias, dcausal_weight, dcausal_bias, dchunk_scale, dcache};
}

}  // namespace

std::tuple<Tensor, Tensor> gated_depthwise_conv_forward(const GatedDepthwiseConvForward& a) { return forward(a); }

// The plain form for sequences of these lengths, which lie one after the other as rows of h (N, 1, 2 C). Returns y (N,
// 1, C).
Tensor gated_depthwise_conv_packed_forward(const Tensor& h, const Tensor& weight, const Optional& bias,
                                           std::vector<int64_t> lengths, int64_t activation, int64_t delay) {
  const Optional none;
  GatedDepthwiseConvForward a{h, weight, bias, none, none, none, none, none, -1, activation, false, delay, 0};
  const char* op = "gated_depthwise_conv_packed_forward";
  a.check(op);
  return std::get<0>(forward(a, starts_of(lengths, h, op)));
}

namespace {

Gradients gated_depthwise_conv_backward(const GatedDepthwiseConvBackward& a) { return backward(a); }

// Returns dh, dweight and dbias, which has no elements without a bias.
std::tuple<Tensor, Tensor, Tensor> gated_depthwise_conv_packed_backward(const Tensor& grad, const Tensor& h,
                                                                        const Tensor& weight, const Optional& bias,
                                                                        std::vector<int64_t> lengths,
                                                                        int64_t activation, int64_t delay) {
  const Optional none;
  GatedDepthwiseConvBackward a{grad, h, weight, bias, none, none, none, none, none, -1, activation, delay, 0};
  const char* op = "gated_depthwise_conv_packed_backward";
  a.check(op);
  const Gradients found = backward(a, starts_of(lengths, h, op));
  return {std::get<0>(found), std::get<1>(found), std::get<2>(found)};
}

}  // namespace

FASTASR_OPERATORS(written<gated_depthwise_conv_forward>, written<gated_depthwise_conv_backward>)

FASTASR_UNDECLARED(
    "fastasr/models/common/packed.py calls it in a node of autograd, for plain tensors outside autocast and tracing",
    {"gated_depthwise_conv_packed_forward(Tensor h, Tensor weight, Tensor? bias, int[] lengths, int activation, "
     "int delay) -> Tensor",
     Boxed<gated_depthwise_conv_packed_forward>::call},
    {"gated_depthwise_conv_packed_backward(Tensor grad, Tensor h, Tensor weight, Tensor? bias, int[] lengths, "
     "int activation, int delay) -> (Tensor, Tensor, Tensor)",
     Boxed<gated_depthwise_conv_packed_backward>::call})

}  // namespace fastasr::bindings::gated_depthwise_conv
