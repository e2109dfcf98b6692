// SPDX-License-Identifier: Apache-2.0
// Includes the file FASTASR_BODY once per instruction set: see cpu/instruction_sets.h. No include guard.
#if FASTASR_SETS == 3

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define FASTASR_VECTOR_BYTES 64
namespace fastasr::cpu::v4 {
#include FASTASR_BODY
}
#undef FASTASR_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define FASTASR_VECTOR_BYTES 32
namespace fastasr::cpu::v3 {
#include FASTASR_BODY
}
#undef FASTASR_VECTOR_BYTES
#pragma GCC pop_options

#define FASTASR_VECTOR_BYTES 16
#else
#define FASTASR_VECTOR_BYTES FASTASR_NATIVE_BYTES
#endif

namespace fastasr::cpu::v1 {
#include FASTASR_BODY
}
#undef FASTASR_VECTOR_BYTES
#undef FASTASR_BODY
