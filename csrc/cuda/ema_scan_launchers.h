// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/ema_scan.cuh"

// The C interface over the templates: compiled by nvcc in ema_scan.cu, and by the C++ tests with the emulation.
namespace fastasr::cuda {

template <typename F>
auto with_compute_type(int dtype, F f) {
  return dtype == kFastasrDouble ? f(double{}) : f(float{});
}

}  // namespace fastasr::cuda

extern "C" int64_t fastasr_cuda_ema_scan_forward_workspace(const FastasrEmaScan* scan) {
  return fastasr::cuda::with_compute_type(scan->dtype, [&](auto t) {
    fastasr::cuda::EmaScan<decltype(t)> run(fastasr::cuda::Pass::kSize, *scan, nullptr);
    run.forward({}, nullptr);
    return run.workspace_size();
  });
}

extern "C" int64_t fastasr_cuda_ema_scan_backward_workspace(const FastasrEmaScan* scan,
                                                            const FastasrEmaScanGrads* grads) {
  return fastasr::cuda::with_compute_type(scan->dtype, [&](auto t) {
    fastasr::cuda::EmaScan<decltype(t)> run(fastasr::cuda::Pass::kSize, *scan, nullptr);
    run.backward(*grads);
    return run.workspace_size();
  });
}

extern "C" int fastasr_cuda_ema_scan_forward(const FastasrEmaScan* scan, FastasrSequence y, void* final_state,
                                             void* stream) {
  return fastasr::cuda::with_compute_type(scan->dtype, [&](auto t) {
    return fastasr::cuda::EmaScan<decltype(t)>(fastasr::cuda::Pass::kRun, *scan, stream).forward(y, final_state);
  });
}

extern "C" int fastasr_cuda_ema_scan_backward(const FastasrEmaScan* scan, const FastasrEmaScanGrads* grads,
                                              void* stream) {
  return fastasr::cuda::with_compute_type(scan->dtype, [&](auto t) {
    return fastasr::cuda::EmaScan<decltype(t)>(fastasr::cuda::Pass::kRun, *scan, stream).backward(*grads);
  });
}
