// SPDX-License-Identifier: Apache-2.0
#include "cuda/ema_scan.cuh"

namespace fastasr::cuda {
namespace {

// Calls f(a state, a parameter), values of their types.
template <typename F>
auto with_types(const FastasrEmaScan& scan, const F& f) {
  const auto number = [&](auto narrow, auto wide) {
    if (scan.dtype == kFastasrDouble) return f(wide, double{});
    return scan.truncation > 0 && scan.truncation < scan.length ? f(wide, float{}) : f(narrow, float{});
  };
  return scan.complex ? number(Complex<float>{}, Complex<double>{}) : number(float{}, double{});
}

// Calls f(run) with the scan's launcher, which runs or only sizes the workspace.
template <typename F>
auto with_run(Pass pass, const FastasrEmaScan* scan, void* stream, const F& f) {
  return with_types(*scan, [&](auto state, auto parameter) {
    EmaScan<decltype(state), decltype(parameter)> run(pass, *scan, stream);
    return f(run);
  });
}

}  // namespace
}  // namespace fastasr::cuda

using fastasr::cuda::Pass;
using fastasr::cuda::with_run;

extern "C" int64_t fastasr_cuda_ema_scan_forward_workspace(const FastasrEmaScan* scan) {
  return with_run(Pass::kSize, scan, nullptr, [](auto& run) {
    run.forward({}, nullptr);
    return run.workspace_size();
  });
}

extern "C" int64_t fastasr_cuda_ema_scan_backward_workspace(const FastasrEmaScan* scan,
                                                            const FastasrEmaScanGrads* grads) {
  return with_run(Pass::kSize, scan, nullptr, [&](auto& run) {
    run.backward(*grads);
    return run.workspace_size();
  });
}

extern "C" int fastasr_cuda_ema_scan_forward(const FastasrEmaScan* scan, FastasrSequence y, void* final_state,
                                             void* stream) {
  return with_run(Pass::kRun, scan, stream, [&](auto& run) { return run.forward(y, final_state); });
}

extern "C" int fastasr_cuda_ema_scan_backward(const FastasrEmaScan* scan, const FastasrEmaScanGrads* grads,
                                              void* stream) {
  return with_run(Pass::kRun, scan, stream, [&](auto& run) { return run.backward(*grads); });
}
