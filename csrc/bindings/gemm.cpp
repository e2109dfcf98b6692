// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/gemm.h"

#include <algorithm>

#include "bindings/layer_parts.h"
#include "bindings/scratch.h"

namespace fastasr::bindings::gemm {

// Multiplies few rows of x, (K), (B, K) or (B, T, K), by the transposed weight (N, K), whose rows are contiguous.
Tensor linear_few_rows(const Tensor& x, const Tensor& weight, const Optional& bias) {
  const char* op = "linear_few_rows";
  const int64_t dims = x.dim(), n = weight.size(0), k = weight.size(1);
  check(dims >= 1 && dims <= 3 && weight.dim() == 2 && x.size(dims - 1) == k && k > 0, op, "sizes of x or weight");
  check(dtype_of(x) == ScalarType::Float && dtype_of(weight) == ScalarType::Float, op, "dtypes");
  const Tensor rows = x.is_contiguous() ? x : torch::stable::contiguous(x);
  cpu::Gemm<float> g{};
  g.a = data<float>(rows), g.a_row = k, g.a_depth = 1;
  g.b = data<float>(weight), g.b_depth = weight.stride(1), g.b_column = weight.stride(0);
  g.m = x.numel() / k, g.n = g.c_row = n, g.k = k;
  if (bias) {
    check_like(*bias, x, op, "bias");
    check(bias->numel() == n && bias->is_contiguous(), op, "sizes of bias");
    g.bias = data<float>(*bias);
  }
  const Tensor y = dims == 1   ? new_contiguous(x, {n})
                   : dims == 2 ? new_contiguous(x, {x.size(0), n})
                               : new_contiguous(x, {x.size(0), x.size(1), n});
  g.c = mutable_data<float>(y);
  const auto& kernel = cpu::kernels<cpu::FewRowsGemm>();
  const int64_t groups = kernel.groups(g);
  check(groups > 0, op, "expected 1 to ", cpu::kFewRows, " rows, 8 columns or more, and contiguous inputs");
  parallel_tasks(groups, g.n * g.k / groups, [&](int64_t begin, int64_t end) { kernel.products(g, begin, end); });
  return y;
}

namespace {

// Returns where rows (maps, lines, rows, ...) lie.
cpu::Lines lines_of(const Tensor& t) { return {t.size(2), t.stride(1), t.size(1), t.stride(0)}; }

// Describes the product of (M, K) and (K, N), of any strides, plus a bias (N) or none. In float32, a may be (maps,
// lines, rows, parts of K, terms), the terms next to each other. Sums run in chains of at most `chain` terms, or of as
// many as are fastest if it is 0.
template <typename T>
cpu::Gemm<T> described(const Tensor& a, const Tensor& b, const Optional& bias, int64_t chain, const char* op) {
  const bool lines = a.dim() == 5;
  const int64_t last = a.dim() - 1;
  check((last == 1 || lines) && b.dim() == 2 && dtype_of(a) == dtype_of(b), op, "a and b are matrices of one dtype");
  cpu::Gemm<T> g{};
  g.a = data<T>(a), g.a_row = a.stride(lines ? 2 : 0), g.a_depth = a.stride(last);
  g.b = data<T>(b), g.b_depth = b.stride(0), g.b_column = b.stride(1);
  g.n = g.c_row = b.size(1), g.k = b.size(0);
  if (lines) {
    check(sizeof(T) == 4 && g.a_depth == 1, op, "rows in lines are float32, their terms next to each other");
    g.a_lines = lines_of(a), g.parts = a.size(3), g.part_step = a.stride(3);
  }
  check(g.parts * a.size(last) == g.k && g.k > 0, op, "the inner sizes differ or are 0");
  g.m = a.numel() / g.k;
  check(chain >= 0, op, "chain");
  const int64_t each = 4 / static_cast<int64_t>(sizeof(T));
  if (chain) g.chain = std::clamp<int64_t>(chain / each, 1, cpu::kGemmChain);
  if (bias) {
    check(is_dense(*bias, ScalarType::Float, {g.n}), op, "bias");
    g.bias = data<float>(*bias);
  }
  return g;
}

template <typename T>
void multiply(const cpu::Gemm<T>& g) {
  const auto& kernel = cpu::kernels<cpu::GemmKernels<T>>();
  if (g.m == 0 || g.n == 0) return;
  const int64_t words_a = kernel.packed_a(g), words_b = kernel.packed_b(g);
  const Scratch<float> pa(words_a);
  const int64_t rows = kernel.a_panels(g), columns = kernel.b_panels(g);
  if (const int64_t strips = kernel.strip_count(g, torch::stable::get_num_threads())) {
    parallel_range(rows, std::max<int64_t>(1, 4 * kGrain * rows / words_a),
                   [&](int64_t begin, int64_t end) { kernel.pack_a(g, pa.data(), begin, end); });
    parallel_range(strips, std::max<int64_t>(1, kGrain * strips / (g.m * g.n * g.k / 32 + 1)),
                   [&](int64_t begin, int64_t end) { kernel.strips(g, pa.data(), strips, begin, end); });
    return;
  }
  const Scratch<float> pb(words_b);
  // Every thread gets a part of both operands, because panels of one may take longer than panels of the other.
  const int64_t parts = std::max(words_a ? rows : 0, columns), grain = 4 * kGrain * parts / (words_a + words_b);
  parallel_range(parts, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
    kernel.pack_a(g, pa.data(), rows * begin / parts, rows * end / parts);
    kernel.pack_b(g, pb.data(), columns * begin / parts, columns * end / parts);
  });
  const int64_t tasks = kernel.tasks(g);
  parallel_range(tasks, std::max<int64_t>(1, kGrain * tasks / (g.m * g.n * g.k / 32 + 1)),
                 [&](int64_t begin, int64_t end) { kernel.products(g, pa.data(), pb.data(), begin, end); });
}

}  // namespace

