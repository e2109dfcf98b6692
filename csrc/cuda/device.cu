// SPDX-License-Identifier: Apache-2.0
#include "cuda/device.h"

#include <cuda_runtime.h>

namespace {
__global__ void probe() {}
}  // namespace

extern "C" int fastasr_cuda_device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? count : -static_cast<int>(error);
}

extern "C" int fastasr_cuda_probe(int device) {
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return static_cast<int>(error);
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, probe);
  cudaSetDevice(current);
  return static_cast<int>(error);
}
