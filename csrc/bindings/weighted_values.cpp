// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/weighted_values.h"

#include <memory>

#include "bindings/attention_work.h"
#include "bindings/layer_parts.h"
#include "bindings/packed.h"
#include "bindings/scratch.h"

namespace fastasr::bindings::weighted_values {
namespace {

constexpr int64_t kRows = 60;  // rows of a task

// Weights (heads, batch, rows, sources) of any strides but the last, contiguous values (sources, batch, width).
struct Shape {
  int64_t heads, batch, rows, sources, width, columns;

  Shape(const Tensor& weights, const Tensor& values, const char* op) {
    check(weights.dim() == 4 && values.dim() == 3, op, "dimensions");
    heads = weights.size(0), batch = weights.size(1), rows = weights.size(2), sources = weights.size(3);
    width = values.size(2);
    for (const Tensor& t : {weights, values})
      check(t.is_cpu() && dtype_of(t) == ScalarType::Float, op, "dtype or device");
    check(weights.stride(3) == 1 || sources <= 1, op, "strides of weights");
    check(values.is_contiguous() && values.size(0) == sources && values.size(1) == batch && heads > 0 &&
              width % heads == 0,
          op, "values");
    columns = width / heads;
  }
};

}  // namespace

Tensor weighted_values(const Tensor& weights, const Tensor& values) {
  const auto& kernel = cpu::kernels<cpu::WeightedValues>();
  const auto [heads, batch, rows, sources, width, columns] = Shape(weights, values, "weighted_values");
  const Tensor out = new_contiguous(values, {rows, batch, width});
  const int64_t size = cpu::packed_values_size(sources, columns);
  const Scratch<float> packed(std::max<int64_t>(1, heads * batch * size));
  const float *w = data<float>(weights), *v = data<float>(values);
  float* const y = mutable_data<float>(out);
  parallel_tasks(heads * batch, size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      kernel.pack(v + i % batch * width + i / batch * columns, batch * width, sources, columns,
                  packed.data() + i * size);
  });
  const int64_t blocks = (rows + kRows - 1) / kRows;
  parallel_tasks(heads * batch * blocks, kRows * sources / 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t matrix = i / blocks, head = matrix / batch, b = matrix % batch, first = i % blocks * kRows;
      kernel.run(w + head * weights.stride(0) + b * weights.stride(1) + first * weights.stride(2), weights.stride(2),
                 std::min(kRows, rows - first), sources, packed.data() + matrix * size, columns,
                 y + (first * batch + b) * width + head * columns, batch * width);
    }
  });
  return out;
}

namespace {

// Sequences that lie one after the other as rows of values (N, 1, heads dim), with weights (heads, 1, T, T) of each.
struct PackedSums {
  int64_t count, heads, width, columns, longest = 0;
  std::vector<int64_t> starts;

  PackedSums(const std::vector<Tensor>& weights, const Tensor& values, const char* op) {
    check_like(values, values, op, "values");
    check(values.dim() == 3 && values.size(1) == 1 && !weights.empty() && dtype_of(values) == ScalarType::Float, op,
          "values");
    count = static_cast<int64_t>(weights.size()), heads = weights[0].size(0), width = values.size(2);
    check(heads > 0 && width % heads == 0, op, "values");
    columns = width / heads;
    std::vector<int64_t> lengths;
    for (const Tensor& w : weights) {
      const int64_t frames = w.dim() == 4 ? w.size(2) : 0;
      check(w.is_cpu() && dtype_of(w) == ScalarType::Float && has_sizes(w, {heads, 1, frames, frames}) &&
                (w.stride(3) == 1 || frames <= 1),
            op, "weights");
      longest = std::max(longest, frames);
      lengths.push_back(frames);
    }
    starts = packed_starts(lengths, values.size(0), op);
  }

  // Runs f(head, sequence, frames, the place of its first number in values) for all heads and sequences; Context() is
  // made once for each thread.
  template <typename Context, typename F>
  void for_each(const Context& context, const F& f) const {
    parallel_packed(heads * count, starts, heads, columns, [&](int64_t begin, int64_t end) {
      const auto memory = context();
      for (int64_t i = begin; i < end; i++) {
        const auto sequence = static_cast<size_t>(i % count);
        f(*memory, i / count, sequence, starts[sequence + 1] - starts[sequence],
          starts[sequence] * width + i / count * columns);
      }
    });
  }
};

auto scratch(int64_t size) { return std::make_unique<Scratch<float>>(std::max<int64_t>(1, size)); }

}  // namespace

Tensor weighted_values_packed(std::vector<Tensor> weights, const Tensor& values) {
  const PackedSums sums(weights, values, "weighted_values_packed");
  const auto& kernel = cpu::kernels<cpu::WeightedValues>();
  const Tensor out = new_contiguous(values);
  const float* v = data<float>(values);
  float* const y = mutable_data<float>(out);
  const int64_t columns = sums.columns, width = sums.width;
  sums.for_each([&] { return scratch(cpu::packed_values_size(sums.longest, columns)); },
                [&](const Scratch<float>& packed, int64_t head, size_t sequence, int64_t frames, int64_t at) {
                  const Tensor& w = weights[sequence];
                  kernel.pack(v + at, width, frames, columns, packed.data());
                  for (int64_t first = 0; first < frames; first += kRows)
                    kernel.run(data<float>(w) + head * w.stride(0) + first * w.stride(2), w.stride(2),
                               std::min(kRows, frames - first), frames, packed.data(), columns, y + at + first * width,
                               width);
                });
  return out;
}