void multiply(const cpu::Gemm<float>& g) { multiply<float>(g); }

namespace {

template <typename F>
void with_factors(const Tensor& a, const char* op, const F& f) {
  if (dtype_of(a) == ScalarType::BFloat16) return f.template operator()<cpu::bfloat16>();
  check(dtype_of(a) == ScalarType::Float, op, "a and b are float32 or bfloat16");
  f.template operator()<float>();
}

// Returns a b, plus a contiguous bias in float32 or none, for float32 or bfloat16: contiguous, in float32.
Tensor gemm(const Tensor& a, const Tensor& b, const Optional& bias, int64_t chain) {
  Tensor c;
  with_factors(a, "gemm", [&]<typename T>() {
    cpu::Gemm<T> g = described<T>(a, b, bias, chain, "gemm");
    c = new_contiguous(a, {g.m, g.n}, ScalarType::Float);
    g.c = mutable_data<float>(c);
    multiply<T>(g);
  });
  return c;
}

// Adds a b to c, in float32, whose rows are contiguous. It may be (maps, lines, rows, N); no two rows overlap.
void gemm_add(Tensor c, const Tensor& a, const Tensor& b, int64_t chain) {
  with_factors(a, "gemm_add", [&]<typename T>() {
    cpu::Gemm<T> g = described<T>(a, b, {}, chain, "gemm_add");
    const int64_t last = c.dim() - 1;
    const bool fits =
        (last == 1 || last == 3) && c.numel() == g.m * g.n && c.size(last) == g.n && (g.n == 1 || c.stride(last) == 1);
    check(fits && dtype_of(c) == ScalarType::Float, "gemm_add", "c");
    g.c = mutable_data<float>(c), g.c_row = c.stride(last - 1), g.add = true;
    if (last == 3) g.c_lines = lines_of(c);
    multiply<T>(g);
  });
}

// Returns aᵀ b, summed over the rows of a (maps, lines, rows, M) and b (maps * lines * rows, N) in float32. The
// elements of a row of a lie next to each other.
Tensor gemm_of_rows(const Tensor& a, const Tensor& b) {
  const char* op = "gemm_of_rows";
  check(a.dim() == 4 && b.dim() == 2 && a.size(3) > 0 && a.numel() == b.size(0) * a.size(3), op, "sizes");
  check(b.size(0) > 0 && a.stride(3) == 1, op, "rows of a");
  for (const Tensor* t : {&a, &b}) check(dtype_of(*t) == ScalarType::Float, op, "dtypes");
  const Tensor c = new_contiguous(a, {a.size(3), b.size(1)}, ScalarType::Float);
  cpu::Gemm<float> g{};
  g.a = data<float>(a), g.a_row = 1, g.a_depth = a.stride(2), g.depth_lines = lines_of(a);
  g.b = data<float>(b), g.b_depth = b.stride(0), g.b_column = b.stride(1);
  g.m = a.size(3), g.n = g.c_row = b.size(1), g.k = b.size(0);
  g.c = mutable_data<float>(c);
  multiply<float>(g);
  return c;
}

}  // namespace

FASTASR_OPERATORS(FASTASR_TYPED(gemm), FASTASR_TYPED(gemm_add), FASTASR_TYPED(gemm_of_rows),
                  FASTASR_TYPED(linear_few_rows))

}  // namespace fastasr::bindings::gemm
