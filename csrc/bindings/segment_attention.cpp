// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/segment_attention.h"

#include <array>
#include <tuple>

#include "bindings/dispatch.h"
#include "bindings/pooled.h"

namespace fastasr::bindings::segment_attention {
namespace {

using Sizes = std::array<int64_t, 8>;  // heads, frames, segment, left, right, memory, past frames, past memory

template <typename T>
cpu::Sequence<const T> sequence(const Tensor& t, const Tensor& query, int64_t rows, const char* op, const char* name) {
  check(t.dim() == 3 && dtype_of(t) == dtype_of(query) && t.size(0) == rows && t.size(1) == query.size(1) &&
            t.size(2) == query.size(2) && (t.size(2) == 1 || t.stride(2) == 1 || t.numel() == 0),
        op, name, " is not (", rows, ", batch, dense channels) like query");
  return {data<T>(t), t.stride(0), t.stride(1)};
}

const int64_t* integers(const Optional& t, int64_t count, const char* op, const char* name) {
  if (!t) return nullptr;
  check(is_dense(*t, ScalarType::Long, {count}), op, name);
  return data<int64_t>(*t);
}

template <typename T>
cpu::SegmentAttention<T> checked(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& lengths,
                                 const Optional& history, const Optional& dropout, const Sizes& n, const char* op) {
  cpu::SegmentAttention<T> p{};
  check(query.dim() == 3 && n[0] > 0 && query.size(2) > 0 && query.size(2) % n[0] == 0, op, "query");
  check(n[2] > 0 && *std::min_element(n.begin(), n.end()) >= 0, op, "negative sizes");
  p.batch = query.size(1), p.heads = n[0], p.width = query.size(2) / n[0];
  p.frames = n[1], p.segment = n[2], p.left = n[3], p.right = n[4], p.memory = n[5];
  p.past_frames = n[6], p.past_memory = n[7];
  check(p.memory > 0 || p.past_memory == 0, op, "past memory without memory");
  p.query = sequence<T>(query, query, p.queries(), op, "query");
  p.key = sequence<T>(key, query, p.keys(), op, "key");
  p.value = sequence<T>(value, query, p.keys(), op, "value");
  p.lengths = integers(lengths, p.batch, op, "lengths");
  p.history = integers(history, 2, op, "history");
  if (dropout) {
    check(is_dense(*dropout, kComputeType<T>, {p.batch, p.heads, p.queries(), p.lanes()}), op, "dropout");
    p.dropout = data<cpu::compute_t<T>>(*dropout);
  }
  return p;
}

template <typename T, typename F>
void for_units(const cpu::SegmentAttention<T>& p, bool backward, const F& f) {
  const int64_t work = p.blocks() * cpu::kPanel * p.score_rows() * p.width * (backward ? 5 : 2);
  parallel_range(p.units(), std::max<int64_t>(1, 16 * kGrain / std::max<int64_t>(1, work)), [&](int64_t b, int64_t e) {
    Scratch<cpu::compute_t<T>> scratch(cpu::segment_attention_scratch(p, backward));
    for (int64_t unit = b; unit < e; unit++) f(unit, scratch.data());
  });
}

Tensor segment_attention_forward(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& lengths,
                                 const Optional& history, const Optional& dropout, int64_t heads, int64_t frames,
                                 int64_t segment, int64_t left, int64_t right, int64_t memory, int64_t past_frames,
                                 int64_t past_memory) {
  const char* op = "segment_attention_forward";
  const Sizes sizes{heads, frames, segment, left, right, memory, past_frames, past_memory};
  Tensor y = new_contiguous(query);
  with_kernel_type(dtype_of(query), op, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::SegmentAttentionKernels<T>>();
    const auto p = checked<T>(query, key, value, lengths, history, dropout, sizes, op);
    T* out = mutable_data<T>(y);
    for_units(p, false, [&](int64_t unit, auto* scratch) { kernel.forward(p, unit, out, scratch); });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> segment_attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Optional& lengths,
    const Optional& history, const Optional& dropout, int64_t heads, int64_t frames, int64_t segment, int64_t left,
    int64_t right, int64_t memory, int64_t past_frames, int64_t past_memory) {
  const char* op = "segment_attention_backward";
  const Sizes sizes{heads, frames, segment, left, right, memory, past_frames, past_memory};
  Tensor dquery = new_contiguous(query), dkey = new_contiguous(key), dvalue = new_contiguous(value);
  with_kernel_type(dtype_of(query), op, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::SegmentAttentionKernels<T>>();
    const auto p = checked<T>(query, key, value, lengths, history, dropout, sizes, op);
    const auto g = sequence<T>(grad, query, p.queries(), op, "grad");
    T *dq = mutable_data<T>(dquery), *dk = mutable_data<T>(dkey), *dv = mutable_data<T>(dvalue);
    for_units(p, true, [&](int64_t unit, auto* scratch) { kernel.backward(p, g, unit, dq, dk, dv, scratch); });
  });
  return {dquery, dkey, dvalue};
}

}  // namespace

FASTASR_OPERATORS({"segment_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? lengths, "
                   "Tensor? history, Tensor? dropout, int heads, int frames, int segment, int left, int right, "
                   "int memory, int past_frames, int past_memory) -> Tensor",
                   Boxed<segment_attention_forward>::call},
                  {"segment_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, "
                   "Tensor? lengths, Tensor? history, Tensor? dropout, int heads, int frames, int segment, "
                   "int left, int right, int memory, int past_frames, int past_memory) -> (Tensor, Tensor, Tensor)",
                   Boxed<segment_attention_backward>::call})

}  // namespace fastasr::bindings::segment_attention
