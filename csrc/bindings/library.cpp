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

FASTASR_OPERATORS_ON(fastasr_cpu, CompositeExplicitAutograd, FASTASR_TYPED(machine_problem),
                     FASTASR_TYPED(setting_problem), FASTASR_TYPED(simd_name), FASTASR_TYPED(simd_level),
                     FASTASR_TYPED(bf16_gains), FASTASR_TYPED(cuda_architectures), FASTASR_TYPED(cuda_devices))

}  // namespace fastasr::bindings::library
