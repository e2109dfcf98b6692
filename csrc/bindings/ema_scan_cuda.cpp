// SPDX-License-Identifier: Apache-2.0
#ifdef FASTASR_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "bindings/ema_scan.h"
#include "cuda/ema_scan.h"

// A torch without CUDA lacks this symbol: the library loads there all the same, and no CUDA tensor ever arrives.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream)
    __attribute__((weak));

namespace fastasr::bindings::ema_scan_cuda {
namespace {

using ema_scan::Gradients;
using ema_scan::kComplex;

void* current_stream(const Tensor& t, const char* op) {
  check(aoti_torch_get_current_cuda_stream != nullptr, op, "this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

int dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return kFastasrDouble;
    case ScalarType::BFloat16:
      return kFastasrBfloat16;
    case ScalarType::Half:
      return kFastasrHalf;
    default:
      return kFastasrFloat;
  }
}

// The kernels read all tensors on x's device: the declaration's checks do not look there.
void check_device(const auto& a, std::initializer_list<const Optional*> optional) {
  const auto there = [&](const Tensor& t) { return t.is_cuda() && t.get_device_index() == a.x.get_device_index(); };
  const ema_scan::Parameters p = ema_scan::parameters_of(a);
  bool right = there(a.x);
  for (const Tensor* t : {&p.damping, &p.decay, &p.expansion, &p.projection}) right = right && there(*t);
  for (const Optional* t : {&p.residual, &a.state, &a.padding_mask}) right = right && (!*t || there(**t));
  for (const Optional* t : optional) right = right && (!*t || there(**t));
  check(right, a.kName, "expected CUDA tensors of one device");
}

FastasrSequence sequence(const Tensor& t, int64_t layout) {
  return {t.const_data_ptr(), t.stride(ema_scan::kTime[layout]), t.stride(ema_scan::kBatch[layout]),
          t.stride(ema_scan::kChannel[layout])};
}

template <typename A>
FastasrEmaScan scan_of(const A& a) {
  const ema_scan::Parameters p = ema_scan::parameters_of(a);
  FastasrEmaScan s{};
  s.dtype = dtype_code(dtype_of(a.x)), s.complex = kComplex<A>, s.x = sequence(a.x, a.layout);
  s.length = a.L, s.batch = a.B, s.channels = a.D, s.states = a.N, s.truncation = a.truncation;
  s.direction = static_cast<int>(a.direction), s.activation = static_cast<int>(a.activation);
  s.damping = p.damping.const_data_ptr(), s.decay = p.decay.const_data_ptr();
  s.expansion = p.expansion.const_data_ptr(), s.projection = p.projection.const_data_ptr();
  s.residual = data_or_null<void>(p.residual), s.state = data_or_null<void>(a.state);
  s.mask = data_or_null<unsigned char>(a.padding_mask);
  return s;
}

Tensor workspace_of(const Tensor& x, int64_t bytes) { return new_contiguous(x, {bytes}, ScalarType::Byte); }

void check_launch(const auto& a, int error) {
  // cudaErrorInvalidValue: the carries of this many states do not fit into this GPU's shared memory
  check(error == 0, a.kName, "CUDA error ", error, " for ", a.N, " states");
}

template <typename A>
std::tuple<Tensor, Tensor> forward(const A& a) {
  ema_scan::check_state(a, a.return_state);
  check_device(a, {});
  torch::stable::accelerator::DeviceGuard guard(a.x.get_device_index());
  Tensor y = new_contiguous(a.x, a.x.sizes());
  Tensor final_state = ema_scan::new_state(a, ema_scan::parameters_of(a).damping, a.return_state);
  FastasrEmaScan scan = scan_of(a);
  Tensor workspace = workspace_of(a.x, fastasr_cuda_ema_scan_forward_workspace(&scan));
  scan.workspace = workspace.mutable_data_ptr();
  check_launch(a, fastasr_cuda_ema_scan_forward(&scan, sequence(y, a.layout),
                                                a.return_state ? final_state.mutable_data_ptr() : nullptr,
                                                current_stream(a.x, a.kName)));
  return {y, final_state};
}

template <typename A>
Gradients backward(const A& a) {
  ema_scan::check_state(a, a.grad_last.has_value());
  const Optional grad_y = a.grad_y;
  check_device(a, {&grad_y, &a.grad_last});
  torch::stable::accelerator::DeviceGuard guard(a.x.get_device_index());
  const Gradients results = ema_scan::new_gradients(a, new_contiguous(a.x, a.x.sizes()));
  const auto& [dx, ddamping, ddecay, dexpansion, dprojection, dresidual, dstate] = results;
  FastasrEmaScan scan = scan_of(a);
  FastasrEmaScanGrads g{};
  g.grad = sequence(a.grad_y, a.layout), g.grad_state = data_or_null<void>(a.grad_last);
  g.dx = sequence(dx, a.layout);
  g.ddamping = ddamping.mutable_data_ptr(), g.ddecay = ddecay.mutable_data_ptr();
  g.dexpansion = dexpansion.mutable_data_ptr(), g.dprojection = dprojection.mutable_data_ptr();
  if (ema_scan::parameters_of(a).residual) g.dresidual = dresidual.mutable_data_ptr();
  if (a.state) g.dstate = dstate.mutable_data_ptr();
  Tensor workspace = workspace_of(a.x, fastasr_cuda_ema_scan_backward_workspace(&scan, &g));
  scan.workspace = workspace.mutable_data_ptr();
  check_launch(a, fastasr_cuda_ema_scan_backward(&scan, &g, current_stream(a.x, a.kName)));
  return results;
}

std::tuple<Tensor, Tensor> ema_scan_forward(const ema_scan::EmaScanForward& a) { return forward(a); }
Gradients ema_scan_backward(const ema_scan::EmaScanBackward& a) { return backward(a); }
std::tuple<Tensor, Tensor> complex_ema_scan_forward(const complex_ema_scan::ComplexEmaScanForward& a) {
  return forward(a);
}
Gradients complex_ema_scan_backward(const complex_ema_scan::ComplexEmaScanBackward& a) { return backward(a); }

}  // namespace

FASTASR_OPERATORS_ON(fastasr_cuda, CUDA, written<ema_scan_forward>, written<ema_scan_backward>,
                     written<complex_ema_scan_forward>, written<complex_ema_scan_backward>)

}  // namespace fastasr::bindings::ema_scan_cuda

#endif
