// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "cpu/simd/simd.h"
#ifdef FASTASR_WITH_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["simd"] = fastasr::cpu::simd_level();
  info["simd_set"] = fastasr::cpu::simd_name();
  info["torch_abi"] = "2.11";
#ifdef FASTASR_WITH_CUDA
  info["cuda_architectures"] = FASTASR_CUDA_ARCHS;
  info["nvcc"] = FASTASR_NVCC;
  info["cuda_devices"] = fastasr_cuda_device_count();
#else
  info["cuda_architectures"] = py::none();
  info["nvcc"] = py::none();
  info["cuda_devices"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  if (const char* problem = fastasr::cpu::machine_problem()) throw py::import_error(problem);
  if (const char* problem = fastasr::cpu::setting_problem()) throw py::value_error(problem);
  m.doc() = "Native kernels of fastasr; importing registers torch.ops.fastasr_cpu.*";
  m.def("build_info", &build_info);
}
