// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/residual_norm.h"

#include <memory>

#include "bindings/norm_rows.h"
#include "cpu/math/activation.h"

namespace fastasr::bindings::residual_norm {
namespace {

// The arguments of a call, without pointers to the outputs. `parameters` holds weight and bias, widened, if they have
// x's dtype and it is narrow.
template <typename T>
struct Call {
  cpu::ResidualNorm<T> p{};
  int64_t rows = 0;
  std::vector<cpu::compute_t<T>> parameters{};
};

Tensor new_result(const Tensor& x) { return x.is_contiguous() ? new_like(x) : new_contiguous(x); }

template <typename T>
cpu::Rows<T> rows_of(const Tensor& t, const Tensor& x, const char* op, const char* name) {
  check(dtype_of(t) == dtype_of(x) && has_sizes(t, x.sizes()), op, name, " has another dtype or shape than x");
  return {data<T>(t), row_stride(t, op, name)};
}

template <typename T>
Call<T> checked(const Tensor& x, const Tensor& update, const Optional& candidate, const Optional& hidden,
                const Optional& mask, const Tensor& weight, const Tensor& bias, double eps, int64_t activation,
                const char* op) {
  using C = cpu::compute_t<T>;
  Call<T> call;
  const int64_t channels = x.size(x.dim() - 1);
  check(candidate.has_value() == hidden.has_value(), op, "candidate and hidden go together");
  const bool narrow = dtype_of(weight) != kComputeType<T>;
  const ScalarType dtype = narrow ? dtype_of(x) : kComputeType<T>;
  for (const Tensor* t : {&weight, &bias}) check(is_dense(*t, dtype, {channels}), op, "weight and bias");
  check(channels > 0, op, "x has no channels");
  check(eps >= 0, op, "eps");
  check(activation >= 0 && activation < cpu::kActivations, op, "activation");
  call.rows = channels ? x.numel() / channels : 0;
  call.p.x = rows_of<T>(x, x, op, "x"), call.p.update = rows_of<T>(update, x, op, "update");
  if (candidate) {
    call.p.candidate = rows_of<T>(*candidate, x, op, "candidate");
    call.p.hidden = rows_of<T>(*hidden, x, op, "hidden");
  }
  if (mask) {
    check(is_dense(*mask, kComputeType<T>, x.sizes()), op, "mask");
    call.p.mask = data<C>(*mask);
  }
  if (narrow) {
    const auto& kernel = cpu::kernels<cpu::ResidualNormKernels<T>>();
    call.parameters.resize(2 * channels);
    kernel.widen(data<T>(weight), call.parameters.data(), channels);
    kernel.widen(data<T>(bias), call.parameters.data() + channels, channels);
  }
  call.p.weight = narrow ? call.parameters.data() : data<C>(weight);
  call.p.bias = narrow ? call.parameters.data() + channels : data<C>(bias);
  call.p.eps = eps, call.p.activation = static_cast<int>(activation), call.p.channels = channels;
  return call;
}

std::tuple<Tensor, Tensor> residual_norm_forward(const Tensor& x, const Tensor& update, const Optional& candidate,
                                                 const Optional& hidden, const Optional& mask, const Tensor& weight,
                                                 const Tensor& bias, double eps, int64_t activation,
                                                 bool keep_statistics) {
  const char* op = "residual_norm_forward";
  check(x.dim() >= 1, op, "x has no dimensions");
  Tensor y = new_result(x), statistics = new_statistics(x, keep_statistics);
  with_kernels<cpu::ResidualNormKernels>(x, op, [&]<typename T>(const auto& kernel) {
    const auto call = checked<T>(x, update, candidate, hidden, mask, weight, bias, eps, activation, op);
    T* out = mutable_data<T>(y);
    auto* kept_rows = written_statistics<T>(statistics);
    const int64_t n = call.p.channels;
    parallel_tasks(call.rows, 2 * n, [&](int64_t b, int64_t e) {
      const std::unique_ptr<cpu::compute_t<T>[]> scratch(new cpu::compute_t<T>[cpu::residual_norm_scratch(n)]);
      kernel.forward(call.p, b, e, out, kept_rows, scratch.get());
    });
  });
  return {y, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& update, const Optional& candidate, const Optional& hidden,
    const Optional& mask, const Tensor& weight, const Tensor& bias, const Optional& statistics, double eps,
    int64_t activation) {
  const char* op = "residual_norm_backward";
  check(x.dim() >= 1, op, "x has no dimensions");
  check_same_size(grad, x, op, "grad");
  Tensor dx = new_result(x);
  Tensor dupdate = candidate ? new_result(x) : new_without_elements(x);
  Tensor dsum = candidate ? new_result(x) : new_without_elements(x);
  Tensor dweight = new_like(weight), dbias = new_like(bias);
  with_kernels<cpu::ResidualNormKernels>(x, op, [&]<typename T>(const auto& kernel) {
    const auto call = checked<T>(x, update, candidate, hidden, mask, weight, bias, eps, activation, op);
    const int64_t n = call.p.channels;
    const T* g = data<T>(grad);
    const auto* rows = kept_statistics<T>(statistics, call.rows, op);
    T *ox = mutable_data<T>(dx), *ou = mutable_data<T>(dupdate), *os = mutable_data<T>(dsum);
    sum_parts<T>(RowBlocks(call.rows, n), n, {&dweight, &dbias}, 4 * n, cpu::residual_norm_scratch(n),
                 [&](int64_t b, int64_t e, auto* d, auto* scratch) {
                   kernel.backward(call.p, g, rows, b, e, ox, ou, os, d, d + n, scratch);
                 });
  });
  return {dx, dupdate, dsum, dweight, dbias};
}

}  // namespace

FASTASR_OPERATORS(FASTASR_TYPED(residual_norm_forward), FASTASR_TYPED(residual_norm_backward))

}  // namespace fastasr::bindings::residual_norm
