// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/weighted_values.h"

#include <algorithm>

#include "bindings/dispatch.h"
#include "bindings/pooled.h"

namespace fastasr {
namespace {

constexpr int64_t kRows = 60;  // rows of a task

// Maps weights (heads, batch, T, S), the last dimension contiguous, and contiguous values (S, batch, heads dim) to (T,
// batch, heads dim).
Tensor weighted_values(Tensor weights, Tensor values) {
  const auto& kernel = cpu::kernels<cpu::WeightedValues>();
  check(weights.dim() == 4 && values.dim() == 3, "weighted_values", "dimensions");
  const int64_t heads = weights.size(0), batch = weights.size(1), rows = weights.size(2), sources = weights.size(3);
  const int64_t width = values.size(2);
  for (const Tensor& t : {weights, values})
    check(t.is_cpu() && t.scalar_type() == ScalarType::Float, "weighted_values", "dtype or device");
  check(weights.stride(3) == 1 || sources <= 1, "weighted_values", "strides of weights");
  check(
      values.is_contiguous() && values.size(0) == sources && values.size(1) == batch && heads > 0 && width % heads == 0,
      "weighted_values", "values");
  const int64_t columns = width / heads;
  const Tensor out = new_contiguous(values, {rows, batch, width});
  const int64_t size = cpu::packed_values_size(sources, columns);
  const Scratch<float> packed(std::max<int64_t>(1, heads * batch * size));
  const float *w = data<float>(weights), *v = data<float>(values);
  float* const y = mutable_data<float>(out);
  parallel_range(heads * batch, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; i++)
                     kernel.pack(v + i % batch * width + i / batch * columns, batch * width, sources, columns,
                                 packed.data() + i * size);
                 });
  const int64_t blocks = (rows + kRows - 1) / kRows;
  const int64_t grain = std::max<int64_t>(1, 2 * kGrain / std::max<int64_t>(1, kRows * sources));
  parallel_range(heads * batch * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t matrix = i / blocks, head = matrix / batch, b = matrix % batch, first = i % blocks * kRows;
      kernel.run(w + head * weights.stride(0) + b * weights.stride(1) + first * weights.stride(2), weights.stride(2),
                 std::min(kRows, rows - first), sources, packed.data() + matrix * size, columns,
                 y + (first * batch + b) * width + head * columns, batch * width);
    }
  });
  return out;
}

}  // namespace

FASTASR_OPERATORS({"weighted_values(Tensor weights, Tensor values) -> Tensor", TORCH_BOX(&weighted_values)})

}  // namespace fastasr
