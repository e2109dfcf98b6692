// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/norm_activation.h"

#include <memory>
#include <tuple>

#include "bindings/channel_parameters.h"
#include "bindings/norm_rows.h"
#include "bindings/pooled.h"
#include "cpu/math/activation.h"

namespace fastasr::bindings::norm_activation {
namespace {

constexpr int64_t kKinds = 2;  // LayerNorm, RMSNorm

template <typename T>
cpu::NormActivation<T> checked(const Tensor& x, const Tensor& weight, const Optional& bias, double eps, int64_t kind,
                               int64_t activation, double limit, const char* op) {
  using C = cpu::compute_t<T>;
  check_like(x, x, op, "x");
  check(x.dim() >= 1 && x.size(x.dim() - 1) > 0, op, "x has no channels");
  const int64_t channels = x.size(x.dim() - 1);
  check_vector<T>(weight, channels, op, "weight");
  if (bias) check_vector<T>(*bias, channels, op, "bias");
  check(eps >= 0, op, "eps");
  check(limit >= 0, op, "limit");
  check(kind >= 0 && kind < kKinds, op, "kind");
  check(activation >= 0 && activation < cpu::kActivations, op, "activation");
  return {data<T>(x),         data<C>(weight), data_or_null<C>(bias),        eps,
          limit_of<T>(limit), kind == 0,       static_cast<int>(activation), channels};
}

std::tuple<Tensor, Tensor> norm_activation_forward(const Tensor& x, const Tensor& weight, const Optional& bias,
                                                   double eps, int64_t kind, int64_t activation, double limit,
                                                   bool keep_statistics) {
  const char* op = "norm_activation_forward";
  Tensor y = new_without_elements(x), statistics = y;
  with_kernel_type(dtype_of(x), op, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::NormActivationKernels<T>>();
    using C = cpu::compute_t<T>;
    const auto p = checked<T>(x, weight, bias, eps, kind, activation, limit, op);
    y = new_pooled_like(x), statistics = new_statistics(x, keep_statistics);
    T* out = mutable_data<T>(y);
    auto* kept_rows = written_statistics<T>(statistics);
    parallel_tasks(x.numel() / p.channels, 2 * p.channels, [&](int64_t b, int64_t e) {
      const std::unique_ptr<C[]> scratch(new C[cpu::norm_activation_scratch(p.channels)]);
      kernel.forward(p, b, e, out, kept_rows, scratch.get());
    });
  });
  return {y, statistics};
}

// Returns (dx, dweight, dbias); dbias has no elements without a bias.
std::tuple<Tensor, Tensor, Tensor> norm_activation_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                            const Optional& bias, const Optional& statistics,
                                                            double eps, int64_t kind, int64_t activation,
                                                            double limit) {
  const char* op = "norm_activation_backward";
  check_same_size(grad, x, op, "grad");
  Tensor dx = new_pooled_like(x), dweight = new_like(weight);
  Tensor dbias = bias ? new_like(*bias) : new_without_elements(weight);
  with_kernel_type(dtype_of(x), op, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::NormActivationKernels<T>>();
    const auto p = checked<T>(x, weight, bias, eps, kind, activation, limit, op);
    const int64_t n = p.channels, count = x.numel() / n;
    const T* g = data<T>(grad);
    const auto* rows = kept_statistics<T>(statistics, count, op);
    T* out = mutable_data<T>(dx);
    sum_pairs<T>(RowBlocks(count, n), n, cpu::norm_activation_scratch(n), dweight, bias ? &dbias : nullptr,
                 [&](int64_t b, int64_t e, auto* dw, auto* db, auto* scratch) {
                   kernel.backward(p, g, rows, b, e, out, dw, db, scratch);
                 });
  });
  return {dx, dweight, dbias};
}

}  // namespace

FASTASR_OPERATORS({"norm_activation_forward(Tensor x, Tensor weight, Tensor? bias, float eps, int kind, "
                   "int activation, float limit, bool keep_statistics) -> (Tensor, Tensor)",
                   Boxed<norm_activation_forward>::call},
                  {"norm_activation_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? statistics, "
                   "float eps, int kind, int activation, float limit) -> (Tensor, Tensor, Tensor)",
                   Boxed<norm_activation_backward>::call})

}  // namespace fastasr::bindings::norm_activation
