// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/add_norm.h"

#include <memory>
#include <tuple>

#include "bindings/norm_rows.h"
#include "bindings/pooled.h"
#include "bindings/written/add_norm.h"

namespace fastasr::bindings::add_norm {
namespace {

template <typename T, typename A>
cpu::AddNorm<T> problem(const A& a) {
  using C = cpu::compute_t<T>;
  return {data<T>(a.x),
          data<T>(a.update),
          data_or_null<C>(a.update_weight),
          data<C>(a.weight),
          data_or_null<C>(a.bias),
          a.eps,
          static_cast<C>(a.scale),
          limit_of<T>(a.update_limit),
          limit_of<T>(a.limit),
          a.kind == 0,
          a.C};
}

// Returns (t, y).
std::tuple<Tensor, Tensor> add_norm_forward(const AddNormForward& a) {
  Tensor t = new_pooled_like(a.x), y = new_pooled_like(a.x);
  with_kernel_type(dtype_of(a.x), a.kName, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::AddNormKernels<T>>();
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
  Tensor dx = new_pooled_like(a.x), dupdate = new_pooled_like(a.x), dweight = new_like(a.weight);
  Tensor dbias = a.bias ? new_like(*a.bias) : new_without_elements(a.weight);
  Tensor dupdate_weight = a.update_weight ? new_like(*a.update_weight) : new_without_elements(a.weight);
  with_kernel_type(dtype_of(a.x), a.kName, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::AddNormKernels<T>>();
    using C = cpu::compute_t<T>;
    const auto p = problem<T>(a);
    const int64_t n = p.channels;
    const T *gt = data_or_null<T>(a.grad_t), *gy = data<T>(*a.grad_y);
    T *ox = mutable_data<T>(dx), *ou = mutable_data<T>(dupdate);
    const RowBlocks blocks(product(a.S), n);
    Scratch<C> parts(blocks.count * 3 * n);  // every block is written
    blocks.parallel(8 * n, [&](int64_t b, int64_t e) {
      const std::unique_ptr<C[]> scratch(new C[cpu::add_norm_scratch(n)]);
      for (int64_t k = b; k < e; k++) {
        C* part = parts.data() + k * 3 * n;
        kernel.backward(p, gt, gy, blocks.begin(k), blocks.begin(k) + blocks.size(k), ox, ou, part, part + n,
                        part + 2 * n, scratch.get());
      }
    });
    reduce_blocks(parts.data(), blocks.count, 3 * n, dweight);
    if (a.bias) reduce_blocks(parts.data() + n, blocks.count, 3 * n, dbias);
    if (a.update_weight) reduce_blocks(parts.data() + 2 * n, blocks.count, 3 * n, dupdate_weight);
  });
  return {dx, dupdate, dweight, dbias, dupdate_weight};
}

}  // namespace

FASTASR_OPERATORS(written<add_norm_forward>, written<add_norm_backward>)

}  // namespace fastasr::bindings::add_norm
