// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/rows.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bindings/layer_parts.h"
#include "bindings/packed.h"
#include "bindings/pooled.h"
#include "cpu/math/activation.h"
#include "cpu/rows/dropout.h"

namespace fastasr::bindings::rows {
namespace {

// Runs f(block, part) for each block of rows; f writes a number per channel to its part, and their sums over the blocks
// go to `sums`. Where that is null, so is part.
template <typename T, typename F>
void sum_parts(const RowBlocks& blocks, int64_t channels, const Tensor* sums, const F& f) {
  const Scratch<cpu::compute_t<T>> parts(sums ? std::max<int64_t>(1, blocks.count * channels) : 1);
  blocks.parallel(channels, [&](int64_t b, int64_t e) {
    for (int64_t k = b; k < e; k++) f(k, sums ? parts.data() + k * channels : nullptr);
  });
  if (sums) reduce_blocks(parts.data(), blocks.count, channels, *sums);
}

// ---------------------------------------------------------------- bypass

int64_t bypass_rows(const Tensor& x_orig, const Tensor& x, const Tensor& scale, const char* op) {
  check_like(x, x, op, "x");
  check_same_size(x_orig, x, op, "x_orig");
  check_like(scale, x, op, "scale");
  check(x_orig.dim() == x.dim() && scale.dim() >= 1 && scale.dim() <= x.dim(), op, "dimensions");
  for (int64_t d = 0; d < x.dim(); d++) check(x_orig.size(d) == x.size(d), op, "x_orig has another shape");
  for (int64_t d = 1; d <= scale.dim(); d++)
    check(scale.size(scale.dim() - d) == x.size(x.dim() - d), op, "scale is not x's trailing dimensions");
  const int64_t period = scale.numel();
  check(period > 0 ? x.numel() % period == 0 : x.numel() == 0, op, "scale does not divide x");
  return period == 0 ? 0 : x.numel() / period;
}

}  // namespace

Tensor bypass_forward(const Tensor& x_orig, const Tensor& x, const Tensor& scale) {
  const int64_t rows = bypass_rows(x_orig, x, scale, "bypass_forward"), period = scale.numel();
  Tensor y = new_pooled_like(x);
  with_kernel_type(dtype_of(x), "bypass_forward", [&]<typename T>() {
    const T *op = data<T>(x_orig), *xp = data<T>(x), *sp = data<T>(scale);
    T* yp = mutable_data<T>(y);
    const auto& kernel = cpu::kernels<cpu::BypassKernels<T>>();
    parallel_tasks(rows, period, [&](int64_t b, int64_t e) {
      kernel.forward(op + b * period, xp + b * period, sp, yp + b * period, e - b, period);
    });
  });
  return y;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> bypass_backward(const Tensor& grad, const Tensor& x_orig, const Tensor& x,
                                                   const Tensor& scale) {
  const int64_t rows = bypass_rows(x_orig, x, scale, "bypass_backward"), period = scale.numel();
  check_same_size(grad, x, "bypass_backward", "grad");
  Tensor dx_orig = new_pooled_like(x), dx = new_pooled_like(x);
  Tensor dscale = new_like(scale);
  with_kernel_type(dtype_of(x), "bypass_backward", [&]<typename T>() {
    const T *gp = data<T>(grad), *op = data<T>(x_orig), *xp = data<T>(x), *sp = data<T>(scale);
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

// ---------------------------------------------------------------- bias_norm

int64_t bias_norm_rows(const Tensor& x, const Tensor& bias, const Tensor& log_scale, const char* op) {
  check_like(x, x, op, "x");
  check_like(bias, x, op, "bias");
  check(x.dim() >= 1 && bias.dim() == 1 && bias.size(0) == x.size(x.dim() - 1), op,
        "bias does not match the last dimension");
  check(log_scale.dim() == 0, op, "log_scale");
  return bias.numel() == 0 ? 0 : x.numel() / bias.numel();
}

// log_scale keeps its own dtype: rounding it to that of 16-bit x would change it by 2^-9.
double scale_of(const Tensor& log_scale) {
  double value = 0;
  with_kernel_type(dtype_of(log_scale), "bias_norm: log_scale",
                   [&]<typename T>() { value = static_cast<double>(cpu::load(*data<T>(log_scale))); });
  return std::exp(value);
}

}  // namespace

Tensor bias_norm_forward(const Tensor& x, const Tensor& bias, const Tensor& log_scale) {
  const int64_t rows = bias_norm_rows(x, bias, log_scale, "bias_norm_forward"), channels = bias.numel();
  Tensor y = new_pooled_like(x);
  with_kernel_type(dtype_of(x), "bias_norm_forward", [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::BiasNormKernels<T>>();
    const T *xp = data<T>(x), *bp = data<T>(bias);
    T* yp = mutable_data<T>(y);
    const double scale = scale_of(log_scale);
    parallel_tasks(rows, channels, [&](int64_t b, int64_t e) {
      kernel.forward(xp + b * channels, bp, scale, yp + b * channels, e - b, channels);
    });
  });
  return y;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> bias_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& bias,
                                                      const Tensor& log_scale) {
  const int64_t rows = bias_norm_rows(x, bias, log_scale, "bias_norm_backward"), channels = bias.numel();
  check_same_size(grad, x, "bias_norm_backward", "grad");
  Tensor dx = new_pooled_like(x), dbias = new_like(bias);
  Tensor dlog_scale = new_like(log_scale);
  with_kernel_type(dtype_of(x), "bias_norm_backward", [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::BiasNormKernels<T>>();
    const T *gp = data<T>(grad), *xp = data<T>(x), *bp = data<T>(bias);
    T* dp = mutable_data<T>(dx);
    const double scale = scale_of(log_scale);
    const RowBlocks blocks(rows, channels);
    std::vector<double> scale_parts(blocks.count);
    sum_parts<T>(blocks, channels, &dbias, [&](int64_t k, auto* part) {
      const int64_t at = blocks.begin(k) * channels;
      kernel.backward(gp + at, xp + at, bp, scale, dp + at, part, &scale_parts[k], blocks.size(k), channels);
    });
    double sum = 0;
    for (double v : scale_parts) sum += v;
    with_kernel_type(dtype_of(log_scale), "bias_norm_backward", [&]<typename S>() {
      cpu::store(mutable_data<S>(dlog_scale), static_cast<cpu::compute_t<S>>(sum));
    });
  });
  return {dx, dbias, dlog_scale};
}

// ---------------------------------------------------------------- linear_activation

void check_linear_activation(const Tensor& z, int64_t activation, const char* op) {
  check(z.dim() > 0, op, "z has no dimensions");
  check_like(z, z, op, "z");
  check(activation >= 0 && activation < cpu::kActivations, op, "activation");
}

// Which elements dropout kept of act(z), and how it scales them. Without dropout nothing is applied.
struct Dropped {
  Dropped(const Optional& keep, double p, const Tensor& z, const char* op) {
    if (!keep) return;
    check(dtype_of(z) == ScalarType::Float && dtype_of(*keep) == ScalarType::Byte && keep->is_contiguous() &&
              keep->numel() == z.numel() && p > 0 && p < 1,
          op, "keep");
    mask = data<uint8_t>(*keep);
    scale = 1.0f / static_cast<float>(1 - p);
  }
  template <typename T>
  void apply(const T* x, T* y, int64_t at, int64_t n) const {
    if constexpr (std::is_same_v<T, float>)
      cpu::kernels<cpu::DropoutKernels>().apply(x + at, mask + at, scale, nullptr, y + at, n);
  }
  const uint8_t* mask = nullptr;
  float scale = 1;
};

// Returns act(z), with dropout where `keep` is given; in z's own memory, and then as z itself, where the caller asks
// for that.
Tensor linear_activation_forward(const Tensor& z, int64_t activation, bool in_place, const Optional& keep, double p) {
  const char* op = "linear_activation_forward";
  check_linear_activation(z, activation, op);
  const Dropped dropped(keep, p, z, op);
  Tensor y = in_place ? z : new_pooled_like(z);
  with_kernel_type(dtype_of(z), op, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::LinearActivationKernels<T>>();
    const T* from = data<T>(z);
    T* to = mutable_data<T>(y);
    const int64_t piece = dropped.mask ? 2048 : z.numel();  // which the first cache holds between both passes
    parallel_range(z.numel(), kGrain, [&](int64_t b, int64_t e) {
      for (int64_t n; b < e; b += n) {
        n = std::min(piece, e - b);
        kernel.forward(static_cast<int>(activation), from + b, to + b, n);
        if (dropped.mask) dropped.apply<T>(to, to, b, n);
      }
    });
  });
  return y;
}

// Returns (dz, dbias); dbias has no elements unless the caller asks for it.
std::tuple<Tensor, Tensor> linear_activation_backward(const Tensor& grad, const Tensor& z, int64_t activation,
                                                      bool need_bias, const Optional& keep, double p) {
  const char* op = "linear_activation_backward";
  check_linear_activation(z, activation, op);
  check_same_size(grad, z, op, "grad");
  const Dropped dropped(keep, p, z, op);
  Tensor dz = new_pooled_like(z), dbias = new_without_elements(z);
  const int64_t channels = z.size(z.dim() - 1), rows = channels ? z.numel() / channels : 0;
  if (need_bias) {
    const int64_t one = 1;
    dbias = new_strided(z, 1, &channels, &one);
  }
  with_kernel_type(dtype_of(z), op, [&]<typename T>() {
    const auto& kernel = cpu::kernels<cpu::LinearActivationKernels<T>>();
    const T *g = data<T>(grad), *from = data<T>(z);
    T* to = mutable_data<T>(dz);
    const RowBlocks blocks(rows, channels);
    sum_parts<T>(blocks, channels, need_bias ? &dbias : nullptr, [&](int64_t k, auto* part) {
      const int64_t at = blocks.begin(k) * channels;
      if (dropped.mask) dropped.apply<T>(g, to, at, blocks.size(k) * channels);
      const T* dy = dropped.mask ? to : g;
      kernel.backward(static_cast<int>(activation), dy + at, from + at, to + at, part, blocks.size(k), channels);
    });
  });
  return {dz, dbias};
}

}  // namespace

FASTASR_OPERATORS(
    {"bypass_forward(Tensor x_orig, Tensor x, Tensor scale) -> Tensor", Boxed<bypass_forward>::call},
    {"bypass_backward(Tensor grad, Tensor x_orig, Tensor x, Tensor scale) -> (Tensor, Tensor, Tensor)",
     Boxed<bypass_backward>::call},
    {"bypass_packed_forward(Tensor x_orig, Tensor x, Tensor scale, int[] lengths) -> Tensor",
     Boxed<bypass_packed_forward>::call},
    {"bypass_packed_backward(Tensor grad, Tensor x_orig, Tensor x, Tensor scale, int[] lengths) -> (Tensor, Tensor, "
     "Tensor)",
     Boxed<bypass_packed_backward>::call},
    {"bias_norm_forward(Tensor x, Tensor bias, Tensor log_scale) -> Tensor", Boxed<bias_norm_forward>::call},
    {"bias_norm_backward(Tensor grad, Tensor x, Tensor bias, Tensor log_scale) -> (Tensor, Tensor, Tensor)",
     Boxed<bias_norm_backward>::call},
    {"linear_activation_forward(Tensor(a!) z, int activation, bool in_place, Tensor? keep=None, float p=0.0) -> Tensor",
     Boxed<linear_activation_forward>::call},
    {"linear_activation_backward(Tensor grad, Tensor z, int activation, bool need_bias, Tensor? keep=None, "
     "float p=0.0) -> (Tensor, Tensor)",
     Boxed<linear_activation_backward>::call})

}  // namespace fastasr::bindings::rows
