// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/segment_attention.h"

#include "bindings/scratch.h"
#include "bindings/written/segment_attention.h"

namespace fastasr::bindings::segment_attention {
namespace {

template <typename T>
cpu::SegmentAttention<T> sizes_of(const auto& a) {
  cpu::SegmentAttention<T> p{};
  p.batch = a.B, p.heads = a.num_heads, p.width = a.D;
  p.frames = a.frames, p.segment = a.segment_length;
  p.left = a.left_context_length, p.right = a.right_context_length, p.memory = a.max_memory_size;
  p.past_frames = a.past_frames, p.past_memory = a.past_memory;
  return p;
}

template <typename T>
cpu::SegmentAttention<T> problem(const auto& a) {
  auto p = sizes_of<T>(a);
  p.query = sequence<T>(a.query), p.key = sequence<T>(a.key), p.value = sequence<T>(a.value);
  p.lengths = data_or_null<int64_t>(a.lengths), p.history = data_or_null<int64_t>(a.history);
  p.dropout = data_or_null<cpu::compute_t<T>>(a.weights_dropout);
  return p;
}

template <typename T, typename F>
void for_units(const cpu::SegmentAttention<T>& p, bool backward, const F& f) {
  const int64_t work = p.blocks() * cpu::kPanel * p.score_rows() * p.width * (backward ? 5 : 2);
  parallel_tasks(p.units(), work / 16, [&](int64_t b, int64_t e) {
    Scratch<cpu::compute_t<T>> scratch(cpu::segment_attention_scratch(p, backward));
    for (int64_t unit = b; unit < e; unit++) f(unit, scratch.data());
  });
}

Tensor segment_attention_forward(const SegmentAttentionForward& a) {
  Tensor y = new_contiguous(a.query);
  with_kernels<cpu::SegmentAttentionKernels>(a.query, a.kName, [&]<typename T>(const auto& kernel) {
    const auto p = problem<T>(a);
    T* out = mutable_data<T>(y);
    for_units(p, false, [&](int64_t unit, auto* scratch) { kernel.forward(p, unit, out, scratch); });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> segment_attention_backward(const SegmentAttentionBackward& a) {
  Tensor dquery = new_contiguous(a.query), dkey = new_contiguous(a.key), dvalue = new_contiguous(a.value);
  with_kernels<cpu::SegmentAttentionKernels>(a.query, a.kName, [&]<typename T>(const auto& kernel) {
    const auto p = problem<T>(a);
    const auto g = sequence<T>(a.grad_y);
    T *dq = mutable_data<T>(dquery), *dk = mutable_data<T>(dkey), *dv = mutable_data<T>(dvalue);
    for_units(p, true, [&](int64_t unit, auto* scratch) { kernel.backward(p, g, unit, dq, dk, dv, scratch); });
  });
  return {dquery, dkey, dvalue};
}

}  // namespace

template <typename A>
void find_sizes(A& a) {
  const auto p = sizes_of<float>(a);
  check(p.memory > 0 || p.past_memory == 0, a.kName, "past memory without memory");
  check(a.N == p.queries(), a.kName, "query has another number of rows");
  a.Q = p.queries(), a.K = p.keys(), a.lanes = p.lanes();
}

FASTASR_OPERATORS(written<segment_attention_forward>, written<segment_attention_backward>)

}  // namespace fastasr::bindings::segment_attention
