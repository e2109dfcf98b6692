// SPDX-License-Identifier: Apache-2.0
#include "cpu/ema/ema_scan.h"

#include <tuple>

#include "bindings/dispatch.h"
#include "bindings/pooled.h"

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

// The four parameters: damping, decay, expansion, projection, or alpha, delta, theta, gamma.
struct Inputs {
  const Tensor &x, &damping, &decay, &expansion, &projection;
  const Optional &residual, &state, &mask;
  int64_t truncation, direction, activation, layout;
  bool complex = false;
};

void check_size(const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> sizes, const char* op,
                const char* name) {
  check(dtype_of(t) == dtype && t.is_contiguous(), op, name, " has another dtype or strides");
  check(t.dim() == static_cast<int64_t>(sizes.size()), op, name, " has other dimensions");
  int64_t d = 0;
  for (const int64_t size : sizes) check(t.size(d++) == size, op, name, " has another shape");
}

// (rows), or with trailing dimensions of 1
void check_column(const Tensor& t, ScalarType dtype, int64_t rows, const char* op, const char* name) {
  check(dtype_of(t) == dtype && t.is_contiguous(), op, name, " has another dtype or strides");
  check(t.dim() >= 1 && t.dim() <= 3 && t.size(0) == rows && t.numel() == rows, op, name, " has another shape");
}

// (rows, N), or (rows, N, 1) as the modules hold them
void check_parameter(const Tensor& t, ScalarType dtype, int64_t rows, int64_t states, const char* op,
                     const char* name) {
  check(dtype_of(t) == dtype && t.is_contiguous(), op, name, " has another dtype or strides");
  check((t.dim() == 2 || (t.dim() == 3 && t.size(2) == 1)) && t.size(0) == rows && t.size(1) == states, op, name,
        " has another shape");
}

void check_state(const Tensor& t, ScalarType dtype, const EmaShape& s, const char* op, const char* name) {
  if (s.complex)
    check_size(t, dtype, {s.batch, s.channels, s.states, 2}, op, name);
  else
    check_size(t, dtype, {s.batch, s.channels, s.states}, op, name);
}

EmaShape checked_shape(const Inputs& in, bool with_state, const char* op) {
  check(in.layout >= 0 && in.layout <= 2 && in.direction >= 0 && in.direction <= 2 && in.activation >= 0 &&
            in.activation <= 4 && in.truncation >= 0,
        op, "unknown option");
  check(in.x.dim() == 3 && in.damping.dim() >= 2, op, "dimensions");
  const EmaShape s{in.x.size(kTime[in.layout]),
                   in.x.size(kBatch[in.layout]),
                   in.x.size(kChannel[in.layout]),
                   in.damping.size(1),
                   in.truncation,
                   static_cast<cpu::EmaDirection>(in.direction),
                   static_cast<cpu::EmaActivation>(in.activation),
                   in.complex};
  const ScalarType dtype = compute_type(dtype_of(in.x));
  const int64_t rows = in.direction == 2 ? 2 * s.channels : s.channels;
  check(s.states >= 1 && s.states <= 64, op, "from 1 to 64 states");
  check_parameter(in.damping, dtype, rows, s.states, op, in.complex ? "alpha" : "damping");
  check_parameter(in.decay, dtype, rows, s.states, op, in.complex ? "delta" : "decay");
  if (in.complex) {
    check_column(in.expansion, dtype, rows, op, "theta");
    check_size(in.projection, dtype, {rows, s.states, 2}, op, "gamma");
    if (in.residual) check_column(*in.residual, dtype, s.channels, op, "omega");
  } else {
    check_parameter(in.expansion, dtype, rows, s.states, op, "expansion");
    check_parameter(in.projection, dtype, rows, s.states, op, "projection");
    if (in.residual) check_size(*in.residual, dtype, {s.channels}, op, "residual");
  }
  if (in.state) check_state(*in.state, dtype, s, op, "state");
  if (in.mask) check_size(*in.mask, ScalarType::Bool, {s.batch, s.length}, op, "padding_mask");
  check(!(with_state || in.state) || (in.direction != 2 && in.truncation == 0), op,
        "no state with a truncation or in both directions");
  return s;
}

template <typename C>
cpu::EmaParameters<C> parameters(const Inputs& in) {
  return {
      data<C>(in.damping),          data<C>(in.decay),         data<C>(in.expansion),         data<C>(in.projection),
      data_or_null<C>(in.residual), data_or_null<C>(in.state), data_or_null<uint8_t>(in.mask)};
}

