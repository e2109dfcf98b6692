// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

// Notices writes to memory of which a result is kept, whoever makes them: torch counts only its own. It compares a few
// pieces of every span with their earlier contents; a write to few elements may fall between them.
namespace fastasr::cpu {

struct KeptSpan {
  int64_t address, bytes;
};

// A cache line, or what a span has of it: 10 words, so that a list of them is an array of integers.
struct KeptPiece {
  static constexpr int64_t kBytes = 64, kWords = 2 + kBytes / 8;
  int64_t address, bytes;
  char held[kBytes];
};

// The pieces of a span; one that has no more lines is compared as a whole. A piece costs up to a cache miss and a walk
// through page tables, 70 ns, when it is compared.
constexpr int64_t kKeptPieces = 8;

// Returns pieces of the spans with what they hold now, the `part`-th of `parts`, of which each holds a piece of every
// span. Pieces are spread over a span at random, and hold something other than zeros if their eighth of it does: a
// factor does not change zeros.
std::vector<KeptPiece> kept_pieces(const KeptSpan* spans, int64_t count, int64_t part = 0, int64_t parts = 1);

// Says whether all pieces hold the same bits as then.
bool kept_unchanged(const KeptPiece* pieces, int64_t count);

// Returns a hash of all bytes: different bytes have the same one with a chance of 2^-64. It reads 9 bytes per
// nanosecond.
uint64_t kept_digest(const void* memory, int64_t bytes);

}  // namespace fastasr::cpu
