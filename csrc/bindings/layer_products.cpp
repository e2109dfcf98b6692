// SPDX-License-Identifier: Apache-2.0
#include "bindings/layer_products.h"

#include <array>

#include "bindings/layer_parts.h"
#include "cpu/attention/attention_rows.h"

namespace fastasr::layer_products {
namespace {

constexpr const char* kOp = "the product of a layer";

Optional bias(const Product& p) { return p.bias->numel() ? Optional(*p.bias) : Optional(); }

// Adds x to y and returns it.
Tensor plus(const Tensor& x, Tensor y) {
  check_same_size(x, y, kOp, "a sum");
  const auto& kernel = cpu::kernels<cpu::AttentionRows<float>>();
  const float* const xp = data<float>(x);
  float* const yp = mutable_data<float>(y);
  parallel_range(y.numel(), kGrain,
                 [&](int64_t begin, int64_t end) { kernel.add_scaled(yp + begin, xp + begin, end - begin, 1); });
  return y;
}

Tensor by_torch(const Product& p, const Tensor& x) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(*p.weight), from(bias(p))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
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
  const Tensor y = p.way > kReduced  ? by_reduced(p, x, f)
                   : p.way == kTorch ? by_torch(p, x)
                                     : bindings::gemm::linear_few_rows(x, *p.weight, bias(p));
  return onto ? plus(*onto, y) : y;
}

Tensor swoosh_l_of_linear(const Product& p, const Tensor& x) { return by_gemm(p, x, {}, true); }

}  // namespace fastasr::layer_products
