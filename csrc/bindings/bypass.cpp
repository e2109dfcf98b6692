// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/bypass.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "bindings/layer_parts.h"
#include "bindings/packed.h"
#include "bindings/pooled.h"
#include "bindings/row_sums.h"
#include "bindings/written/bypass.h"

namespace fastasr::bindings::bypass {
namespace {

// Kernels repeat scale over rows of its size: it has the trailing dimensions of x. Returns the number of rows.
int64_t rows_of(const Tensor& x, const Tensor& scale, const char* op) {
  const Sizes sizes = x.sizes(), last = scale.sizes();
  check(!last.empty() && last.size() <= sizes.size() && std::equal(last.rbegin(), last.rend(), sizes.rbegin()), op,
        "scale is not x's trailing dimensions");
  return scale.numel() ? product(sizes.slice(0, sizes.size() - last.size())) : 0;
}

}  // namespace

Tensor bypass_forward(const BypassForward& a) {
  const int64_t rows = rows_of(a.x, a.scale, a.kName), period = a.scale.numel();
  Tensor y = new_pooled_like(a.x);
  with_kernel_type(dtype_of(a.x), a.kName, [&]<typename T>() {
    const T *op = data<T>(a.x_orig), *xp = data<T>(a.x), *sp = data<T>(a.scale);
    T* yp = mutable_data<T>(y);
    const auto& kernel = cpu::kernels<cpu::BypassKernels<T>>();
    parallel_tasks(rows, period, [&](int64_t b, int64_t e) {
      kernel.forward(op + b * period, xp + b * period, sp, yp + b * period, e - b, period);
    });
  });
  return y;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> bypass_backward(const BypassBackward& a) {
  const int64_t rows = rows_of(a.x, a.scale, a.kName), period = a.scale.numel();
  Tensor dx_orig = new_pooled_like(a.x), dx = new_pooled_like(a.x), dscale = new_like(a.scale);
  with_kernel_type(dtype_of(a.x), a.kName, [&]<typename T>() {
    const T *gp = data<T>(a.grad_y), *op = data<T>(a.x_orig), *xp = data<T>(a.x), *sp = data<T>(a.scale);
    T *dop = mutable_data<T>(dx_orig), *dxp = mutable_data<T>(dx);
    const auto& kernel = cpu::kernels<cpu::BypassKernels<T>>();
    const RowBlocks blocks(rows, period);
    sum_parts<T>(blocks, period, &dscale, [&](int64_t k, auto* part) {
      const int64_t at = blocks.begin(k) * period;
      kernel.backward(gp + at, op + at, xp + at, sp, dop + at, dxp + at, part, blocks.size(k), period);
    });
  });
  return {dx_orig, dx, dscale};
}

// Checks x_orig and x, rows (N, ...) of sequences that lie one after the other, and the scale of each sequence, (B, the
// elements of a row). Returns where each sequence begins, and the end of the last.
std::vector<int64_t> bypass_starts(const Tensor& x_orig, const Tensor& x, const Tensor& scale,
                                   const std::vector<int64_t>& lengths, const char* op) {
  check_like(x, x, op, "x");
  check_same_size(x_orig, x, op, "x_orig");
  check_like(scale, x, op, "scale");
  check(x.dim() > 0, op, "x has no rows");
  std::vector<int64_t> starts = packed_starts(lengths, x.size(0), op);
  check(has_sizes(scale, {static_cast<int64_t>(lengths.size()), x.numel() / x.size(0)}), op, "sizes of scale");
  return starts;
}

Tensor bypass_packed_forward(const Tensor& x_orig, const Tensor& x, const Tensor& scale, std::vector<int64_t> lengths) {
  const char* op = "bypass_packed_forward";
  const std::vector<int64_t> starts = bypass_starts(x_orig, x, scale, lengths, op);
  const int64_t channels = scale.size(1);
  Tensor y = new_pooled_like(x);
  with_kernel_type(dtype_of(x), op, [&]<typename T>() {
    const T *from = data<T>(x_orig), *xp = data<T>(x), *sp = data<T>(scale);
    T* yp = mutable_data<T>(y);
    const auto& kernel = cpu::kernels<cpu::BypassKernels<T>>();
    parallel_tasks(x.size(0), channels, [&](int64_t b, int64_t e) {
      for (auto s = std::upper_bound(starts.begin(), starts.end(), b) - starts.begin() - 1; b < e; s++) {
        const int64_t end = std::min(e, starts[static_cast<size_t>(s) + 1]), at = b * channels;
        kernel.forward(from + at, xp + at, sp + s * channels, yp + at, end - b, channels);
        b = end;
      }
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> bypass_packed_backward(const Tensor& grad, const Tensor& x_orig, const Tensor& x,
                                                          const Tensor& scale, std::vector<int64_t> lengths) {
  const char* op = "bypass_packed_backward";
  const std::vector<int64_t> starts = bypass_starts(x_orig, x, scale, lengths, op);
  check_same_size(grad, x, op, "grad");
  const int64_t channels = scale.size(1), count = scale.size(0);
  Tensor dx_orig = new_pooled_like(x), dx = new_pooled_like(x), dscale = new_like(scale);
  with_kernel_type(dtype_of(x), op, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    const T *gp = data<T>(grad), *from = data<T>(x_orig), *xp = data<T>(x), *sp = data<T>(scale);
    T *dop = mutable_data<T>(dx_orig), *dxp = mutable_data<T>(dx), *dsp = mutable_data<T>(dscale);
    const auto& kernel = cpu::kernels<cpu::BypassKernels<T>>();
    parallel_tasks(count, x.numel() / count, [&](int64_t b, int64_t e) {
      const Scratch<C> part(std::max<int64_t>(1, channels));
      std::vector<double> sums(static_cast<size_t>(channels));
      for (int64_t s = b; s < e; s++) {
        std::fill(sums.begin(), sums.end(), 0.0);
        const int64_t first = starts[static_cast<size_t>(s)];
        const RowBlocks blocks(starts[static_cast<size_t>(s) + 1] - first, channels);
        for (int64_t k = 0; k < blocks.count; k++) {
          const int64_t at = (first + blocks.begin(k)) * channels;
          kernel.backward(gp + at, from + at, xp + at, sp + s * channels, dop + at, dxp + at, part.data(),
                          blocks.size(k), channels);
          for (int64_t c = 0; c < channels; c++) sums[static_cast<size_t>(c)] += static_cast<double>(part.data()[c]);
        }
        for (int64_t c = 0; c < channels; c++)
          cpu::store(&dsp[s * channels + c], static_cast<C>(sums[static_cast<size_t>(c)]));
      }
    });
  });
  return {dx_orig, dx, dscale};
}

}  // namespace

FASTASR_OPERATORS(written<bypass_forward>, written<bypass_backward>)

FASTASR_UNDECLARED(
    "fastasr/models/common/packed.py calls it in a node of autograd, for plain tensors outside autocast and tracing",
    {"bypass_packed_forward(Tensor x_orig, Tensor x, Tensor scale, int[] lengths) -> Tensor",
     Boxed<bypass_packed_forward>::call},
    {"bypass_packed_backward(Tensor grad, Tensor x_orig, Tensor x, Tensor scale, int[] lengths) -> (Tensor, Tensor, "
     "Tensor)",
     Boxed<bypass_packed_backward>::call})

}  // namespace fastasr::bindings::bypass
