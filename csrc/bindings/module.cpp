// SPDX-License-Identifier: Apache-2.0
#include <Python.h>

#include <utility>

#include "cpu/simd/simd.h"
#ifdef FASTASR_WITH_CUDA
#include "cuda/device.h"
#endif

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

#ifdef FASTASR_WITH_CUDA
PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s,s:i}", "compiler", kCompiler, "simd", fastasr::cpu::simd_level(),
                       "torch_abi", "2.11", "cuda_architectures", FASTASR_CUDA_ARCHS, "nvcc", FASTASR_NVCC,
                       "cuda_devices", fastasr_cuda_device_count());
}
#else
PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:O,s:O,s:O}", "compiler", kCompiler, "simd", fastasr::cpu::simd_level(),
                       "torch_abi", "2.11", "cuda_architectures", Py_None, "nvcc", Py_None, "cuda_devices", Py_None);
}
#endif

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "Compiler, instruction set in use, CUDA architectures."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "Native kernels of fastasr; importing registers torch.ops.fastasr_cpu.*",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  for (const auto& [problem, error] : {std::pair{fastasr::cpu::machine_problem(), PyExc_ImportError},
                                       std::pair{fastasr::cpu::setting_problem(), PyExc_ValueError}})
    if (problem) {
      PyErr_SetString(error, problem);
      return nullptr;
    }
  return PyModule_Create(&definition);
}
