// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// Rows of history (a decoder's keys, its values) that grow by one row per step, for several sequences at once, with
// room behind the last row. A state is a view of some rows of some sequences; the next step writes the row behind
// it in place if nobody has done so before, and copies the history if somebody has. No row is therefore written twice,
// and any number of hypotheses may go on from one state.
//
// The buffer describes itself: a header in front of the data holds, per sequence, how many rows are taken. So a view
// keeps its meaning through slicing, copying of its whole memory and saving, and no registry is needed.
//
//   header: 4 words of signature, sequences, capacity, width, 0; rows taken per sequence; padding to 64 bytes
//   data:   (sequences, capacity, width) floats
namespace fastasr::cpu {

// Floats in front of the data.
constexpr int64_t history_header(int64_t sequences) { return (8 + sequences + 15) / 16 * 16; }
constexpr int64_t history_size(int64_t sequences, int64_t capacity, int64_t width) {
  return history_header(sequences) + sequences * capacity * width;
}

// Writes a header for `taken` rows in every sequence.
void history_begin(float* storage, int64_t sequences, int64_t capacity, int64_t width, int64_t taken);

// A view of someone's memory: `batch` sequences of `length` rows of `width` floats, `offset` floats behind `storage`
// (which holds `size` floats), sequences `sequence_stride` and rows `row_stride` floats apart.
struct HistoryView {
  float* storage;
  int64_t size, offset, batch, length, width, sequence_stride, row_stride;
};

// Returns true when the view lies in such a buffer and the row behind it was free in each of its sequences: these rows
// are now the caller's to write. It is safe against other threads that claim the same rows.
bool history_claim(const HistoryView& view);

}  // namespace fastasr::cpu
