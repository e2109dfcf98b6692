// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/balancer_gradient.h"

#include <algorithm>
#include <cmath>

namespace fastasr::cpu {
namespace {

constexpr double kFloor = 1e-20;

double excess(double v, double low, double high) {
  const double clamped = std::min(std::max(v, low), high);
  return v > clamped ? 1.0 : v < clamped ? -1.0 : v == clamped ? 0.0 : v;  // a NaN stays one
}

}  // namespace

void balancer_coefficients(double s1, double s2, double shift, int64_t count, const BalancerLimits& limits,
                           double* offset, double* slope) {
  const double n = static_cast<double>(count), mean_d = s1 / n, mean = shift + mean_d;
  const double centred = std::isnan(s2) ? s2 : std::max(0.0, s2 / n - mean_d * mean_d);
  const double square = centred + mean * mean;
  const double variance = centred < kFloor ? kFloor : centred, power = square < kFloor ? kFloor : square;
  const double s = std::sqrt(variance), m = mean / s;
  const double e = excess(m, limits.min_mean, limits.max_mean);
  const double f = square < kFloor ? 0.0 : excess(std::sqrt(power), limits.min_rms, limits.max_rms);
  const double p = e / s + f * mean / power;
  const double q = f / power - (centred < kFloor ? 0.0 : e * m / variance);
  const double rms = std::sqrt(p * p + q * q * centred) / n;
  const double scale = limits.grad_scale / (rms < kFloor ? kFloor : rms) / n;
  *slope = q * scale;
  *offset = (p - q * mean_d) * scale;
}

}  // namespace fastasr::cpu
