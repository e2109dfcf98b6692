// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt_lattice.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "cpu/instruction_sets.h"

#define FASTASR_BODY "cpu/rnnt_lattice_body.h"
#include "cpu/each_instruction_set.h"

namespace fastasr::cpu {

#define FASTASR_DEFINE(C)                                                                                             \
  C lattice_forward(const LatticeSize& size, const C* x, int64_t x_row, const C* y, int64_t y_row, C* shares,         \
                    C* scratch) {                                                                                     \
    FASTASR_DISPATCH(forward_body<C>(size, x, x_row, y, y_row, shares, scratch));                                     \
  }                                                                                                                   \
  void lattice_backward(const LatticeSize& size, C grad, const C* shares, C* dx, int64_t x_row, C* dy, int64_t y_row, \
                        C* scratch) {                                                                                 \
    FASTASR_DISPATCH(backward_body<C>(size, grad, shares, dx, x_row, dy, y_row, scratch));                            \
  }

FASTASR_DEFINE(float)
FASTASR_DEFINE(double)

}  // namespace fastasr::cpu
