// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// The parts of a kernel body and its launcher that depend on the compiler. nvcc compiles them for the GPU; any other
// compiler gets the emulation in csrc/tests, which runs the same bodies, launches included, on the CPU.
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FASTASR_HD __host__ __device__ __forceinline__
#define FASTASR_DEVICE __device__ __forceinline__
#define FASTASR_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define FASTASR_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace fastasr::cuda {

// Returns a CUDA error code. Nothing here waits for the device, so a launch can be captured in a graph.
template <typename Parameters>
int launch(void (*kernel)(Parameters), int64_t blocks, int threads, int64_t shared, void* stream,
           const Parameters& parameters) {
  if (blocks == 0) return 0;
  if (blocks > 0x7fffffff) return static_cast<int>(cudaErrorInvalidConfiguration);
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) {
      cudaGetLastError();  // the error is returned: it must not stay behind for the next call
      return static_cast<int>(error);
    }
  }
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared), static_cast<cudaStream_t>(stream)>>>(
      parameters);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace fastasr::cuda
#else
#include "tests/cuda_emulation.h"
#endif
