// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt_pruned_lattice.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/instruction_sets.h"

namespace fastasr::cpu {
namespace {

#if FASTASR_SETS == 3
namespace v4 {
#define FASTASR_TARGET __attribute__((target("arch=x86-64-v4")))
#define FASTASR_VECTOR 64
#include "cpu/rnnt_pruned_lattice_body.h"
#undef FASTASR_TARGET
#undef FASTASR_VECTOR
#undef FASTASR_VECTOR_INLINE
}  // namespace v4
namespace v3 {
#define FASTASR_TARGET __attribute__((target("arch=x86-64-v3")))
#define FASTASR_VECTOR 32
#include "cpu/rnnt_pruned_lattice_body.h"
#undef FASTASR_TARGET
#undef FASTASR_VECTOR
#undef FASTASR_VECTOR_INLINE
}  // namespace v3
#define FASTASR_VECTOR 16
#else
#define FASTASR_VECTOR FASTASR_NATIVE_BYTES
#endif
namespace v1 {
#define FASTASR_TARGET
#include "cpu/rnnt_pruned_lattice_body.h"
}  // namespace v1

}  // namespace

#define FASTASR_DEFINE(C)                                                                                     \
  void band_forward(const BandSize& size, BandSequence<C>* sequences, int64_t count, C* shares, C* scratch) { \
    FASTASR_DISPATCH(forward_body<C>(size, sequences, count, shares, scratch));                               \
  }                                                                                                           \
  void band_backward(const BandSize& size, const BandSequence<C>* sequences, int64_t count, const C* shares,  \
                     C* scratch) {                                                                            \
    FASTASR_DISPATCH(backward_body<C>(size, sequences, count, shares, scratch));                              \
  }

FASTASR_DEFINE(float)
FASTASR_DEFINE(double)

}  // namespace fastasr::cpu
