// SPDX-License-Identifier: Apache-2.0
#include "cpu/ema/ema_scan.h"

#include "bindings/pooled.h"
#include "bindings/written/complex_ema_scan.h"
#include "bindings/written/ema_scan.h"

namespace fastasr::bindings::ema_scan {
namespace {

using cpu::EmaShape;
using cpu::EmaStrides;

// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kWork = 200000;

void in_parallel(int64_t tasks, int64_t work, const std::function<void(int64_t, int64_t)>& f) {
  parallel_range(tasks, std::max<int64_t>(1, kWork / std::max<int64_t>(1, work)), f);
}

// Dimensions of time, batch and channel in LBD, BLD and BDL.
constexpr int64_t kTime[] = {0, 1, 2}, kBatch[] = {1, 0, 0}, kChannel[] = {2, 2, 1};

EmaStrides strides_of(const Tensor& t, int64_t layout) {
  return {t.stride(kTime[layout]), t.stride(kBatch[layout]), t.stride(kChannel[layout])};
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

template <typename A>
EmaShape checked_shape(const A& a, bool with_state) {
  check(!(with_state || a.state) || (a.direction != 2 && a.truncation == 0), a.kName,
        "no state with a truncation or in both directions");
  EmaShape s{};
  s.length = a.L, s.batch = a.B, s.channels = a.D, s.states = a.N, s.truncation = a.truncation;
  s.direction = static_cast<cpu::EmaDirection>(a.direction), s.complex = kComplex<A>;
  s.activation = static_cast<cpu::EmaActivation>(a.activation);
  return s;
}

template <typename C>
cpu::EmaParameters<C> pointers(const Parameters& p, const Optional& state, const Optional& padding_mask) {
  cpu::EmaParameters<C> found{};
  found.damping = data<C>(p.damping), found.decay = data<C>(p.decay), found.expansion = data<C>(p.expansion);
  found.projection = data<C>(p.projection), found.residual = data_or_null<C>(p.residual);
  found.state = data_or_null<C>(state), found.mask = data_or_null<uint8_t>(padding_mask);
  return found;
}

template <typename A>
std::tuple<Tensor, Tensor> forward(const A& a) {
  const Tensor& x = a.x;
  const Parameters p = parameters_of(a);
  const EmaShape s = checked_shape(a, a.return_state);
  Tensor y = new_pooled(x, {x.size(0), x.size(1), x.size(2)});
  Tensor final_state = !a.return_state ? new_without_elements(p.damping)
                       : kComplex<A>   ? new_contiguous(p.damping, {s.batch, s.channels, s.states, 2})
                                       : new_contiguous(p.damping, {s.batch, s.channels, s.states});
  with_kernel_type(dtype_of(x), a.kName, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    C* last = a.return_state ? mutable_data<C>(final_state) : nullptr;
    const EmaStrides xs = strides_of(x, a.layout), ys = strides_of(y, a.layout);
    const auto parameters = pointers<C>(p, a.state, a.padding_mask);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(y);
    if (!kComplex<A> && s.length == 1 && a.direction != 2)
      cpu::kernels<cpu::EmaTensor<T>>().one_step(s, parameters, from, xs, to, ys, last);
    else
      cpu::kernels<cpu::EmaScanKernels<T>>().forward(s, parameters, from, xs, to, ys, last, in_parallel);
  });
  return {y, final_state};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename A>
Gradients backward(const A& a) {
  const Tensor& x = a.x;
  const Parameters p = parameters_of(a);
  const EmaShape s = checked_shape(a, a.grad_last.has_value());
  Tensor dx = new_pooled(x, {x.size(0), x.size(1), x.size(2)});
  Tensor ddamping = new_like(p.damping), ddecay = new_like(p.decay), dexpansion = new_like(p.expansion);
  Tensor dprojection = new_like(p.projection);
  Tensor dresidual = new_like(p.residual, p.damping);
  Tensor dstate = new_like(a.state, p.damping);
  with_kernel_type(dtype_of(x), a.kName, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    const cpu::EmaGradients<C> gradients{mutable_data<C>(ddamping),     mutable_data<C>(ddecay),
                                         mutable_data<C>(dexpansion),   mutable_data<C>(dprojection),
                                         mutable_or_null<C>(dresidual), mutable_or_null<C>(dstate)};
    cpu::kernels<cpu::EmaScanKernels<T>>().backward(
        s, pointers<C>(p, a.state, a.padding_mask), data<T>(x), strides_of(x, a.layout), data<T>(a.grad_y),
        strides_of(a.grad_y, a.layout), data_or_null<C>(a.grad_last), mutable_data<T>(dx), strides_of(dx, a.layout),
        gradients, in_parallel);
  });
  return {dx, ddamping, ddecay, dexpansion, dprojection, dresidual, dstate};
}

void find_ema_sizes(auto& a) {
  const int64_t sizes[] = {a.X, a.Y, a.Z};
  a.B = sizes[kBatch[a.layout]], a.D = sizes[kChannel[a.layout]], a.L = sizes[kTime[a.layout]];
  a.R = a.direction == 2 ? 2 * a.D : a.D;
}

std::tuple<Tensor, Tensor> ema_scan_forward(const EmaScanForward& a) { return forward(a); }
Gradients ema_scan_backward(const EmaScanBackward& a) { return backward(a); }
std::tuple<Tensor, Tensor> complex_ema_scan_forward(const complex_ema_scan::ComplexEmaScanForward& a) {
  return forward(a);
}
Gradients complex_ema_scan_backward(const complex_ema_scan::ComplexEmaScanBackward& a) { return backward(a); }

}  // namespace

template <typename A>
void find_sizes(A& a) {
  find_ema_sizes(a);
}

FASTASR_OPERATORS(written<ema_scan_forward>, written<ema_scan_backward>, written<complex_ema_scan_forward>,
                  written<complex_ema_scan_backward>)

}  // namespace fastasr::bindings::ema_scan

template <typename A>
void fastasr::bindings::complex_ema_scan::find_sizes(A& a) {
  ema_scan::find_ema_sizes(a);
}
