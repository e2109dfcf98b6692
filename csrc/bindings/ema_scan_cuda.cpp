// SPDX-License-Identifier: Apache-2.0
#ifdef FASTASR_WITH_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "bindings/dispatch.h"
#include "cuda/ema_scan.h"

// A torch without CUDA does not have it: the library loads there all the same, and no CUDA tensor ever arrives.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream)
    __attribute__((weak));

namespace fastasr {
namespace {

using OptionalTensor = std::optional<Tensor>;

void* current_stream(const Tensor& t, const char* op) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op, ": this torch was built without CUDA");
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
      STD_TORCH_CHECK(false, op, ": unsupported dtype");
  }
}

Tensor make(const Tensor& device_of, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  std::array<int64_t, 3> size{}, stride{};
  int64_t dim = 0, next = 1;
  for (const int64_t n : sizes) size[dim++] = n;
  for (int64_t d = dim; d-- > 0; next *= std::max<int64_t>(1, size[d])) stride[d] = next;
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(device_of.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, size.data(), stride.data(), static_cast<int32_t>(dtype),
                                                         device_type, device_of.get_device_index(), &handle));
  return Tensor(handle);
}

// The checked arguments of both passes. Python has named what is wrong with them; the checks here guard memory.
struct Arguments {
  FastasrEmaScan scan{};
  ScalarType compute;
  const char* op;

  Arguments(const char* op_, const Tensor& x, const Tensor& damping, const Tensor& decay, const Tensor& expansion,
            const Tensor& projection, const OptionalTensor& residual, const OptionalTensor& state,
            const OptionalTensor& mask, int64_t truncation, int64_t direction, int64_t activation, int64_t layout)
      : op(op_) {
    STD_TORCH_CHECK(x.dim() == 3, op, ": x: expected three dimensions, got ", x.dim());
    STD_TORCH_CHECK(layout >= 0 && layout <= 2, op, ": layout: expected 0, 1 or 2, got ", layout);
    STD_TORCH_CHECK(direction >= 0 && direction <= 2, op, ": direction: expected 0, 1 or 2, got ", direction);
    STD_TORCH_CHECK(activation >= 0 && activation <= 4, op, ": activation: expected 0 to 4, got ", activation);
    STD_TORCH_CHECK(truncation >= 0, op, ": truncation: expected 0 or more, got ", truncation);
    time = layout == 0 ? 0 : layout == 1 ? 1 : 2;
    batch = layout == 0 ? 1 : 0;
    channel = layout == 2 ? 1 : 2;
    scan.dtype = dtype_code(x.scalar_type(), op);
    compute = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    scan.length = x.size(time), scan.batch = x.size(batch), scan.channels = x.size(channel);
    STD_TORCH_CHECK(damping.dim() == 2, op, ": damping: expected (rows, states), got ", damping.dim(), " dimensions");
    scan.states = damping.size(1);
    STD_TORCH_CHECK(scan.states >= 1 && scan.states <= 64, op, ": damping: expected 1 to 64 states, got ", scan.states);
    STD_TORCH_CHECK(direction != 2 || !state.has_value(), op, ": state: expected none with both directions");
    STD_TORCH_CHECK(truncation == 0 || !state.has_value(), op, ": state: expected none with truncation");
    scan.truncation = truncation;
    scan.direction = static_cast<int>(direction), scan.activation = static_cast<int>(activation);
    scan.x = sequence(x);
    const int64_t rows = scan.channels * (direction == 2 ? 2 : 1);
    scan.damping = parameter(x, damping, "damping", {rows, scan.states});
    scan.decay = parameter(x, decay, "decay", {rows, scan.states});
    scan.expansion = parameter(x, expansion, "expansion", {rows, scan.states});
    scan.projection = parameter(x, projection, "projection", {rows, scan.states});
    if (residual.has_value()) scan.residual = parameter(x, *residual, "residual", {scan.channels});
    if (state.has_value()) scan.state = parameter(x, *state, "state", {scan.batch, scan.channels, scan.states});
    if (mask.has_value()) {
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, op, ": mask: expected bool");
      shaped(x, *mask, "mask", {scan.batch, scan.length});
      scan.mask = static_cast<const unsigned char*>(mask->const_data_ptr());
    }
  }

  // After every other check, so that those can be tried on any machine.
  void check_device(const Tensor& x) const { STD_TORCH_CHECK(x.is_cuda(), op, ": x: expected a CUDA tensor"); }

  FastasrSequence sequence(const Tensor& t) const {
    return {t.const_data_ptr(), t.stride(time), t.stride(batch), t.stride(channel)};
  }

  void shaped(const Tensor& x, const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) const {
    STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(sizes.size()) && t.is_contiguous(), op, ": ", name, ": expected ",
                    sizes.size(), " dimensions, contiguous");
    int64_t d = 0;
    for (const int64_t n : sizes) {
      STD_TORCH_CHECK(t.size(d) == n, op, ": ", name, ": expected ", n, " in dimension ", d, ", got ", t.size(d));
      d++;
    }
    STD_TORCH_CHECK(t.get_device_index() == x.get_device_index() && t.is_cuda() == x.is_cuda(), op, ": ", name,
                    " is on another device");
  }

  const void* parameter(const Tensor& x, const Tensor& t, const char* name,
                        std::initializer_list<int64_t> sizes) const {
    STD_TORCH_CHECK(t.scalar_type() == compute, op, ": ", name, ": expected ",
                    compute == ScalarType::Double ? "float64" : "float32");
    shaped(x, t, name, sizes);
    return t.const_data_ptr();
  }

  void check(int error) const {
    // cudaErrorInvalidValue: a state count whose carries do not fit into this GPU's shared memory
    STD_TORCH_CHECK(error == 0, op, ": CUDA error ", error, " for ", scan.states, " states");
  }

 private:
  int64_t time, batch, channel;
};

