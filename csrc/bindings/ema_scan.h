// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bindings/written/complex_ema_scan.h"
#include "bindings/written/ema_scan.h"

// The EMA scans' bindings for the CPU and for CUDA share this.
namespace fastasr::bindings::ema_scan {

// Dimensions of time, batch and channel in LBD, BLD and BDL.
constexpr int64_t kTime[] = {0, 1, 2}, kBatch[] = {1, 0, 0}, kChannel[] = {2, 2, 1};

template <typename A>
void find_sizes(A& a) {
  const int64_t sizes[] = {a.X, a.Y, a.Z};
  a.B = sizes[kBatch[a.layout]], a.D = sizes[kChannel[a.layout]], a.L = sizes[kTime[a.layout]];
  a.R = a.direction == 2 ? 2 * a.D : a.D;
}

// The real average's parameters, or the complex one's: alpha, delta, theta, gamma and omega.
struct Parameters {
  const Tensor &damping, &decay, &expansion, &projection;
  const Optional& residual;
};
template <typename A>
constexpr bool kComplex = requires(const A& a) { a.alpha; };

template <typename A>
Parameters parameters_of(const A& a) {
  if constexpr (kComplex<A>)
    return {a.alpha, a.delta, a.theta, a.gamma, a.omega};
  else
    return {a.damping, a.decay, a.expansion, a.projection, a.residual};
}

void check_state(const auto& a, bool with_state) {
  check(!(with_state || a.state) || (a.direction != 2 && a.truncation == 0), a.kName,
        "no state with a truncation or in both directions");
}

// Makes the state after a scan, without elements unless it is needed.
template <typename A>
Tensor new_state(const A& a, const Tensor& like, bool needed) {
  if (!needed) return new_without_elements(like);
  return kComplex<A> ? new_contiguous(like, {a.B, a.D, a.N, 2}) : new_contiguous(like, {a.B, a.D, a.N});
}

// Of x and of the five parameters and the state, whose gradients have their shapes.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename A>
Gradients new_gradients(const A& a, const Tensor& dx) {
  const Parameters p = parameters_of(a);
  return {dx,
          new_like(p.damping),
          new_like(p.decay),
          new_like(p.expansion),
          new_like(p.projection),
          new_like(p.residual, p.damping),
          new_like(a.state, p.damping)};
}

}  // namespace fastasr::bindings::ema_scan

template <typename A>
void fastasr::bindings::complex_ema_scan::find_sizes(A& a) {
  ema_scan::find_sizes(a);
}
