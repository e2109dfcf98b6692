// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/batch_norm_activation.h"

#include <memory>

#include "bindings/norm_rows.h"
#include "bindings/scratch.h"
#include "bindings/written/batch_norm_activation.h"
#include "cpu/rows/balancer_gradient.h"

namespace fastasr::bindings::batch_norm_activation {
namespace {

constexpr int64_t kRowsPerBlock = 64;  // of sums that are kept in double

template <typename C>
cpu::ChannelStatistics<C> rows_of(C* statistics, int64_t channels) {
  return {statistics, statistics + channels, statistics + 2 * channels, statistics + 3 * channels};
}

template <typename T>
cpu::BatchNormActivation<T> problem(const auto& a, const Tensor& statistics) {
  using C = cpu::compute_t<T>;
  cpu::BatchNormActivation<T> p{};
  p.x = data<T>(a.x), p.hidden = data_or_null<bool>(a.padding_mask), p.weight = data<C>(a.weight);
  p.bias = data<C>(a.bias), p.of = rows_of(data<C>(statistics), a.C);
  p.activation = static_cast<int>(a.activation), p.channels = a.C;
  return p;
}

// Writes shift, s1 and s2 of rows [begin, end), and returns how many of them are not hidden: these lie in runs, between
// padding. The first of two passes finds their mean, which is the shift of the second.
template <typename T, typename C = cpu::compute_t<T>>
int64_t sum_runs(const T* x, const bool* hidden, int64_t begin, int64_t end, int64_t channels, C* shift, double* s1,
                 double* s2) {
  const auto& kernel = cpu::kernels<cpu::BalancerKernels<T>>();
  std::vector<double> more;
  int64_t seen = 0;
  for (const bool again : {false, true}) {
    if (again) {
      if (!seen) return 0;
      const double share = 1 / static_cast<double>(seen);
      for (int64_t j = 0; j < channels; j++) shift[j] += static_cast<C>(s1[j] * share);
      seen = 0;
    }
    for (int64_t first = begin, last; first < end; first = last) {
      const bool skip = hidden && hidden[first];
      last = hidden ? first + 1 : end;
      while (last < end && hidden[last] == skip) last++;
      if (skip) continue;
      const T* rows = x + first * channels;
      if (!seen) {
        for (int64_t j = 0; !again && j < channels; j++) shift[j] = cpu::load(rows[j]);
        kernel.sums_rows(rows, channels, shift, s1, s2, last - first, channels);
      } else {
        more.resize(2 * channels);
        kernel.sums_rows(rows, channels, shift, more.data(), more.data() + channels, last - first, channels);
        for (int64_t j = 0; j < channels; j++) s1[j] += more[j], s2[j] += more[channels + j];
      }
      seen += last - first;
    }
  }
  return seen;
}

// Returns (y, mean, variance, rate, statistics).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_activation_forward(const BatchNormActivationForward& a) {
  const int64_t n = a.C, rows = product(a.S), blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  const ScalarType wide = compute_type(dtype_of(a.x));
  Tensor y = new_like(a.x), statistics = new_contiguous(a.x, {4, n}, wide);
  Tensor mean = new_contiguous(a.x, {n}, wide), variance = new_contiguous(a.x, {n}, wide);
  Tensor rate = new_contiguous(a.x, {n}, wide);
  with_kernels<cpu::BatchNormActivationKernels>(a.x, a.kName, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const auto p = problem<T>(a, statistics);
    const int64_t size = std::max<int64_t>(1, blocks * n);
    const Scratch<C> shift(size);
    const Scratch<double> s1(size), s2(size);
    std::vector<int64_t> seen(blocks);
    parallel_tasks(blocks, kRowsPerBlock * n, [&](int64_t b, int64_t e) {
      for (int64_t k = b; k < e; k++) {
        const int64_t first = k * kRowsPerBlock, at = k * n;
        seen[k] = sum_runs(p.x, p.hidden, first, std::min(first + kRowsPerBlock, rows), n, shift.data() + at,
                           s1.data() + at, s2.data() + at);
      }
    });
    const cpu::ChannelSums<T> sums{shift.data(), s1.data(), s2.data(), seen.data(), blocks, n};
    C *means = mutable_data<C>(mean), *variances = mutable_data<C>(variance);
    const auto written = rows_of(mutable_data<C>(statistics), n);
    parallel_tasks(n, 2 * blocks,
                   [&](int64_t b, int64_t e) { kernel.combine(sums, a.eps, b, e, written, means, variances); });
    const bool any = std::any_of(seen.begin(), seen.end(), [](int64_t count) { return count > 0; });
    std::fill_n(mutable_data<C>(rate), n, any ? static_cast<C>(a.momentum) : C(0));
    T* out = mutable_data<T>(y);
    parallel_tasks(rows, 2 * n, [&](int64_t b, int64_t e) {
      const std::unique_ptr<C[]> scratch(new C[cpu::batch_norm_activation_scratch(n)]);
      kernel.forward(p, b, e, out, scratch.get());
    });
  });
  return {y, mean, variance, rate, statistics};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_activation_backward(const BatchNormActivationBackward& a) {
  const int64_t n = a.C, rows = product(a.S);
  check(a.grad_y.has_value(), a.kName, "y has no gradient");
  Tensor dx = new_like(a.x), dweight = new_like(a.weight), dbias = new_like(a.bias);
  with_kernels<cpu::BatchNormActivationKernels>(a.x, a.kName, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const auto p = problem<T>(a, a.statistics);
    const T* g = data<T>(*a.grad_y);
    T* out = mutable_data<T>(dx);
    const int64_t room = cpu::batch_norm_activation_scratch(n);
    sum_parts<T>(RowBlocks(rows, n), n, {&dweight, &dbias}, 4 * n, room,
                 [&](int64_t b, int64_t e, C* d, C* scratch) { kernel.sums(p, g, b, e, out, d, d + n, scratch); });
    const C *dw = data<C>(dweight), *db = data<C>(dbias);
    parallel_tasks(rows, 2 * n, [&](int64_t b, int64_t e) {
      const std::unique_ptr<C[]> scratch(new C[room]);
      kernel.backward(p, g, dw, db, b, e, out, scratch.get());
    });
  });
  return {dx, dweight, dbias};
}

}  // namespace

FASTASR_OPERATORS(written<batch_norm_activation_forward>, written<batch_norm_activation_backward>)

}  // namespace fastasr::bindings::batch_norm_activation
