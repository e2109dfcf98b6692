// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/instruction_sets.h"

#define FASTASR_BODY "cpu/gemm_body.h"
#include "cpu/each_instruction_set.h"

namespace fastasr::cpu {

int64_t Gemm::a_panels() const { FASTASR_DISPATCH(a_panels(*this)); }
int64_t Gemm::b_panels() const { FASTASR_DISPATCH(b_panels(*this)); }
int64_t Gemm::packed_a() const { FASTASR_DISPATCH(packed_a(*this)); }
int64_t Gemm::packed_b() const { FASTASR_DISPATCH(packed_b(*this)); }
int64_t Gemm::tasks() const { FASTASR_DISPATCH(tasks(*this)); }

void gemm_pack_a(const Gemm& g, float* packed, int64_t begin, int64_t end) {
  FASTASR_DISPATCH(pack_a(g, packed, begin, end));
}
void gemm_pack_b(const Gemm& g, float* packed, int64_t begin, int64_t end) {
  FASTASR_DISPATCH(pack_b(g, packed, begin, end));
}
void gemm_products(const Gemm& g, const float* a, const float* b, int64_t begin, int64_t end) {
  FASTASR_DISPATCH(products(g, a, b, begin, end));
}

}  // namespace fastasr::cpu
