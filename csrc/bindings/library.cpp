// SPDX-License-Identifier: Apache-2.0
// Describes the library. Loading it registers torch.ops.fastasr_cpu.* and torch.ops.fastasr_cuda.*.
#include "bindings/dispatch.h"
#include "cpu/gemm/reduced_gemm.h"
#include "cpu/simd/simd.h"
#ifdef FASTASR_WITH_CUDA
#include "cuda/device.h"
#endif

namespace fastasr::bindings::library {
namespace {

std::string text(const char* problem) { return problem ? problem : ""; }
std::string machine_problem() { return text(cpu::machine_problem()); }
std::string setting_problem() { return text(cpu::setting_problem()); }
std::string simd_name() { return cpu::simd_name(); }
std::string simd_level() { return cpu::simd_level(); }
bool bf16_gains() { return cpu::reduced_gemm_kernels(cpu::WeightFormat::bf16).gains(); }

#ifdef FASTASR_WITH_CUDA
std::string cuda_architectures() { return FASTASR_CUDA_ARCHS; }
int64_t cuda_devices() { return fastasr_cuda_device_count(); }
#else
std::string cuda_architectures() { return ""; }
int64_t cuda_devices() { return 0; }
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastasr_cpu, m) {
  m.def("machine_problem() -> str");
  m.def("setting_problem() -> str");
  m.def("simd_name() -> str");
  m.def("simd_level() -> str");
  m.def("bf16_gains() -> bool");
  m.def("cuda_architectures() -> str");
  m.def("cuda_devices() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastasr_cpu, CompositeExplicitAutograd, m) {
  m.impl("machine_problem", Boxed<machine_problem>::call);
  m.impl("setting_problem", Boxed<setting_problem>::call);
  m.impl("simd_name", Boxed<simd_name>::call);
  m.impl("simd_level", Boxed<simd_level>::call);
  m.impl("bf16_gains", Boxed<bf16_gains>::call);
  m.impl("cuda_architectures", Boxed<cuda_architectures>::call);
  m.impl("cuda_devices", Boxed<cuda_devices>::call);
}

}  // namespace fastasr::bindings::library
