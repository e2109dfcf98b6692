// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/whitening_gradient.h"

#include <cmath>
#include <numeric>

#include "bindings/column_sums.h"
#include "bindings/layer_parts.h"
#include "bindings/scratch.h"

namespace fastasr::bindings::whitening {
namespace {

constexpr double kFloor = 1e-20;

// The covariance is computed this many rows at a time, from the diagonal on, because it is symmetric. Narrower strips
// save more of the products and pack their operands more often.
int64_t block_rows(int64_t channels) { return channels <= 128 ? channels : (channels / 3 + 15) / 16 * 16; }

// Computes the means of columns from their sums, and rounds them.
std::vector<float> means(const std::vector<double>& sums, int64_t rows, int64_t channels) {
  std::vector<float> mean(channels);
  for (int64_t c = 0; c < channels; c++) mean[c] = static_cast<float>(sums[c] / static_cast<double>(rows));
  return mean;
}

void centre(const float* x, int64_t stride, float* y, int64_t rows, int64_t channels) {
  // a first row near the mean keeps the sums small
  const std::vector<float> shift(x, x + channels);
  std::vector<float> mean = means(column_sums<float>(x, rows, stride, channels, shift), rows, channels);
  for (int64_t c = 0; c < channels; c++) mean[c] += shift[c];
  const auto& kernel = cpu::kernels<cpu::WhiteningKernels>();
  parallel_tasks(rows, channels, [&](int64_t begin, int64_t end) {
    kernel.centre(x + begin * stride, stride, mean.data(), y + begin * channels, end - begin, channels);
  });
}

// Computes f^T f of rows (n) that lie `stride` apart, and returns the sum of its squares.
double covariance(const float* f, int64_t rows, int64_t stride, int64_t n, float* s) {
  const int64_t block = block_rows(n);
  for (int64_t first = 0; first < n; first += block) {
    cpu::Gemm<float> g{};
    g.a = f + first, g.a_row = 1, g.a_depth = stride;
    g.b = f + first, g.b_depth = stride, g.b_column = 1;
    g.m = std::min(block, n - first), g.n = n - first, g.k = rows;
    g.c = s + first * n + first, g.c_row = n;
    gemm::multiply(g);
  }
  std::vector<double> squares(n);
  const auto& kernel = cpu::kernels<cpu::WhiteningKernels>();
  parallel_tasks(n, n, [&](int64_t begin, int64_t end) { kernel.mirror(s, n, block, squares.data(), begin, end); });
  return std::accumulate(squares.begin(), squares.end(), 0.0);
}

// Returns the centred x (rows, channels), the covariances (groups, c, c) and, in double, w and d.
std::tuple<Tensor, Tensor, Tensor> whitening_covariance(const Tensor& x, int64_t groups) {
  constexpr const char* op = "whitening_covariance";
  check(x.dim() == 2 && dtype_of(x) == ScalarType::Float && groups > 0, op, "x is (rows, channels) in float32");
  const int64_t rows = x.size(0), channels = x.size(1), n = channels / groups;
  check(rows > 0 && n > 0 && n * groups == channels, op, "the groups do not divide the channels");
  check(x.stride(1) == 1 || channels == 1, op, "channels lie apart");
  const Tensor frames = new_contiguous(x, {rows, channels}), s = new_contiguous(x, {groups, n, n});
  const Tensor statistics = new_contiguous(x, {2}, ScalarType::Double);
  float *f = mutable_data<float>(frames), *sp = mutable_data<float>(s);
  centre(data<float>(x), rows > 1 ? x.stride(0) : channels, f, rows, channels);
  double squares = 0, trace = 0;
  for (int64_t k = 0; k < groups; k++) {
    float* one = sp + k * n * n;
    squares += covariance(f + k * n, rows, channels, n, one);
    for (int64_t i = 0; i < n; i++) trace += static_cast<double>(one[i * (n + 1)]);
  }
  const double d = trace / static_cast<double>(channels);
  double* found = mutable_data<double>(statistics);
  found[0] = squares / static_cast<double>(channels) / (d * d + kFloor), found[1] = d;
  return {frames, s, statistics};
}

// Returns grad + grad_scale |grad| v / |v|, from the results of whitening_covariance. It overwrites the covariances.
Tensor whitening_change(const Tensor& grad, const Tensor& frames, Tensor s, double w, double d, double grad_scale) {
  constexpr const char* op = "whitening_change";
  check(frames.dim() == 2 && s.dim() == 3, op, "frames are (rows, channels), covariances (groups, c, c)");
  const int64_t rows = frames.size(0), channels = frames.size(1), groups = s.size(0), n = s.size(1);
  check(n * groups == channels && is_dense(s, ScalarType::Float, {groups, n, n}), op, "covariances");
  for (const Tensor* t : {&grad, &frames})
    check(is_dense(*t, ScalarType::Float, {rows, channels}), op, "grad or frames are not dense float32 of one size");
  const float *gp = data<float>(grad), *f = data<float>(frames);
  const Scratch<float> v(rows * channels);
  for (int64_t k = 0; k < groups; k++) {
    float* one = mutable_data<float>(s) + k * n * n;
    for (int64_t i = 0; i < n; i++) one[i * (n + 1)] -= static_cast<float>(w * d);
    cpu::Gemm<float> g{};
    g.a = f + k * n, g.a_row = channels, g.a_depth = 1;
    g.b = one, g.b_depth = n, g.b_column = 1;
    g.c = v.data() + k * n, g.c_row = channels;
    g.m = rows, g.n = g.k = n;
    gemm::multiply(g);
  }
  const std::vector<float> zero(channels);
  const std::vector<double> of_v = column_sums<float>(v.data(), rows, channels, channels, zero);
  const std::vector<double> of_grad = column_sums<float>(gp, rows, channels, channels, zero);
  // The means are 0 but for rounding, which the gradient of a bias would add up.
  const std::vector<float> mean = means(of_v, rows, channels);
  double v_squares = 0, grad_squares = 0;
  for (int64_t c = 0; c < channels; c++) {
    const double m = static_cast<double>(mean[c]);
    v_squares += of_v[channels + c] - m * of_v[c];
    grad_squares += of_grad[channels + c];
  }
  const double factor = 4.0 / static_cast<double>(channels) / (d * d + kFloor);
  const double size = factor * std::sqrt(std::max(0.0, v_squares)) + kFloor;
  const float scale = static_cast<float>(grad_scale * std::sqrt(grad_squares) / size * factor);
  const Tensor y = new_contiguous(grad, {rows, channels});
  float* yp = mutable_data<float>(y);
  const auto& kernel = cpu::kernels<cpu::WhiteningKernels>();
  parallel_tasks(rows, channels, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * channels;
    kernel.add(gp + at, v.data() + at, mean.data(), scale, yp + at, end - begin, channels);
  });
  return y;
}

}  // namespace

FASTASR_OPERATORS(FASTASR_TYPED(whitening_covariance), FASTASR_TYPED(whitening_change))

}  // namespace fastasr::bindings::whitening
