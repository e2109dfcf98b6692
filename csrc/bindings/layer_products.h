// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bindings/dispatch.h"
#include "cpu/gemm/reduced_gemm.h"

// The linear layers inside an operator that computes a whole layer in inference, in float32: on the layer's own weights
// or on copies in fewer bits.
namespace fastasr::layer_products {

// The way a product is computed, as fastasr/ops/_gemm.py names it. The last two are cpu::WeightFormat's formats, after
// kReduced.
constexpr int64_t kTorch = 0, kGemm = 1, kFewRows = 2, kReduced = 2;

struct Product {
  const Tensor *weight, *bias;  // the weight is a matrix, or a packed copy where `way` says so
  int64_t way, inputs, outputs;
};

// Gives a layer's products one after the other. An absent bias has no elements.
class Reader {
 public:
  Reader(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const std::vector<int64_t>& ways,
         const char* op);
  Product next(const char* name, int64_t inputs, int64_t outputs);

 private:
  const std::vector<Tensor>&weights_, &biases_;
  const std::vector<int64_t>& ways_;
  const char* op_;
  size_t count_ = 0;
};

// Returns f(x) weightᵀ + bias for contiguous x (rows, columns, inputs), where f is SwooshL, SwooshR or nothing, and
// `onto` more if that is given.
Tensor linear(const Product& p, const Tensor& x, cpu::ReducedInput f = cpu::ReducedInput::x, const Optional& onto = {});
// Returns SwooshL(x weightᵀ + bias). The way is kTorch or kGemm.
Tensor swoosh_l_of_linear(const Product& p, const Tensor& x);

}  // namespace fastasr::layer_products
