// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// Kernels are compiled once per instruction set and picked when the library is loaded, see cpu/simd/kernels.h.
#define FASTASR_INLINE static inline __attribute__((always_inline))
// Does the same for member functions of types that cross from one instruction set to another: nothing is left for the
// linker to merge.
#define FASTASR_MEMBER inline __attribute__((always_inline))

namespace fastasr::cpu {

// The sets in ascending order. portable is x86-64; avx2 is x86-64-v3; avx512 is x86-64-v4. The three beyond it add
// instructions that multiply and add four integers of 8 bits (VNNI), two bfloat16, or matrices of either (AMX): only
// files that use them are compiled for these. The last three are aarch64's: neon is armv8-a, neon_dot adds dot products
// of signed integers of 8 bits (FEAT_DotProd), neon_bf16 dot products of unsigned by signed integers and of bfloat16
// (FEAT_I8MM and FEAT_BF16). On every other architecture portable is what the compiler uses by itself.
enum class Simd { portable, avx2, avx512, avx512_vnni, avx512_bf16, avx512_amx, neon, neon_dot, neon_bf16 };

// Returns the set in use: the widest that this machine runs and this library was built for, or the one that the
// environment variable FASTASR_SIMD names. It is chosen when the library is loaded; until then it is the least.
extern Simd simd_in_use;
FASTASR_INLINE Simd simd() { return simd_in_use; }
const char* simd_name();   // as FASTASR_SIMD names it
const char* simd_level();  // for people

// Says why this machine runs no set of this library, or what is wrong with FASTASR_SIMD; null if nothing is.
const char* machine_problem();
const char* setting_problem();

// Tests call this: kernels of this set run from now on. Returns false if the machine or the library lacks it.
bool use_simd(Simd set);

}  // namespace fastasr::cpu