// Both averages: the complex one has alpha, delta, theta, gamma and omega for the real one's parameters.
template <bool complex>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& damping, const Tensor& decay, const Tensor& expansion,
                                   const Tensor& projection, const Optional& residual, const Optional& state,
                                   const Optional& mask, int64_t truncation, int64_t direction, int64_t activation,
                                   int64_t layout, bool need_state) {
  const char* op = complex ? "complex_ema_scan_forward" : "ema_scan_forward";
  const Inputs in{x,    damping,    decay,     expansion,  projection, residual, state,
                  mask, truncation, direction, activation, layout,     complex};
  const EmaShape s = checked_shape(in, need_state, op);
  Tensor y = new_pooled(x, {x.size(0), x.size(1), x.size(2)});
  Tensor final_state = !need_state ? new_without_elements(damping)
                       : complex   ? new_contiguous(damping, {s.batch, s.channels, s.states, 2})
                                   : new_contiguous(damping, {s.batch, s.channels, s.states});
  with_kernel_type(dtype_of(x), op, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    C* last = need_state ? mutable_data<C>(final_state) : nullptr;
    const EmaStrides xs = strides_of(x, layout), ys = strides_of(y, layout);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(y);
    if (!complex && s.length == 1 && direction != 2)
      cpu::kernels<cpu::EmaTensor<T>>().one_step(s, parameters<C>(in), from, xs, to, ys, last);
    else
      cpu::kernels<cpu::EmaScanKernels<T>>().forward(s, parameters<C>(in), from, xs, to, ys, last, in_parallel);
  });
  return {y, final_state};
}

template <bool complex>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Optional& grad_state, const Tensor& x, const Tensor& damping, const Tensor& decay,
    const Tensor& expansion, const Tensor& projection, const Optional& residual, const Optional& state,
    const Optional& mask, int64_t truncation, int64_t direction, int64_t activation, int64_t layout) {
  const char* op = complex ? "complex_ema_scan_backward" : "ema_scan_backward";
  const Inputs in{x,    damping,    decay,     expansion,  projection, residual, state,
                  mask, truncation, direction, activation, layout,     complex};
  const EmaShape s = checked_shape(in, grad_state.has_value(), op);
  check(dtype_of(grad) == dtype_of(x) && grad.dim() == 3, op, "grad");
  for (int64_t d = 0; d < 3; d++) check(grad.size(d) == x.size(d), op, "grad has another shape");
  if (grad_state) check_state(*grad_state, dtype_of(damping), s, op, "grad_state");
  Tensor dx = new_pooled(x, {x.size(0), x.size(1), x.size(2)});
  Tensor ddamping = new_like(damping), ddecay = new_like(decay), dexpansion = new_like(expansion);
  Tensor dprojection = new_like(projection);
  Tensor dresidual = residual ? new_like(*residual) : new_without_elements(damping);
  Tensor dstate = state ? new_like(*state) : new_without_elements(damping);
  with_kernel_type(dtype_of(x), op, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    const cpu::EmaGradients<C> gradients{mutable_data<C>(ddamping),
                                         mutable_data<C>(ddecay),
                                         mutable_data<C>(dexpansion),
                                         mutable_data<C>(dprojection),
                                         residual ? mutable_data<C>(dresidual) : nullptr,
                                         state ? mutable_data<C>(dstate) : nullptr};
    cpu::kernels<cpu::EmaScanKernels<T>>().backward(
        s, parameters<C>(in), data<T>(x), strides_of(x, layout), data<T>(grad), strides_of(grad, layout),
        data_or_null<C>(grad_state), mutable_data<T>(dx), strides_of(dx, layout), gradients, in_parallel);
  });
  return {dx, ddamping, ddecay, dexpansion, dprojection, dresidual, dstate};
}

}  // namespace

#define FASTASR_INPUTS                                                                                             \
  "Tensor x, Tensor damping, Tensor decay, Tensor expansion, Tensor projection, Tensor? residual, Tensor? state, " \
  "Tensor? padding_mask, int truncation, int direction, int activation, int layout"
#define FASTASR_COMPLEX_INPUTS                                                                       \
  "Tensor x, Tensor alpha, Tensor delta, Tensor theta, Tensor gamma, Tensor? omega, Tensor? state, " \
  "Tensor? padding_mask, int truncation, int direction, int activation, int layout"
#define FASTASR_GRADIENTS "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

FASTASR_OPERATORS({"ema_scan_forward(" FASTASR_INPUTS ", bool need_state) -> (Tensor, Tensor)",
                   Boxed<forward<false>>::call},
                  {"ema_scan_backward(Tensor grad, Tensor? grad_state, " FASTASR_INPUTS ") -> " FASTASR_GRADIENTS,
                   Boxed<backward<false>>::call},
                  {"complex_ema_scan_forward(" FASTASR_COMPLEX_INPUTS ", bool need_state) -> (Tensor, Tensor)",
                   Boxed<forward<true>>::call},
                  {"complex_ema_scan_backward(Tensor grad, Tensor? grad_state, " FASTASR_COMPLEX_INPUTS
                   ") -> " FASTASR_GRADIENTS,
                   Boxed<backward<true>>::call})

}  // namespace fastasr::bindings::ema_scan
