// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/reduced_gemm.h"

#include "bindings/layer_parts.h"
#include "bindings/scratch.h"

namespace fastasr::bindings::reduced_gemm {
namespace {

constexpr const char* kOp = "reduced_linear";

cpu::WeightFormat format_of(int64_t format) {
  check(format == 1 || format == 2, kOp, "the format is bf16 (1) or int8 (2)");
  return static_cast<cpu::WeightFormat>(format);
}

// The elements of a packed weight, a tensor of float32 that holds words, scales and sums.
int64_t size_of(int64_t n, int64_t k, cpu::WeightFormat format) {
  return cpu::reduced_panels(n) * cpu::kReducedColumns * (cpu::reduced_words(k, format) + 2);
}
struct Parts {
  int32_t* words;
  float* scale;
  int32_t* sum;
};
Parts parts_of(const Tensor& packed, int64_t n, int64_t k, cpu::WeightFormat format) {
  const int64_t columns = cpu::reduced_panels(n) * cpu::kReducedColumns;
  auto* const words = reinterpret_cast<int32_t*>(mutable_data<float>(packed));
  auto* const scale = reinterpret_cast<float*>(words + columns * cpu::reduced_words(k, format));
  return {words, scale, reinterpret_cast<int32_t*>(scale + columns)};
}

// Packs a weight (N, K) in float32.
Tensor reduced_pack(const Tensor& weight, int64_t format) {
  const cpu::WeightFormat f = format_of(format);
  check(weight.dim() == 2 && dtype_of(weight) == ScalarType::Float && weight.is_cpu(), kOp,
        "weight is a float32 matrix on the CPU");
  const int64_t n = weight.size(0), k = weight.size(1);
  check(k > 0 && k <= cpu::kReducedMostInputs && n > 0, kOp, "the weight has 1 to 65536 inputs");
  check(k == 1 || weight.stride(1) == 1, kOp, "rows of the weight are contiguous");
  const Tensor packed = new_contiguous(weight, {size_of(n, k, f)});
  const auto [words, scale, sum] = parts_of(packed, n, k, f);
  const auto* const w = data<float>(weight);
  parallel_tasks(cpu::reduced_panels(n), cpu::kReducedColumns * k, [&](int64_t begin, int64_t end) {
    cpu::pack_reduced(w, n, k, weight.stride(0), f, words, scale, sum, begin, end);
  });
  return packed;
}

}  // namespace

void multiply(cpu::ReducedGemm g, const Tensor& packed) {
  const auto& kernel = cpu::reduced_gemm_kernels(g.format);
  check(g.k > 0 && g.n > 0 && is_dense(packed, ScalarType::Float, {size_of(g.n, g.k, g.format)}), kOp,
        "the packed weight has another size");
  if (g.m == 0) return;
  const Parts parts = parts_of(packed, g.n, g.k, g.format);
  g.weights = {parts.words, parts.scale, parts.sum};
  const int64_t words = cpu::reduced_words(g.k, g.format);
  const Scratch<int32_t> rows(g.m * (words + 2));
  g.rows = rows.data(), g.zero = g.rows + g.m * words, g.step = reinterpret_cast<float*>(g.zero + g.m);
  const int64_t tasks = kernel.tasks(g), grain = std::max<int64_t>(1, kGrain * tasks / (g.m * g.n * words / 32 + 1));
  if (kernel.tasks_are_rows(g)) {
    parallel_range(tasks, grain, [&](int64_t begin, int64_t end) { kernel.rows_and_products(g, begin, end); });
    return;
  }
  parallel_tasks(g.m, g.k, [&](int64_t begin, int64_t end) { kernel.rows(g, begin, end); });
  parallel_range(tasks, grain, [&](int64_t begin, int64_t end) { kernel.products(g, begin, end); });
}

namespace {

// Multiplies x (M, K), or swoosh(x), by a packed weight (N, K), plus a bias (N) or none, in float32.
Tensor reduced_linear(const Tensor& x, const Tensor& packed, const Optional& bias, int64_t n, int64_t format,
                      int64_t input) {
  check(x.is_cpu() && x.dim() == 2 && dtype_of(x) == ScalarType::Float, kOp, "x is a float32 matrix on the CPU");
  cpu::ReducedGemm g{};
  g.format = format_of(format);
  check(input >= 0 && input <= 2, kOp, "the input is x (0), SwooshL (1) or SwooshR (2) of it");
  g.input = static_cast<cpu::ReducedInput>(input);
  g.m = x.size(0), g.n = n, g.k = x.size(1);
  check(n > 0, kOp, "the packed weight has another size");
  g.x = data<float>(x), g.x_row = row_stride(x, kOp, "x");
  if (bias) {
    check_like(*bias, x, kOp, "bias");
    check(bias->numel() == n && bias->is_contiguous(), kOp, "sizes of bias");
    g.bias = data<float>(*bias);
  }
  const Tensor y = new_contiguous(x, {g.m, n});
  g.y = mutable_data<float>(y), g.y_row = n;
  multiply(g, packed);
  return y;
}

}  // namespace

FASTASR_UNDECLARED(
    "linear's product calls it for weights stored in bf16 or int8; linear has the fake function and the autocast rule",
    FASTASR_TYPED(reduced_pack), FASTASR_TYPED(reduced_linear))

}  // namespace fastasr::bindings::reduced_gemm
