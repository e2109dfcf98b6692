// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/gated_depthwise_conv.h"

#include <memory>

#include "bindings/layer_parts.h"
#include "bindings/written/gated_depthwise_conv.h"

namespace fastasr::bindings::gated_depthwise_conv {
namespace {

using cpu::GatedDepthwiseConv;

// Returns where the recordings of every sequence begin, without empty ones, and the end of the last.
std::vector<int64_t> bounds_of(const auto& a) {
  std::vector<int64_t> found = {0, a.T};
  if (a.starts) found.insert(found.end(), data<int64_t>(*a.starts), data<int64_t>(*a.starts) + a.N);
  for (int64_t& start : found) start = std::clamp<int64_t>(start, 0, a.T);
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  if (!a.T) found.push_back(0);
  return found;
}

// Checks what the arguments have to do with each other.
template <typename T>
GatedDepthwiseConv<T> problem(const auto& a, const std::vector<int64_t>& starts) {
  using C = cpu::compute_t<T>;
  const ScalarType dtype = dtype_of(a.h), wide = compute_type(dtype);
  check_dtype(a.weight, wide, a.kName, "weight");
  if (a.bias) check_dtype(*a.bias, wide, a.kName, "bias");
  if (a.causal_weight) check_dtype(*a.causal_weight, wide, a.kName, "causal_weight");
  if (a.causal_bias) check_dtype(*a.causal_bias, wide, a.kName, "causal_bias");
  if (a.cache) check_dtype(*a.cache, dtype, a.kName, "cache");
  const bool chunked = a.causal_weight.has_value();
  check(chunked == a.chunk_scale.has_value() && (chunked || !a.causal_bias), a.kName,
        "chunk-causal form needs causal_weight and chunk_scale, plain form takes neither");
  check(!chunked || (a.K % 2 == 1 && a.delay == 0), a.kName,
        "chunk-causal form needs an odd number of taps and no delay");
  check(!a.starts || !a.cache, a.kName, "starts with a cache");
  const int64_t past = a.K / 2 + a.delay, whole = std::max<int64_t>(1, a.T);
  check(past >= 0 && past < a.K, a.kName, "delay");
  GatedDepthwiseConv<T> p{};
  p.h = data<T>(a.h), p.h_time = a.h.stride(0), p.h_batch = a.h.stride(1);
  p.weight = data<C>(a.weight), p.bias = data_or_null<C>(a.bias), p.causal_weight = data_or_null<C>(a.causal_weight);
  p.causal_bias = data_or_null<C>(a.causal_bias), p.chunk_scale = data_or_null<T>(a.chunk_scale);
  p.mask = data_or_null<bool>(a.padding_mask), p.cache = data_or_null<T>(a.cache);
  p.frames = a.T, p.batch = a.B, p.channels = a.C, p.taps = a.K, p.past = past;
  p.chunk = chunked && a.chunk_size > 0 ? std::min(a.chunk_size, whole) : whole;
  p.activation = static_cast<cpu::GatedActivation>(a.activation), p.gate = static_cast<cpu::Gate>(a.gate);
  p.recordings = static_cast<int64_t>(starts.size()) - 1, p.starts = starts.data();
  return p;
}

template <typename T>
T* mutable_or_null(const Tensor& t, bool wanted) {
  return wanted ? mutable_data<T>(t) : nullptr;
}

// The work of each of the tasks into which all frames of a stripe are cut.
template <typename T>
int64_t work_of(const GatedDepthwiseConv<T>& conv, int64_t tasks, int64_t passes) {
  const int64_t frames = conv.frames * conv.batch / std::max<int64_t>(1, tasks);
  return depthwise_work(passes * frames * cpu::kGatedStripe, conv.taps);
}

}  // namespace

std::tuple<Tensor, Tensor> gated_depthwise_conv_forward(const GatedDepthwiseConvForward& a) {
  const Tensor& h = a.h;
  const bool need_cache = a.return_cache;
  check(!a.starts || !need_cache, a.kName, "starts with a cache");
  const std::vector<int64_t> starts = bounds_of(a);
  Tensor y = new_without_elements(h), new_cache = y;
  with_kernel_type(dtype_of(h), a.kName, [&]<typename T>() {
    const GatedDepthwiseConv<T> conv = problem<T>(a, starts);
    y = new_contiguous(h, {h.size(0), h.size(1), conv.channels});
    if (need_cache) new_cache = new_contiguous(h, {conv.batch, conv.channels, conv.past});
    T *yp = mutable_data<T>(y), *cp = mutable_or_null<T>(new_cache, need_cache);
    const auto& kernel = cpu::kernels<cpu::GatedDepthwiseConvForward<T>>();
    const int64_t stripes = (conv.channels + cpu::kGatedStripe - 1) / cpu::kGatedStripe;
    parallel_tasks(stripes * conv.count(), work_of(conv, conv.count(), 1),
                   [&](int64_t b, int64_t e) { kernel.run(conv, yp, cp, b, e); });
  });
  return {y, new_cache};
}

namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients gated_depthwise_conv_backward(const GatedDepthwiseConvBackward& a) {
  const Tensor &h = a.h, &grad = a.grad_y;
  const std::vector<int64_t> starts = bounds_of(a);
  Tensor dh = new_without_elements(h);
  Tensor dweight = new_like(a.weight), dbias = new_like(a.bias, h), dcausal_weight = new_like(a.causal_weight, h),
         dcausal_bias = new_like(a.causal_bias, h), dchunk_scale = new_like(a.chunk_scale, h),
         dcache = new_like(a.cache, h);
  with_kernel_type(dtype_of(h), a.kName, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    const GatedDepthwiseConv<T> conv = problem<T>(a, starts);
    dh = new_contiguous(h, {h.size(0), h.size(1), 2 * conv.channels});
    const T* gp = data<T>(grad);
    T *dp = mutable_data<T>(dh), *dcp = mutable_or_null<T>(dcache, a.cache.has_value());
    const int64_t stripes = (conv.channels + cpu::kGatedStripe - 1) / cpu::kGatedStripe;
    const auto& kernel = cpu::kernels<cpu::GatedDepthwiseConvBackward<T>>();
    const int64_t groups = std::min(conv.count(), cpu::kGatedGroups);
    const std::unique_ptr<C[]> parts(new C[static_cast<size_t>(groups * conv.sums() * conv.channels)]);
    parallel_tasks(stripes * groups, work_of(conv, groups, 2), [&](int64_t b, int64_t e) {
      kernel.run(conv, gp, grad.stride(0), grad.stride(1), dp, dcp, parts.get(), groups, b, e);
    });
    kernel.reduce(conv, parts.get(), groups, mutable_data<C>(dweight), mutable_or_null<C>(dbias, a.bias.has_value()),
                  mutable_or_null<C>(dcausal_weight, a.causal_weight.has_value()),
                  mutable_or_null<C>(dcausal_bias, a.causal_bias.has_value()),
                  mutable_or_null<T>(dchunk_scale, a.chunk_scale.has_value()));
  });
  return {dh, dweight, dbias, dcausal_weight, dcausal_bias, dchunk_scale, dcache};
}

}  // namespace

FASTASR_OPERATORS(written<gated_depthwise_conv_forward>, written<gated_depthwise_conv_backward>)

}  // namespace fastasr::bindings::gated_depthwise_conv