namespace {

// The rows of values or of their gradient that belong to one head and sequence.
struct Rows {
  const float* at;
  int64_t stride;
};

// Computes the gradients of one head and sequence: dW = g v^T (targets, sources) and dv = W^T g. `memory` holds
// gradient_size() numbers.
struct Gradients {
  int64_t targets, sources, columns;

  int64_t size() const {
    return sources * columns +
           std::max(cpu::packed_values_size(columns, sources), cpu::packed_values_size(targets, columns));
  }

  void operator()(const float* w, int64_t w_stride, Rows g, Rows v, float* dw, float* dv, float* memory) const {
    const auto& kernel = cpu::kernels<cpu::WeightedValues>();
    float* const packed = memory + sources * columns;
    for (int64_t c = 0; c < columns; c++)
      for (int64_t j = 0; j < sources; j++) memory[c * sources + j] = v.at[j * v.stride + c];
    kernel.pack(memory, sources, columns, sources, packed);
    kernel.run(g.at, g.stride, targets, columns, packed, sources, dw, sources);
    kernel.pack(g.at, g.stride, targets, columns, packed);
    kernel.transposed(w, w_stride, sources, targets, packed, columns, dv, v.stride);
  }
};

// Returns the gradients of weights (heads, batch, targets, sources) and values (sources, batch, width).
std::tuple<Tensor, Tensor> weighted_values_backward(const Tensor& grad, const Tensor& weights, const Tensor& values) {
  const char* op = "weighted_values_backward";
  const Shape s(weights, values, op);
  check(grad.is_contiguous() && dtype_of(grad) == ScalarType::Float && has_sizes(grad, {s.rows, s.batch, s.width}), op,
        "grad");
  const Tensor dweights = new_contiguous(weights, {s.heads, s.batch, s.rows, s.sources});
  const Tensor dvalues = new_contiguous(values);
  const float *g = data<float>(grad), *v = data<float>(values), *w = data<float>(weights);
  float *const dw = mutable_data<float>(dweights), *const dv = mutable_data<float>(dvalues);
  const Gradients gradients{s.rows, s.sources, s.columns};
  const int64_t row = s.batch * s.width;
  parallel_tasks(s.heads * s.batch, 3 * s.rows * s.sources, [&](int64_t begin, int64_t end) {
    const Scratch<float> memory(std::max<int64_t>(1, gradients.size()));
    for (int64_t i = begin; i < end; i++) {
      const int64_t head = i / s.batch, b = i % s.batch, at = b * s.width + head * s.columns;
      gradients(w + head * weights.stride(0) + b * weights.stride(1), weights.stride(2), {g + at, row}, {v + at, row},
                dw + i * s.rows * s.sources, dv + at, memory.data());
    }
  });
  return {dweights, dvalues};
}

// Returns the gradient of the values and, for each sequence, that of the weights, contiguous.
std::tuple<Tensor, std::vector<Tensor>> weighted_values_packed_backward(const Tensor& grad, std::vector<Tensor> weights,
                                                                        const Tensor& values) {
  const char* op = "weighted_values_packed_backward";
  const PackedSums sums(weights, values, op);
  check_same_size(grad, values, op, "grad");
  const Tensor dvalues = new_contiguous(values);
  std::vector<Tensor> dweights;
  for (const Tensor& w : weights) dweights.push_back(new_contiguous(w));
  const float *g = data<float>(grad), *v = data<float>(values);
  float* const dv = mutable_data<float>(dvalues);
  const int64_t width = sums.width;
  sums.for_each([&] { return scratch(Gradients{sums.longest, sums.longest, sums.columns}.size()); },
                [&](const Scratch<float>& memory, int64_t head, size_t sequence, int64_t frames, int64_t at) {
                  const Tensor& w = weights[sequence];
                  const Gradients gradients{frames, frames, sums.columns};
                  gradients(data<float>(w) + head * w.stride(0), w.stride(2), {g + at, width}, {v + at, width},
                            mutable_data<float>(dweights[sequence]) + head * frames * frames, dv + at, memory.data());
                });
  return {dvalues, dweights};
}

}  // namespace

FASTASR_UNDECLARED(
    "Zipformer's self_attention.py and packed_weights.py call it in nodes of autograd, for plain tensors outside "
    "autocast and tracing",
    FASTASR_TYPED(weighted_values), FASTASR_TYPED(weighted_values_backward), FASTASR_TYPED(weighted_values_packed),
    FASTASR_TYPED(weighted_values_packed_backward))

}  // namespace fastasr::bindings::weighted_values
