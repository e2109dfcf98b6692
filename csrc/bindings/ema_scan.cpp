// SPDX-License-Identifier: Apache-2.0
#include "cpu/ema/ema_scan.h"

#include "bindings/ema_scan.h"

namespace fastasr::bindings::ema_scan {
namespace {

using cpu::EmaShape;
using cpu::EmaStrides;

// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kWork = 200000;

void in_parallel(int64_t tasks, int64_t work, const std::function<void(int64_t, int64_t)>& f) {
  parallel_range(tasks, std::max<int64_t>(1, kWork / std::max<int64_t>(1, work)), f);
}

EmaStrides strides_of(const Tensor& t, int64_t layout) {
  return {t.stride(kTime[layout]), t.stride(kBatch[layout]), t.stride(kChannel[layout])};
}

template <typename A>
EmaShape shape_of(const A& a) {
  EmaShape s{};
  s.length = a.L, s.batch = a.B, s.channels = a.D, s.states = a.N, s.truncation = a.truncation;
  s.direction = static_cast<cpu::EmaDirection>(a.direction), s.complex = kComplex<A>;
  s.activation = static_cast<cpu::EmaActivation>(a.activation);
  return s;
}

template <typename C>
cpu::EmaParameters<C> pointers(const auto& a) {
  const Parameters p = parameters_of(a);
  cpu::EmaParameters<C> found{};
  found.damping = data<C>(p.damping), found.decay = data<C>(p.decay), found.expansion = data<C>(p.expansion);
  found.projection = data<C>(p.projection), found.residual = data_or_null<C>(p.residual);
  found.state = data_or_null<C>(a.state), found.mask = data_or_null<uint8_t>(a.padding_mask);
  return found;
}

template <typename A>
std::tuple<Tensor, Tensor> forward(const A& a) {
  const Tensor& x = a.x;
  check_state(a, a.return_state);
  const EmaShape s = shape_of(a);
  Tensor y = new_contiguous(x, {x.size(0), x.size(1), x.size(2)});
  Tensor final_state = new_state(a, parameters_of(a).damping, a.return_state);
  with_kernel_type(dtype_of(x), a.kName, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    C* last = a.return_state ? mutable_data<C>(final_state) : nullptr;
    const EmaStrides xs = strides_of(x, a.layout), ys = strides_of(y, a.layout);
    const auto parameters = pointers<C>(a);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(y);
    if (!kComplex<A> && s.length == 1 && a.direction != 2)
      cpu::kernels<cpu::EmaTensor<T>>().one_step(s, parameters, from, xs, to, ys, last);
    else
      cpu::kernels<cpu::EmaScanKernels<T>>().forward(s, parameters, from, xs, to, ys, last, in_parallel);
  });
  return {y, final_state};
}

template <typename A>
Gradients backward(const A& a) {
  const Tensor& x = a.x;
  check_state(a, a.grad_last.has_value());
  const EmaShape s = shape_of(a);
  const Gradients results = new_gradients(a, new_contiguous(x, {x.size(0), x.size(1), x.size(2)}));
  const auto& [dx, ddamping, ddecay, dexpansion, dprojection, dresidual, dstate] = results;
  with_kernel_type(dtype_of(x), a.kName, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    const cpu::EmaGradients<C> gradients{mutable_data<C>(ddamping),     mutable_data<C>(ddecay),
                                         mutable_data<C>(dexpansion),   mutable_data<C>(dprojection),
                                         mutable_or_null<C>(dresidual), mutable_or_null<C>(dstate)};
    cpu::kernels<cpu::EmaScanKernels<T>>().backward(
        s, pointers<C>(a), data<T>(x), strides_of(x, a.layout), data<T>(a.grad_y), strides_of(a.grad_y, a.layout),
        data_or_null<C>(a.grad_last), mutable_data<T>(dx), strides_of(dx, a.layout), gradients, in_parallel);
  });
  return results;
}

std::tuple<Tensor, Tensor> ema_scan_forward(const EmaScanForward& a) { return forward(a); }
Gradients ema_scan_backward(const EmaScanBackward& a) { return backward(a); }
std::tuple<Tensor, Tensor> complex_ema_scan_forward(const complex_ema_scan::ComplexEmaScanForward& a) {
  return forward(a);
}
Gradients complex_ema_scan_backward(const complex_ema_scan::ComplexEmaScanBackward& a) { return backward(a); }

}  // namespace

FASTASR_OPERATORS(written<ema_scan_forward>, written<ema_scan_backward>, written<complex_ema_scan_forward>,
                  written<complex_ema_scan_backward>)

}  // namespace fastasr::bindings::ema_scan
