// SPDX-License-Identifier: Apache-2.0
// What is kept of memory notices every dense write to it, and reads nothing outside of it.
#include "cpu/support/kept.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

using cpu::kept_pieces;
using cpu::KeptPiece;
using cpu::KeptSpan;

// Spans of these numbers of bytes, from whole ones to many more bytes than are compared, at any alignment.
constexpr int64_t kSizes[] = {0, 1, 2, 7, 63, 64, 65, 511, 512, 513, 577, 640, 1000, 4096, 100003};
constexpr int64_t kOffsets[] = {0, 1, 8, 60};

KeptSpan span_of(Buffer<char>& memory) { return {reinterpret_cast<int64_t>(memory.data()), memory.size()}; }

bool unchanged(const std::vector<KeptPiece>& pieces) {
  return cpu::kept_unchanged(pieces.data(), static_cast<int64_t>(pieces.size()));
}

template <typename F>
void for_each_buffer(const F& f) {
  Random random(11);
  for (const int64_t bytes : kSizes)
    for (const int64_t offset : kOffsets) {
      INFO("bytes ", bytes, ", offset ", offset);
      Buffer<char> memory(bytes, offset);
      for (int64_t i = 0; i < bytes; i++) memory[i] = static_cast<char>(random.bits());
      f(memory);
    }
}

TEST_CASE("pieces lie inside of their span, in its order, and hold its bytes") {
  for_each_buffer([](Buffer<char>& memory) {
    const KeptSpan span = span_of(memory);
    const auto pieces = kept_pieces(&span, 1);
    const auto most = std::min<int64_t>(cpu::kKeptPieces, (span.bytes + KeptPiece::kBytes - 1) / KeptPiece::kBytes);
    CHECK(static_cast<int64_t>(pieces.size()) <= most);
    CHECK(pieces.empty() == (span.bytes == 0));
    int64_t at = span.address;
    for (const KeptPiece& p : pieces) {
      CHECK(p.bytes > 0 && p.address >= at && p.address + p.bytes <= span.address + span.bytes);
      CHECK(std::memcmp(p.held, memory.data() + (p.address - span.address), static_cast<size_t>(p.bytes)) == 0);
      at = p.address;
    }
    CHECK(unchanged(pieces));
  });
}

TEST_CASE("a dense write is noticed by each part of the pieces, and so is its undoing") {
  for_each_buffer([](Buffer<char>& memory) {
    const KeptSpan span = span_of(memory);
    for (const int64_t parts : {1, 3, 8})
      for (int64_t part = 0; part < parts; part++) {
        const auto pieces = kept_pieces(&span, 1, part, parts);
        CHECK(unchanged(pieces));
        for (int64_t i = 0; i < memory.size(); i++) memory[i] = static_cast<char>(~memory[i]);
        CHECK(unchanged(pieces) == (memory.size() == 0));
        for (int64_t i = 0; i < memory.size(); i++) memory[i] = static_cast<char>(~memory[i]);
        CHECK(unchanged(pieces));
      }
  });
}

TEST_CASE("the parts together are all pieces") {
  for_each_buffer([](Buffer<char>& memory) {
    const KeptSpan span = span_of(memory);
    std::vector<int64_t> whole, together;
    for (const KeptPiece& p : kept_pieces(&span, 1)) whole.push_back(p.address);
    for (int64_t part = 0; part < 8; part++)
      for (const KeptPiece& p : kept_pieces(&span, 1, part, 8)) together.push_back(p.address);
    std::sort(together.begin(), together.end());
    together.erase(std::unique(together.begin(), together.end()), together.end());
    whole.erase(std::unique(whole.begin(), whole.end()), whole.end());
    CHECK(whole == together);
  });
}

TEST_CASE("one byte of a short span is noticed, and a write to a third of a long one") {
  for_each_buffer([](Buffer<char>& memory) {
    const KeptSpan span = span_of(memory);
    const auto pieces = kept_pieces(&span, 1);
    const int64_t whole = cpu::kKeptPieces * KeptPiece::kBytes;
    const int64_t written = span.bytes <= whole ? 1 : (span.bytes + 2) / 3, step = span.bytes <= whole ? 1 : 977;
    for (int64_t begin = 0; begin + written <= span.bytes; begin += step) {
      for (int64_t i = 0; i < written; i++) memory[begin + i] ^= 1;
      CHECK(!unchanged(pieces), "bytes from %ld on", long(begin));
      for (int64_t i = 0; i < written; i++) memory[begin + i] ^= 1;
    }
    CHECK(unchanged(pieces));
  });
}

TEST_CASE("a factor is noticed where most is zero, and NaNs are compared by their bits") {
  constexpr int64_t kFloats = 1 << 14;
  Buffer<float> memory(kFloats);
  for (int64_t i = 0; i < kFloats; i++) memory[i] = 0;
  for (int64_t i = 100; i < kFloats; i += 2048) memory[i] = 3;  // one line in 128
  const KeptSpan span{reinterpret_cast<int64_t>(memory.data()), kFloats * 4};
  const auto pieces = kept_pieces(&span, 1);
  for (int64_t i = 0; i < kFloats; i++) memory[i] *= 2;
  CHECK(!unchanged(pieces));
  for (int64_t i = 0; i < kFloats; i++) memory[i] = std::numeric_limits<float>::quiet_NaN();
  CHECK(unchanged(kept_pieces(&span, 1)));
}

TEST_CASE("a digest tells of every bit, of the order and of the length") {
  for_each_buffer([](Buffer<char>& memory) {
    const int64_t bytes = memory.size();
    const uint64_t digest = cpu::kept_digest(memory.data(), bytes);
    CHECK(cpu::kept_digest(memory.data(), bytes) == digest);
    for (int64_t i = 0; i < bytes; i += 1 + bytes / 500)
      for (const char bit : {1, 64}) {
        memory[i] ^= bit;
        CHECK(cpu::kept_digest(memory.data(), bytes) != digest, "byte %ld", long(i));
        memory[i] ^= bit;
      }
    if (bytes > 1) CHECK(cpu::kept_digest(memory.data(), bytes - 1) != digest);
    if (bytes > 64 && memory[0] != memory[32]) {
      std::swap(memory[0], memory[32]);
      CHECK(cpu::kept_digest(memory.data(), bytes) != digest);
    }
  });
}

TEST_CASE("of several spans each is compared") {
  Random random(5);
  std::vector<Buffer<char>> memory;
  std::vector<KeptSpan> spans;
  for (const int64_t bytes : kSizes) {
    memory.emplace_back(bytes);
    for (int64_t i = 0; i < bytes; i++) memory.back()[i] = static_cast<char>(random.bits());
    spans.push_back(span_of(memory.back()));
  }
  const auto pieces = kept_pieces(spans.data(), static_cast<int64_t>(spans.size()));
  CHECK(unchanged(pieces));
  for (Buffer<char>& one : memory) {
    for (int64_t i = 0; i < one.size(); i++) one[i] ^= 1;
    CHECK(unchanged(pieces) == (one.size() == 0));
    for (int64_t i = 0; i < one.size(); i++) one[i] ^= 1;
  }
}

}  // namespace
}  // namespace fastasr::test
