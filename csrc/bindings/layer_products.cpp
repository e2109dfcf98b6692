// SPDX-License-Identifier: Apache-2.0
#include "bindings/layer_products.h"

#include <array>

#include "bindings/layer_parts.h"
#include "cpu/attention/attention_rows.h"
#include "cpu/rows/swoosh.h"

namespace fastasr::layer_products {
namespace {

constexpr const char* kOp = "the product of a layer";

Optional bias(const Product& p) { return p.bias->numel() ? Optional(*p.bias) : Optional(); }

// From so many multiply-adds on the bias comes behind torch's product. Before it, torch would copy the bias to every
// row, which the product then reads. It is _BIAS_LATER of fastasr/ops/_gemm.py, whose bits are the same.
constexpr int64_t kBiasLater = int64_t{1} << 23;

Tensor aten_linear(const Product& p, const Tensor& x, const Optional& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(*p.weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Adds a bias and `onto` to y, where they are given, then replaces it by SwooshL(y) where the caller asks for that.
Tensor finished(Tensor y, const Optional& bias, const Optional& onto, bool swoosh_l) {
  if (!bias && !onto && !swoosh_l) return y;
  if (onto) check_same_size(*onto, y, kOp, "a sum");
  const int64_t n = y.size(y.dim() - 1);
  const auto& rows = cpu::kernels<cpu::AttentionRows<float>>();
  const auto& swoosh = cpu::kernels<cpu::SwooshKernels<float>>();
  const float *const bp = data_or_null<float>(bias), *const op = data_or_null<float>(onto);
  float* const yp = mutable_data<float>(y);
  parallel_tasks(n ? y.numel() / n : 0, n, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      float* const row = yp + r * n;
      if (bp) rows.add_scaled(row, bp, n, 1);
      if (op) rows.add_scaled(row, op + r * n, n, 1);
      if (swoosh_l) swoosh.forward(row, nullptr, cpu::Mask::none, row, n, cpu::Swoosh::L);
    }
  });
  return y;
}

Tensor by_torch(const Product& p, const Tensor& x, const Optional& onto, bool swoosh_l) {
  const bool later = x.numel() * p.outputs >= kBiasLater;
  return finished(aten_linear(p, x, later ? Optional() : bias(p)), later ? bias(p) : Optional(), onto, swoosh_l);
}

Tensor by_gemm(const Product& p, const Tensor& x, const Optional& onto, bool swoosh_l) {
  const Tensor& weight = *p.weight;
  const Tensor y = new_contiguous(x, {x.size(0), x.size(1), p.outputs});
  cpu::Gemm<float> g{};
  g.a = data<float>(x), g.a_row = p.inputs, g.a_depth = 1;
  g.bias = data_or_null<float>(bias(p));
  g.c = mutable_data<float>(y), g.c_row = p.outputs, g.m = x.size(0) * x.size(1), g.n = p.outputs, g.k = p.inputs;
  g.swoosh_l = swoosh_l;
  if (onto) {
    check_same_size(y, *onto, kOp, "a sum");
    g.onto = data<float>(*onto), g.onto_row = p.outputs;
  }
  g.b = data<float>(weight), g.b_depth = weight.stride(1), g.b_column = weight.stride(0);
  bindings::gemm::multiply(g);
  return y;
}

Tensor by_reduced(const Product& p, const Tensor& x, cpu::ReducedInput f) {
  const Tensor y = new_contiguous(x, {x.size(0), x.size(1), p.outputs});
  cpu::ReducedGemm g{};
  g.x = data<float>(x), g.x_row = g.k = x.size(2), g.bias = data_or_null<float>(bias(p));
  g.y = mutable_data<float>(y), g.y_row = g.n = p.outputs, g.m = x.size(0) * x.size(1);
  g.format = static_cast<cpu::WeightFormat>(p.way - kReduced), g.input = f;
  bindings::reduced_gemm::multiply(g, *p.weight);
  return y;
}

}  // namespace

Reader::Reader(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const std::vector<int64_t>& ways,
               const char* op)
    : weights_(weights), biases_(biases), ways_(ways), op_(op) {
  for (const auto* list : {&weights, &biases})
    for (const Tensor& t : *list)
      check(t.is_cpu() && t.is_contiguous() && dtype_of(t) == ScalarType::Float, op, "a parameter");
}

Product Reader::next(const char* name, int64_t inputs, int64_t outputs) {
  const size_t i = count_++;
  check(i < std::min({weights_.size(), biases_.size(), ways_.size()}), op_, name, " is missing");
  const Product p{&weights_[i], &biases_[i], ways_[i], inputs, outputs};
  check(p.way > kReduced || (p.weight->dim() == 2 && has_sizes(*p.weight, {outputs, inputs})), op_, name,
        " has another shape");
  check(p.bias->numel() == 0 || p.bias->numel() == outputs, op_, "the bias of ", name, " has another size");
  return p;
}

Tensor linear(const Product& p, const Tensor& x, cpu::ReducedInput f, const Optional& onto) {
  if (p.way <= kReduced && f != cpu::ReducedInput::x)
    return linear(p, bindings::swoosh::swoosh_forward(x, f == cpu::ReducedInput::swoosh_r, {}, -1, {}),
                  cpu::ReducedInput::x, onto);
  if (p.way == kGemm) return by_gemm(p, x, onto, false);
  if (p.way == kTorch) return by_torch(p, x, onto, false);
  const Tensor y = p.way > kReduced ? by_reduced(p, x, f) : bindings::gemm::linear_few_rows(x, *p.weight, bias(p));
  return finished(y, {}, onto, false);
}

Tensor swoosh_l_of_linear(const Product& p, const Tensor& x) {
  return p.way == kGemm ? by_gemm(p, x, {}, true) : by_torch(p, x, {}, true);
}

}  // namespace fastasr::layer_products
