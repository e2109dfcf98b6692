// SPDX-License-Identifier: Apache-2.0
#include "cpu/rel_position_attention.h"

#include <vector>

#include "bindings/attention_problem.h"

namespace fastasr {
namespace {

Tensor rel_position_attention_forward(const Tensor& x, const OptionalTensor& pos, const Tensor& value,
                                      const OptionalTensor& cached_key, const OptionalTensor& padding,
                                      const OptionalTensor& mask, int64_t heads, int64_t query_dim, int64_t value_heads,
                                      int64_t chunk, int64_t left_chunks) {
  const char* op = "rel_position_attention_forward";
  const AttentionProblem a =
      checked_problem(x, pos, cached_key, padding, mask, heads, query_dim, chunk, left_chunks, op);
  check_like(value, x, op, "value");
  STD_TORCH_CHECK(value.dim() == 3 && value.size(0) == a.keys() && value.size(1) == a.batch && value_heads > 0 &&
                      value_heads <= heads && value.size(2) % value_heads == 0,
                  op, ": sizes of value");
  const cpu::ValueShape v = {value_heads, value.size(2) / value_heads};
  const int64_t sizes[3] = {a.frames, a.batch, value.size(2)};
  const int64_t strides[3] = {a.batch * value.size(2), value.size(2), 1};
  Tensor y = new_strided(x, 3, sizes, strides);
  if (y.numel() == 0) return y;
  std::vector<cpu::KeyRange> ranges(static_cast<size_t>(a.batch));
  attention_key_ranges(a, ranges.data());
  with_kernel_type(x.scalar_type(), op, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    const Packed<C> packed(a, false);
    const int64_t pairs = v.heads * a.batch, values_at = packed.total;
    const Workspace<C> workspace(values_at + pairs * attention_values_size(a, v));
    C* const w = workspace.data();
    pack<T>(a, x, pos, cached_key, packed, w, false);
    parallel_range(pairs, std::max<int64_t>(1, kGrain / attention_values_size(a, v)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        cpu::attention_pack_values(a, v, data<T>(value), i, w + values_at + i * attention_values_size(a, v));
    });
    const T* xp = data<T>(x);
    T* yp = mutable_data<T>(y);
    const int64_t rows = cpu::kAttentionQueries, tasks = (a.frames + rows - 1) / rows;
    const int64_t grain = std::max<int64_t>(1, kGrain / (rows * a.keys()));
    parallel_range(pairs * tasks, grain, [&](int64_t begin, int64_t end) {
      const Workspace<C> scratch(attention_values_scratch(a, v));
      for (int64_t i = begin; i < end; i++) {
        const int64_t hb = i / tasks, first = i % tasks * rows;
        cpu::attention_forward(a, v, ranges.data(), xp, w + packed.kt + hb * a.keys_transposed_size(),
                               positions_of(a, w + packed.rt, hb), w + values_at + hb * attention_values_size(a, v), hb,
                               first, std::min(first + rows, a.frames), yp, scratch.data());
      }
    });
  });
  return y;
}

}  // namespace
}  // namespace fastasr

STABLE_TORCH_LIBRARY_FRAGMENT(fastasr_cpu, m) {
  m.def(
      "rel_position_attention_forward(Tensor x, Tensor? pos, Tensor value, Tensor? cached_key, "
      "Tensor? key_padding_mask, Tensor? attn_mask, int num_heads, int query_head_dim, int value_heads, "
      "int chunk_size, int left_context_chunks) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastasr_cpu, CPU, m) {
  m.impl("rel_position_attention_forward", TORCH_BOX(&fastasr::rel_position_attention_forward));
}
