// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/ema_scan.cuh"

// The C interface over the templates: nvcc compiles it in complex_ema_scan.cu, and the C++ tests with the emulation.
namespace fastasr::cuda {

// f(a state, a parameter)
template <typename F>
auto with_complex_types(const FastasrEmaScan& scan, F f) {
  if (scan.dtype == kFastasrDouble) return f(Complex<double>{}, double{});
  return scan.truncation > 0 && scan.truncation < scan.length ? f(Complex<double>{}, float{})
                                                              : f(Complex<float>{}, float{});
}

}  // namespace fastasr::cuda

extern "C" int64_t fastasr_cuda_complex_ema_scan_forward_workspace(const FastasrEmaScan* scan) {
  return fastasr::cuda::with_complex_types(*scan, [&](auto c, auto p) {
    fastasr::cuda::EmaScan<decltype(c), decltype(p)> run(fastasr::cuda::Pass::kSize, *scan, nullptr);
    run.forward({}, nullptr);
    return run.workspace_size();
  });
}

extern "C" int64_t fastasr_cuda_complex_ema_scan_backward_workspace(const FastasrEmaScan* scan,
                                                                    const FastasrEmaScanGrads* grads) {
  return fastasr::cuda::with_complex_types(*scan, [&](auto c, auto p) {
    fastasr::cuda::EmaScan<decltype(c), decltype(p)> run(fastasr::cuda::Pass::kSize, *scan, nullptr);
    run.backward(*grads);
    return run.workspace_size();
  });
}

extern "C" int fastasr_cuda_complex_ema_scan_forward(const FastasrEmaScan* scan, FastasrSequence y, void* final_state,
                                                     void* stream) {
  return fastasr::cuda::with_complex_types(*scan, [&](auto c, auto p) {
    return fastasr::cuda::EmaScan<decltype(c), decltype(p)>(fastasr::cuda::Pass::kRun, *scan, stream)
        .forward(y, final_state);
  });
}

extern "C" int fastasr_cuda_complex_ema_scan_backward(const FastasrEmaScan* scan, const FastasrEmaScanGrads* grads,
                                                      void* stream) {
  return fastasr::cuda::with_complex_types(*scan, [&](auto c, auto p) {
    return fastasr::cuda::EmaScan<decltype(c), decltype(p)>(fastasr::cuda::Pass::kRun, *scan, stream).backward(*grads);
  });
}
