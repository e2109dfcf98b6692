// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/add_norm.h"

#include <memory>

#include "bindings/norm_rows.h"
#include "bindings/written/add_norm.h"

namespace fastasr::bindings::add_norm {
namespace {

template <typename T, typename A>
cpu::AddNorm<T> problem(const A& a) {
  using C = cpu::compute_t<T>;
  cpu::AddNorm<T> p{};
  p.x = data<T>(a.x), p.update = data<T>(a.update), p.update_weight = data_or_null<C>(a.update_weight);
  p.weight = data<C>(a.weight), p.bias = data_or_null<C>(a.bias), p.eps = a.eps, p.scale = static_cast<C>(a.scale);
  p.update_limit = limit_of<T>(a.update_limit), p.limit = limit_of<T>(a.limit);
  p.centred = a.kind == 0, p.channels = a.C;
  return p;
}

// Returns (t, y).
std::tuple<Tensor, Tensor> add_norm_forward(const AddNormForward& a) {
  Tensor t = new_like(a.x), y = new_like(a.x);
  with_kernels<cpu::AddNormKernels>(a.x, a.kName, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const auto p = problem<T>(a);
    T *sums = mutable_data<T>(t), *out = mutable_data<T>(y);
    parallel_tasks(product(a.S), 4 * p.channels, [&](int64_t b, int64_t e) {
      const std::unique_ptr<C[]> scratch(new C[cpu::add_norm_scratch(p.channels)]);
      kernel.forward(p, b, e, sums, out, scratch.get());
    });
  });
  return {t, y};
}

// Returns (dx, dupdate, dweight, dbias, dupdate_weight); the last two have no elements without their parameter.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_norm_backward(const AddNormBackward& a) {
  check(a.grad_y.has_value(), a.kName, "grad_y is missing");
  Tensor dx = new_like(a.x), dupdate = new_like(a.x), dweight = new_like(a.weight);
  Tensor dbias = new_like(a.bias, a.weight);
  Tensor dupdate_weight = new_like(a.update_weight, a.weight);
  with_kernels<cpu::AddNormKernels>(a.x, a.kName, [&]<typename T>(const auto& kernel) {
    const auto p = problem<T>(a);
    const int64_t n = p.channels;
    const T *gt = data_or_null<T>(a.grad_t), *gy = data<T>(*a.grad_y);
    T *ox = mutable_data<T>(dx), *ou = mutable_data<T>(dupdate);
    sum_parts<T>(RowBlocks(product(a.S), n), n,
                 {&dweight, a.bias ? &dbias : nullptr, a.update_weight ? &dupdate_weight : nullptr}, 8 * n,
                 cpu::add_norm_scratch(n), [&](int64_t b, int64_t e, auto* d, auto* scratch) {
                   kernel.backward(p, gt, gy, b, e, ox, ou, d, d + n, d + 2 * n, scratch);
                 });
  });
  return {dx, dupdate, dweight, dbias, dupdate_weight};
}

}  // namespace

FASTASR_OPERATORS(written<add_norm_forward>, written<add_norm_backward>)

}  // namespace fastasr::bindings::add_norm
