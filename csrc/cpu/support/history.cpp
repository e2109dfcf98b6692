// SPDX-License-Identifier: Apache-2.0
#include "cpu/support/history.h"

#include <atomic>
#include <cstring>

namespace fastasr::cpu {
namespace {

constexpr uint32_t kSignature[4] = {0x7fa57a52u, 0x6d656761u, 0x9e3779b9u, 0x51ed270bu};
constexpr int64_t kSequences = 4, kCapacity = 5, kWidth = 6, kTaken = 8;

}  // namespace

void history_begin(float* storage, int64_t sequences, int64_t capacity, int64_t width, int64_t taken) {
  auto* word = reinterpret_cast<uint32_t*>(storage);
  std::memset(storage, 0, static_cast<size_t>(history_header(sequences)) * sizeof(float));
  std::memcpy(word, kSignature, sizeof kSignature);
  word[kSequences] = static_cast<uint32_t>(sequences);
  word[kCapacity] = static_cast<uint32_t>(capacity);
  word[kWidth] = static_cast<uint32_t>(width);
  for (int64_t s = 0; s < sequences; s++) word[kTaken + s] = static_cast<uint32_t>(taken);
}

bool history_claim(const HistoryView& v) {
  auto* word = reinterpret_cast<uint32_t*>(v.storage);
  if (v.size < history_header(1) || reinterpret_cast<uintptr_t>(word) % alignof(uint32_t) != 0 ||
      std::memcmp(word, kSignature, sizeof kSignature) != 0)
    return false;
  const int64_t sequences = word[kSequences], capacity = word[kCapacity], width = word[kWidth];
  if (width != v.width || width == 0 || v.size != history_size(sequences, capacity, width)) return false;
  const int64_t sequence = capacity * width, at = v.offset - history_header(sequences);
  if (at < 0 || at % width != 0) return false;
  const int64_t first = at / sequence, row = at % sequence / width + v.length;  // the row to claim
  if (first + v.batch > sequences || row >= capacity) return false;
  if (v.batch > 1 && v.sequence_stride != sequence) return false;
  if (v.length > 1 && v.row_stride != width) return false;
  // If a later sequence refuses, the rows claimed before it stay unused: their count refuses all later claims.
  for (int64_t s = 0; s < v.batch; s++) {
    auto expected = static_cast<uint32_t>(row);
    if (!std::atomic_ref<uint32_t>(word[kTaken + first + s])
             .compare_exchange_strong(expected, static_cast<uint32_t>(row + 1), std::memory_order_acq_rel))
      return false;
  }
  return true;
}

}  // namespace fastasr::cpu
