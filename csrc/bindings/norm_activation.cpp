// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/norm_activation.h"

#include <memory>

#include "bindings/norm_rows.h"
#include "bindings/written/norm_activation.h"

namespace fastasr::bindings::norm_activation {
namespace {

template <typename T>
cpu::NormActivation<T> problem(const auto& a) {
  using C = cpu::compute_t<T>;
  check_contiguous(a.x, a.kName, "x");
  return {data<T>(a.x),         data<C>(a.weight), data_or_null<C>(a.bias),        a.eps,
          limit_of<T>(a.limit), a.kind == 0,       static_cast<int>(a.activation), a.C};
}

std::tuple<Tensor, Tensor> norm_activation_forward(const NormActivationForward& a) {
  Tensor y = new_like(a.x), statistics = new_statistics(a.x, a.keep);
  with_kernels<cpu::NormActivationKernels>(a.x, a.kName, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const auto p = problem<T>(a);
    T* out = mutable_data<T>(y);
    auto* kept_rows = written_statistics<T>(statistics);
    parallel_tasks(product(a.S), 2 * a.C, [&](int64_t b, int64_t e) {
      const std::unique_ptr<C[]> scratch(new C[cpu::norm_activation_scratch(a.C)]);
      kernel.forward(p, b, e, out, kept_rows, scratch.get());
    });
  });
  return {y, statistics};
}

// Returns (dx, dweight, dbias); dbias has no elements without a bias.
std::tuple<Tensor, Tensor, Tensor> norm_activation_backward(const NormActivationBackward& a) {
  Tensor dx = new_like(a.x), dweight = new_like(a.weight), dbias = new_like(a.bias, a.weight);
  with_kernels<cpu::NormActivationKernels>(a.x, a.kName, [&]<typename T>(const auto& kernel) {
    const auto p = problem<T>(a);
    const T* g = data<T>(a.grad_y);
    const auto* rows = kept_statistics<T>(a.statistics, product(a.S), a.kName);
    T* out = mutable_data<T>(dx);
    sum_parts<T>(RowBlocks(product(a.S), a.C), a.C, {&dweight, a.bias ? &dbias : nullptr}, 4 * a.C,
                 cpu::norm_activation_scratch(a.C), [&](int64_t b, int64_t e, auto* d, auto* scratch) {
                   kernel.backward(p, g, rows, b, e, out, d, d + a.C, scratch);
                 });
  });
  return {dx, dweight, dbias};
}

}  // namespace

FASTASR_OPERATORS(written<norm_activation_forward>, written<norm_activation_backward>)

}  // namespace fastasr::bindings::norm_activation
