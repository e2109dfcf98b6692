// SPDX-License-Identifier: Apache-2.0
// The one part that knows Python: fastasr._build_info says how the library was built. Everything else is libfastasr.so,
// which serves every version of Python.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "How the native library was built";
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  m.attr("torch_abi") = "2.11";
#ifdef FASTASR_WITH_CUDA
  m.attr("nvcc") = FASTASR_NVCC;
#else
  m.attr("nvcc") = py::none();
#endif
}
