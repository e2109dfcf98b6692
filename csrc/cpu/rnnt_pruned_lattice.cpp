// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt_pruned_lattice.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/instruction_sets.h"

#define FASTASR_BODY "cpu/rnnt_pruned_lattice_body.h"
#include "cpu/each_instruction_set.h"

namespace fastasr::cpu {

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
