// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/number.cuh"

// Arithmetic of a scan's states. A state type has the operations below; the scan kernel is written in them, so that
// real and complex states share it.
namespace fastasr::cuda {

template <typename Q>
struct StateTraits {
  using Real = Q;
  static constexpr int kParts = 1;   // real numbers in a state
  static constexpr int kStates = 4;  // states that a thread holds at a time
};

template <typename C>
FASTASR_HD C multiply(C a, C b) {
  return a * b;
}
// a b + c
template <typename C>
FASTASR_HD C multiply_add(C a, C b, C c) {
  return a * b + c;
}
// sum + Re(w u)
template <typename C>
FASTASR_HD C add_output(C sum, C w, C u) {
  return sum + w * u;
}
// sum + x u for a real x
template <typename C>
FASTASR_HD C add_scaled(C sum, C x, C u) {
  return sum + x * u;
}
// q^n from log2 q; log2 0 is given as a large negative number, so that q^0 is 1 there too
template <typename C>
FASTASR_HD C power(C log, C n) {
  return exp2(n * log);
}
template <typename C>
FASTASR_HD C zero(C) {
  return C(0);
}
template <typename C>
FASTASR_HD C from_real(C s, C) {
  return s;
}
template <typename C>
FASTASR_HD C add(C a, C b) {
  return a + b;
}
template <typename C>
FASTASR_HD C real_part(C q) {
  return q;
}
// the parts of a state lie `pitch` numbers apart
template <typename C>
FASTASR_HD C read_state(const C* p, int64_t, C) {
  return *p;
}
template <typename C>
FASTASR_HD void write_state(C* p, int64_t, C v) {
  *p = v;
}

}  // namespace fastasr::cuda
