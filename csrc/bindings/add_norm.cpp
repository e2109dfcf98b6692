// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/add_norm.h"

#include <memory>
#include <tuple>

#include "bindings/channel_parameters.h"
#include "bindings/norm_rows.h"
#include "bindings/pooled.h"

namespace fastasr::bindings::add_norm {
namespace {

constexpr int64_t kKinds = 2;  // LayerNorm, RMSNorm

template <typename T>
cpu::AddNorm<T> checked(const Tensor& x, const Tensor& update, const Tensor& weight, const Optional& bias,
                        const Optional& update_weight, double eps, double scale, int64_t kind, double update_limit,
                        double limit, const char* op) {
  using C = cpu::compute_t<T>;
  check_like(x, x, op, "x");
  check_same_size(update, x, op, "update");
  check(x.dim() >= 1 && x.size(x.dim() - 1) > 0, op, "x has no channels");
  const int64_t channels = x.size(x.dim() - 1);
  bool same = update.dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); d++) same = update.size(d) == x.size(d);
  check(same, op, "update has another shape than x");
  check_vector<T>(weight, channels, op, "weight");
  if (bias) check_vector<T>(*bias, channels, op, "bias");
  if (update_weight) check_vector<T>(*update_weight, channels, op, "update_weight");
  check(eps >= 0, op, "eps");
  check(limit >= 0 && update_limit >= 0, op, "a limit");
  check(kind >= 0 && kind < kKinds, op, "kind");
  return {data<T>(x), data<T>(update),       data_or_null<C>(update_weight), data<C>(weight),    data_or_null<C>(bias),
          eps,        static_cast<C>(scale), limit_of<T>(update_limit),      limit_of<T>(limit), kind == 0,
          channels};
}

// Returns (t, y).
std::tuple<Tensor, Tensor> add_norm_forward(const Tensor& x, const Tensor& update, const Tensor& weight,
                                            const Optional& bias, const Optional& update_weight, double eps,
                                            double scale, int64_t kind, double update_limit, double limit) {
  const char* op = "add_norm_forward";
  Tensor t = new_without_elements(x), y = t;
  with_kernel_type(dtype_of(x), op, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::AddNormKernels<T>>();
    using C = cpu::compute_t<T>;
    const auto p = checked<T>(x, update, weight, bias, update_weight, eps, scale, kind, update_limit, limit, op);
    t = new_pooled_like(x), y = new_pooled_like(x);
    T *sums = mutable_data<T>(t), *out = mutable_data<T>(y);
    parallel_tasks(x.numel() / p.channels, 4 * p.channels, [&](int64_t b, int64_t e) {
      const std::unique_ptr<C[]> scratch(new C[cpu::add_norm_scratch(p.channels)]);
      kernel.forward(p, b, e, sums, out, scratch.get());
    });
  });
  return {t, y};
}

// Returns (dx, dupdate, dweight, dbias, dupdate_weight); the last two have no elements without their parameter.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_norm_backward(const Optional& grad_t, const Tensor& grad_y,
                                                                     const Tensor& x, const Tensor& update,
                                                                     const Tensor& weight, const Optional& bias,
                                                                     const Optional& update_weight, double eps,
                                                                     double scale, int64_t kind, double update_limit,
                                                                     double limit) {
  const char* op = "add_norm_backward";
  check_same_size(grad_y, x, op, "grad_y");
  if (grad_t) check_same_size(*grad_t, x, op, "grad_t");
  Tensor dx = new_pooled_like(x), dupdate = new_pooled_like(x), dweight = new_like(weight);
  Tensor dbias = bias ? new_like(*bias) : new_without_elements(weight);
  Tensor dupdate_weight = update_weight ? new_like(*update_weight) : new_without_elements(weight);
  with_kernel_type(dtype_of(x), op, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::AddNormKernels<T>>();
    using C = cpu::compute_t<T>;
    const auto p = checked<T>(x, update, weight, bias, update_weight, eps, scale, kind, update_limit, limit, op);
    const int64_t n = p.channels;
    const T *gt = data_or_null<T>(grad_t), *gy = data<T>(grad_y);
    T *ox = mutable_data<T>(dx), *ou = mutable_data<T>(dupdate);
    const RowBlocks blocks(x.numel() / n, n);
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
    if (bias) reduce_blocks(parts.data() + n, blocks.count, 3 * n, dbias);
    if (update_weight) reduce_blocks(parts.data() + 2 * n, blocks.count, 3 * n, dupdate_weight);
  });
  return {dx, dupdate, dweight, dbias, dupdate_weight};
}

}  // namespace

FASTASR_OPERATORS({"add_norm_forward(Tensor x, Tensor update, Tensor weight, Tensor? bias, Tensor? update_weight, "
                   "float eps, float scale, int kind, float update_limit, float limit) -> (Tensor, Tensor)",
                   Boxed<add_norm_forward>::call},
                  {"add_norm_backward(Tensor? grad_t, Tensor grad_y, Tensor x, Tensor update, Tensor weight, "
                   "Tensor? bias, Tensor? update_weight, float eps, float scale, int kind, float update_limit, "
                   "float limit) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
                   Boxed<add_norm_backward>::call})

}  // namespace fastasr::bindings::add_norm
