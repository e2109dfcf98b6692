// SPDX-License-Identifier: Apache-2.0
#ifdef FASTASR_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "bindings/dispatch.h"
#include "cuda/ema_scan.h"

// A torch without CUDA lacks this symbol: the library loads there all the same, and no CUDA tensor ever arrives.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream)
    __attribute__((weak));

namespace fastasr::bindings::ema_scan_cuda {
namespace {

void* current_stream(const Tensor& t, const char* op) {
  check(aoti_torch_get_current_cuda_stream != nullptr, op, "this torch was built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

int dtype_code(ScalarType dtype, const char* op) {
  switch (dtype) {
    case ScalarType::Float:
      return kFastasrFloat;
    case ScalarType::Double:
      return kFastasrDouble;
    case ScalarType::BFloat16:
      return kFastasrBfloat16;
    case ScalarType::Half:
      return kFastasrHalf;
    default:
      decline(op, {"unsupported dtype"});
  }
}

// The four parameters and the residual weights, as the caller knows them.
struct Names {
  const char *damping, *decay, *expansion, *projection, *residual;
};
constexpr Names kReal{"damping", "decay", "expansion", "projection", "residual"};
constexpr Names kComplex{"alpha", "delta", "theta", "gamma", "omega"};

// The checked arguments of both passes. Python has reported wrong ones by name; the checks here guard memory.
struct Arguments {
  FastasrEmaScan scan{};
  ScalarType compute;
  const char* op;
  bool complex;

  Arguments(const char* op_, bool complex_, const Tensor& x, const Tensor& damping, const Tensor& decay,
            const Tensor& expansion, const Tensor& projection, const Optional& residual, const Optional& state,
            const Optional& mask, int64_t truncation, int64_t direction, int64_t activation, int64_t layout)
      : op(op_), complex(complex_) {
    const Names& names = complex ? kComplex : kReal;
    check(x.dim() == 3, op, "x: expected three dimensions, got ", x.dim());
    check(layout >= 0 && layout <= 2, op, "layout: expected 0, 1 or 2, got ", layout);
    check(direction >= 0 && direction <= 2, op, "direction: expected 0, 1 or 2, got ", direction);
    check(activation >= 0 && activation <= 4, op, "activation: expected 0 to 4, got ", activation);
    check(truncation >= 0, op, "truncation: expected 0 or more, got ", truncation);
    time = layout == 0 ? 0 : layout == 1 ? 1 : 2;
    batch = layout == 0 ? 1 : 0;
    channel = layout == 2 ? 1 : 2;
    scan.dtype = dtype_code(dtype_of(x), op), scan.complex = complex;
    compute = compute_type(dtype_of(x));
    scan.length = x.size(time), scan.batch = x.size(batch), scan.channels = x.size(channel);
    check(damping.dim() == 2, op, names.damping, ": expected (rows, states), got ", damping.dim(), " dimensions");
    scan.states = damping.size(1);
    check(scan.states >= 1 && scan.states <= 64, op, names.damping, ": expected 1 to 64 states, got ", scan.states);
    check(direction != 2 || !state.has_value(), op, "state: expected none with both directions");
    check(truncation == 0 || !state.has_value(), op, "state: expected none with truncation");
    scan.truncation = truncation;
    scan.direction = static_cast<int>(direction), scan.activation = static_cast<int>(activation);
    scan.x = sequence(x);
    const int64_t rows = scan.channels * (direction == 2 ? 2 : 1);
    scan.damping = parameter(x, damping, names.damping, {rows, scan.states});
    scan.decay = parameter(x, decay, names.decay, {rows, scan.states});
    if (complex) {
      scan.expansion = parameter(x, expansion, names.expansion, {rows});
      scan.projection = parameter(x, projection, names.projection, {rows, scan.states, 2});
    } else {
      scan.expansion = parameter(x, expansion, names.expansion, {rows, scan.states});
      scan.projection = parameter(x, projection, names.projection, {rows, scan.states});
    }
    if (residual.has_value()) scan.residual = parameter(x, *residual, names.residual, {scan.channels});
    if (state.has_value()) scan.state = state_parameter(x, *state, "state");
    if (mask.has_value()) {
      check(dtype_of(*mask) == ScalarType::Bool, op, "mask: expected bool");
      shaped(x, *mask, "mask", {scan.batch, scan.length});
      scan.mask = static_cast<const unsigned char*>(mask->const_data_ptr());
    }
  }

  // This check comes after every other one, so that the others can be tested on any machine.
  void check_device(const Tensor& x) const { check(x.is_cuda(), op, "x: expected a CUDA tensor"); }

  FastasrSequence sequence(const Tensor& t) const {
    return {t.const_data_ptr(), t.stride(time), t.stride(batch), t.stride(channel)};
  }

  void shaped(const Tensor& x, const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) const {
    check(t.dim() == static_cast<int64_t>(sizes.size()) && t.is_contiguous(), op, name, ": expected ", sizes.size(),
          " dimensions, contiguous");
    int64_t d = 0;
    for (const int64_t n : sizes) {
      check(t.size(d) == n, op, name, ": expected ", n, " in dimension ", d, ", got ", t.size(d));
      d++;
    }
    check(t.get_device_index() == x.get_device_index() && t.is_cuda() == x.is_cuda(), op, name,
          " is on another device");
  }

  const void* parameter(const Tensor& x, const Tensor& t, const char* name,
                        std::initializer_list<int64_t> sizes) const {
    check(dtype_of(t) == compute, op, name, ": expected ", compute == ScalarType::Double ? "float64" : "float32");
    shaped(x, t, name, sizes);
    return t.const_data_ptr();
  }

  const void* state_parameter(const Tensor& x, const Tensor& t, const char* name) const {
    if (complex) return parameter(x, t, name, {scan.batch, scan.channels, scan.states, 2});
    return parameter(x, t, name, {scan.batch, scan.channels, scan.states});
  }
  Tensor new_state(const Tensor& x) const {
    if (complex) return new_contiguous(x, {scan.batch, scan.channels, scan.states, 2}, compute);
    return new_contiguous(x, {scan.batch, scan.channels, scan.states}, compute);
  }

  void check_launch(int error) const {
    // cudaErrorInvalidValue: the carries of this many states do not fit into this GPU's shared memory
    check(error == 0, op, "CUDA error ", error, " for ", scan.states, " states");
  }

 private:
  int64_t time, batch, channel;
};

Tensor workspace_of(const Tensor& x, int64_t bytes) { return new_contiguous(x, {bytes}, ScalarType::Byte); }

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor> forward(Arguments& a, const Tensor& x, bool need_state) {
  check(!need_state || (a.scan.direction != 2 && a.scan.truncation == 0), a.op,
        "need_state: expected false with both directions or truncation");
  a.check_device(x);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = new_contiguous(x, {x.size(0), x.size(1), x.size(2)});
  Tensor final_state = need_state ? a.new_state(x) : new_contiguous(x, {0}, a.compute);
  Tensor workspace = workspace_of(x, fastasr_cuda_ema_scan_forward_workspace(&a.scan));
  a.scan.workspace = workspace.mutable_data_ptr();
  a.check_launch(fastasr_cuda_ema_scan_forward(
      &a.scan, a.sequence(y), need_state ? final_state.mutable_data_ptr() : nullptr, current_stream(x, a.op)));
  return {y, final_state};
}

Gradients backward(Arguments& a, const Tensor& grad, const Optional& grad_state, const Tensor& x, const Tensor& damping,
                   bool residual, bool state) {
  check(dtype_of(grad) == dtype_of(x) && grad.dim() == 3, a.op, "grad: expected x's dtype");
  for (int64_t d = 0; d < 3; d++)
    check(grad.size(d) == x.size(d), a.op, "grad: expected ", x.size(d), " in dimension ", d, ", got ", grad.size(d));
  check(grad.is_cuda() == x.is_cuda() && grad.get_device_index() == x.get_device_index(), a.op,
        "grad is on another device");
  check(!grad_state.has_value() || (a.scan.direction != 2 && a.scan.truncation == 0), a.op,
        "grad_state: expected none with both directions or truncation");
  FastasrEmaScanGrads g{};
  if (grad_state.has_value()) g.grad_state = a.state_parameter(x, *grad_state, "grad_state");
  a.check_device(x);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor dx = new_contiguous(x, {x.size(0), x.size(1), x.size(2)});
  const int64_t rows = damping.size(0), states = damping.size(1);
  Tensor ddamping = new_contiguous(x, {rows, states}, a.compute), ddecay = new_contiguous(x, {rows, states}, a.compute);
  Tensor dexpansion = a.complex ? new_contiguous(x, {rows}, a.compute) : new_contiguous(x, {rows, states}, a.compute);
  Tensor dprojection =
      a.complex ? new_contiguous(x, {rows, states, 2}, a.compute) : new_contiguous(x, {rows, states}, a.compute);
  Tensor dresidual = new_contiguous(x, {residual ? a.scan.channels : 0}, a.compute);
  Tensor dstate = state ? a.new_state(x) : new_contiguous(x, {0}, a.compute);
  g.grad = a.sequence(grad);
  g.dx = a.sequence(dx);
  g.ddamping = ddamping.mutable_data_ptr(), g.ddecay = ddecay.mutable_data_ptr();
  g.dexpansion = dexpansion.mutable_data_ptr(), g.dprojection = dprojection.mutable_data_ptr();
  if (residual) g.dresidual = dresidual.mutable_data_ptr();
  if (state) g.dstate = dstate.mutable_data_ptr();
  Tensor workspace = workspace_of(x, fastasr_cuda_ema_scan_backward_workspace(&a.scan, &g));
  a.scan.workspace = workspace.mutable_data_ptr();
  a.check_launch(fastasr_cuda_ema_scan_backward(&a.scan, &g, current_stream(x, a.op)));
  return {dx, ddamping, ddecay, dexpansion, dprojection, dresidual, dstate};
}

// The registered functions: one pair for real and one for complex numbers.
template <bool complex>
std::tuple<Tensor, Tensor> registered_forward(const Tensor& x, const Tensor& damping, const Tensor& decay,
                                              const Tensor& expansion, const Tensor& projection, Optional residual,
                                              Optional state, Optional mask, int64_t truncation, int64_t direction,
                                              int64_t activation, int64_t layout, bool need_state) {
  Arguments a(complex ? "complex_ema_scan_forward" : "ema_scan_forward", complex, x, damping, decay, expansion,
              projection, residual, state, mask, truncation, direction, activation, layout);
  return forward(a, x, need_state);
}

template <bool complex>
Gradients registered_backward(const Tensor& grad, Optional grad_state, const Tensor& x, const Tensor& damping,
                              const Tensor& decay, const Tensor& expansion, const Tensor& projection, Optional residual,
                              Optional state, Optional mask, int64_t truncation, int64_t direction, int64_t activation,
                              int64_t layout) {
  Arguments a(complex ? "complex_ema_scan_backward" : "ema_scan_backward", complex, x, damping, decay, expansion,
              projection, residual, state, mask, truncation, direction, activation, layout);
  return backward(a, grad, grad_state, x, damping, residual.has_value(), state.has_value());
}

}  // namespace

FASTASR_OPERATORS_ON(fastasr_cuda, CUDA, typed<registered_forward<false>>("ema_scan_forward"),
                     typed<registered_backward<false>>("ema_scan_backward"),
                     typed<registered_forward<true>>("complex_ema_scan_forward"),
                     typed<registered_backward<true>>("complex_ema_scan_backward"))

}  // namespace fastasr::bindings::ema_scan_cuda

#endif
