// SPDX-License-Identifier: Apache-2.0
#include "cpu/support/kept.h"

#include <cstring>

#include "bindings/dispatch.h"

namespace fastasr::bindings::kept {
namespace {

using cpu::KeptPiece;
using cpu::KeptSpan;
static_assert(sizeof(KeptPiece) == 8 * KeptPiece::kWords && sizeof(KeptSpan) == 16);

// Takes spans (n, 2), each the address and the bytes of memory that is readable, and returns a part of their pieces,
// (m, KeptPiece::kWords).
Tensor kept_pieces(const Tensor& spans, int64_t part, int64_t parts) {
  check(spans.dim() == 2 && is_dense(spans, ScalarType::Long, {spans.size(0), 2}), "kept_pieces",
        "spans are contiguous int64 (n, 2)");
  check(part >= 0 && part < parts && parts <= cpu::kKeptPieces, "kept_pieces", "there are 1 to 8 parts");
  const auto pieces = cpu::kept_pieces(data<KeptSpan>(spans), spans.size(0), part, parts);
  const Tensor out = new_contiguous(spans, {static_cast<int64_t>(pieces.size()), KeptPiece::kWords});
  if (!pieces.empty()) std::memcpy(mutable_data<KeptPiece>(out), pieces.data(), pieces.size() * sizeof(KeptPiece));
  return out;
}

// Says whether the memory of these pieces, which must still be readable, is unchanged.
bool kept_unchanged(const Tensor& pieces) {
  check(pieces.dim() == 2 && is_dense(pieces, ScalarType::Long, {pieces.size(0), KeptPiece::kWords}), "kept_unchanged",
        "pieces are what kept_pieces returned");
  return cpu::kept_unchanged(data<KeptPiece>(pieces), pieces.size(0));
}

// Returns a hash of all elements of a mask, bool of any strides.
int64_t kept_digest(const Tensor& mask) {
  check(dtype_of(mask) == ScalarType::Bool, "kept_digest", "the mask is bool");
  int64_t bytes = mask.numel() > 0;
  for (int64_t i = 0; i < mask.dim() && bytes; i++) bytes += (mask.size(i) - 1) * mask.stride(i);
  return static_cast<int64_t>(cpu::kept_digest(mask.const_data_ptr(), bytes));
}

}  // namespace

FASTASR_UNDECLARED("fastasr/ops/_kept.py compares the bytes of tensors: nothing is computed from them",
                   FASTASR_TYPED(kept_digest), FASTASR_TYPED(kept_pieces), FASTASR_TYPED(kept_unchanged))

}  // namespace fastasr::bindings::kept
