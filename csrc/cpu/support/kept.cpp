// SPDX-License-Identifier: Apache-2.0
#include "cpu/support/kept.h"

#include <algorithm>
#include <cstring>

namespace fastasr::cpu {
namespace {

constexpr int64_t kLine = KeptPiece::kBytes;
constexpr int64_t kAhead = 24;  // pieces whose lines are on their way while one is compared

const char* memory(int64_t address) { return reinterpret_cast<const char*>(address); }

bool is_zero(const char* line) {
  return std::all_of(line, line + kLine, [](char byte) { return byte == 0; });
}

KeptPiece piece(int64_t address, int64_t bytes) {
  KeptPiece p{address, bytes, {}};
  std::memcpy(p.held, memory(address), bytes);
  return p;
}

// Returns the address of one of `lines` from `first` on: the first that is not zero, from a random one on.
int64_t chosen(int64_t first, int64_t lines, uint64_t seed) {
  const uint64_t random = ((seed + 1) * 0x9e3779b97f4a7c15ull ^ seed) * 0x2545f4914f6cdd1dull;
  const auto begin = static_cast<int64_t>((random >> 33) % static_cast<uint64_t>(lines));
  for (int64_t i = 0; i < lines; i++) {
    const int64_t address = first + (begin + i) % lines * kLine;
    if (!is_zero(memory(address))) return address;
  }
  return first + begin * kLine;
}

// Returns piece p of a span.
KeptPiece piece_of(const KeptSpan& span, int64_t p, int64_t index) {
  const auto [address, bytes] = span;
  const int64_t short_lines = (bytes + kLine - 1) / kLine;
  if (short_lines <= kKeptPieces) {
    const int64_t at = p % short_lines * kLine;
    return piece(address + at, std::min(kLine, bytes - at));
  }
  const int64_t skipped = -address & (kLine - 1), lines = (bytes - skipped) / kLine;  // whole lines of the cache
  const int64_t begin = lines * p / kKeptPieces, end = std::max(begin + 1, lines * (p + 1) / kKeptPieces);
  const auto seed = static_cast<uint64_t>(index * kKeptPieces + p);
  return piece(chosen(address + skipped + begin * kLine, end - begin, seed), kLine);
}

}  // namespace

std::vector<KeptPiece> kept_pieces(const KeptSpan* spans, int64_t count, int64_t part, int64_t parts) {
  std::vector<KeptPiece> pieces;
  for (int64_t i = 0; i < count; i++) {
    const int64_t lines = (spans[i].bytes + kLine - 1) / kLine;
    for (int64_t p = part; p < kKeptPieces && lines > 0; p += parts)
      if (p == part || p < lines) pieces.push_back(piece_of(spans[i], p, i));
  }
  return pieces;
}

bool kept_unchanged(const KeptPiece* pieces, int64_t count) {
  for (int64_t i = 0; i < std::min(kAhead, count); i++) __builtin_prefetch(memory(pieces[i].address));
  for (int64_t i = 0; i < count; i++) {
    if (i + kAhead < count) __builtin_prefetch(memory(pieces[i + kAhead].address));
    const KeptPiece& p = pieces[i];
    // A length that the compiler knows becomes a few instructions in place of a call.
    if (p.bytes == kLine ? std::memcmp(memory(p.address), p.held, kLine) != 0
                         : std::memcmp(memory(p.address), p.held, p.bytes) != 0)
      return false;
  }
  return true;
}

namespace {

// A step of xxHash64 (Collet, 2012).
uint64_t mixed(uint64_t sum, uint64_t word) {
  sum += word * 0xc2b2ae3d27d4eb4full;
  return (sum << 31 | sum >> 33) * 0x9e3779b185ebca87ull;
}

}  // namespace

uint64_t kept_digest(const void* memory, int64_t bytes) {
  constexpr int kChains = 4;  // each waits for its own products alone
  constexpr int64_t kBlock = 8 * kChains;
  const auto* const from = static_cast<const char*>(memory);
  uint64_t sums[kChains] = {1, 2, 3, 4}, words[kChains];
  const auto add = [&] {
    for (int i = 0; i < kChains; i++) sums[i] = mixed(sums[i], words[i]);
  };
  const int64_t whole = bytes / kBlock * kBlock;
  for (int64_t at = 0; at < whole; at += kBlock) {
    std::memcpy(words, from + at, kBlock);
    add();
  }
  if (whole < bytes) {
    std::memset(words, 0, kBlock);
    std::memcpy(words, from + whole, bytes - whole);
    add();
  }
  auto digest = static_cast<uint64_t>(bytes);
  for (const uint64_t sum : sums) digest = mixed(digest, sum ^ sum >> 29);
  return digest;
}

}  // namespace fastasr::cpu