Tensor workspace_of(const Tensor& x, int64_t bytes) { return make(x, ScalarType::Byte, {bytes}); }

std::tuple<Tensor, Tensor> ema_scan_forward(const Tensor& x, const Tensor& damping, const Tensor& decay,
                                            const Tensor& expansion, const Tensor& projection, OptionalTensor residual,
                                            OptionalTensor state, OptionalTensor mask, int64_t truncation,
                                            int64_t direction, int64_t activation, int64_t layout, bool need_state) {
  Arguments a("ema_scan_forward", x, damping, decay, expansion, projection, residual, state, mask, truncation,
              direction, activation, layout);
  STD_TORCH_CHECK(!need_state || (direction != 2 && truncation == 0), a.op,
                  ": need_state: expected false with both directions or truncation");
  a.check_device(x);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = make(x, x.scalar_type(), {x.size(0), x.size(1), x.size(2)});
  Tensor final_state =
      need_state ? make(x, a.compute, {a.scan.batch, a.scan.channels, a.scan.states}) : make(x, a.compute, {0});
  Tensor workspace = workspace_of(x, fastasr_cuda_ema_scan_forward_workspace(&a.scan));
  a.scan.workspace = workspace.mutable_data_ptr();
  a.check(fastasr_cuda_ema_scan_forward(&a.scan, a.sequence(y), need_state ? final_state.mutable_data_ptr() : nullptr,
                                        current_stream(x, a.op)));
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ema_scan_backward(
    const Tensor& grad, OptionalTensor grad_state, const Tensor& x, const Tensor& damping, const Tensor& decay,
    const Tensor& expansion, const Tensor& projection, OptionalTensor residual, OptionalTensor state,
    OptionalTensor mask, int64_t truncation, int64_t direction, int64_t activation, int64_t layout) {
  Arguments a("ema_scan_backward", x, damping, decay, expansion, projection, residual, state, mask, truncation,
              direction, activation, layout);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.dim() == 3, a.op, ": grad: expected x's dtype");
  for (int64_t d = 0; d < 3; d++)
    STD_TORCH_CHECK(grad.size(d) == x.size(d), a.op, ": grad: expected ", x.size(d), " in dimension ", d, ", got ",
                    grad.size(d));
  STD_TORCH_CHECK(grad.is_cuda() == x.is_cuda() && grad.get_device_index() == x.get_device_index(), a.op,
                  ": grad is on another device");
  STD_TORCH_CHECK(!grad_state.has_value() || (direction != 2 && truncation == 0), a.op,
                  ": grad_state: expected none with both directions or truncation");
  a.check_device(x);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor dx = make(x, x.scalar_type(), {x.size(0), x.size(1), x.size(2)});
  const auto like_parameter = [&] { return make(x, a.compute, {damping.size(0), damping.size(1)}); };
  Tensor ddamping = like_parameter(), ddecay = like_parameter(), dexpansion = like_parameter(),
         dprojection = like_parameter();
  Tensor dresidual = make(x, a.compute, {residual.has_value() ? a.scan.channels : 0});
  Tensor dstate =
      state.has_value() ? make(x, a.compute, {a.scan.batch, a.scan.channels, a.scan.states}) : make(x, a.compute, {0});
  FastasrEmaScanGrads g{};
  g.grad = a.sequence(grad);
  if (grad_state.has_value())
    g.grad_state = a.parameter(x, *grad_state, "grad_state", {a.scan.batch, a.scan.channels, a.scan.states});
  g.dx = a.sequence(dx);
  g.ddamping = ddamping.mutable_data_ptr(), g.ddecay = ddecay.mutable_data_ptr();
  g.dexpansion = dexpansion.mutable_data_ptr(), g.dprojection = dprojection.mutable_data_ptr();
  if (residual.has_value()) g.dresidual = dresidual.mutable_data_ptr();
  if (state.has_value()) g.dstate = dstate.mutable_data_ptr();
  Tensor workspace = workspace_of(x, fastasr_cuda_ema_scan_backward_workspace(&a.scan, &g));
  a.scan.workspace = workspace.mutable_data_ptr();
  a.check(fastasr_cuda_ema_scan_backward(&a.scan, &g, current_stream(x, a.op)));
  return {dx, ddamping, ddecay, dexpansion, dprojection, dresidual, dstate};
}

}  // namespace
}  // namespace fastasr

STABLE_TORCH_LIBRARY_FRAGMENT(fastasr_cuda, m) {
  m.def(
      "ema_scan_forward(Tensor x, Tensor damping, Tensor decay, Tensor expansion, Tensor projection, Tensor? residual, "
      "Tensor? state, Tensor? mask, int truncation, int direction, int activation, int layout, bool need_state) -> "
      "(Tensor, Tensor)");
  m.def(
      "ema_scan_backward(Tensor grad, Tensor? grad_state, Tensor x, Tensor damping, Tensor decay, Tensor expansion, "
      "Tensor projection, Tensor? residual, Tensor? state, Tensor? mask, int truncation, int direction, int "
      "activation, "
      "int layout) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastasr_cuda, CUDA, m) {
  m.impl("ema_scan_forward", TORCH_BOX(&fastasr::ema_scan_forward));
  m.impl("ema_scan_backward", TORCH_BOX(&fastasr::ema_scan_backward));
}
#endif
