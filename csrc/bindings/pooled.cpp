// SPDX-License-Identifier: Apache-2.0
#include "bindings/dispatch.h"

namespace fastasr {

namespace bindings::pooled {

// Returns memory of n floats, which the caller fills.
Tensor pooled_floats(const Tensor& like, int64_t n) {
  check(n >= 0, "pooled_floats", "n");
  return new_contiguous(like, {n}, ScalarType::Float);
}

FASTASR_UNDECLARED("fastasr/ops/_gemm.py hands it to products that fill it: nothing is computed",
                   FASTASR_TYPED(pooled_floats))

}  // namespace bindings::pooled
}  // namespace fastasr
