// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/gemm/tile_gemm.h"
#include "cpu/math/number.h"
#include "cpu/support/sequence.h"

// Attention of segments over their windows of keys: see fastasr/ops/segment_attention.py. A unit is one head of one
// sequence: its keys and values are packed once, in panels of 32 channels, so that a window is a slice of their rows. A
// block is up to 32 queries, of as many whole segments as fit; its keys are three runs of rows, of memory, right
// context and utterance. Scores are held transposed, one row per key with the queries as lanes: the softmax needs no
// sum across lanes, what a query sees of a run is an interval of rows, and P is already packed for its products.
namespace fastasr::cpu {

struct SegmentWindows {
  const int64_t* lengths;  // (B,), or null
  const int64_t* history;  // past frames and past memory that may be seen, or null
  int64_t batch, heads, width;
  int64_t frames, segment, left, right, memory, past_frames, past_memory;

  FASTASR_MEMBER int64_t units() const { return batch * heads; }
  FASTASR_MEMBER int64_t segments() const { return (frames + segment - 1) / segment; }
  FASTASR_MEMBER int64_t remembered() const { return memory ? past_memory + std::max<int64_t>(0, segments() - 1) : 0; }
  FASTASR_MEMBER int64_t queries() const { return segments() * (right + (memory ? 1 : 0)) + frames; }
  FASTASR_MEMBER int64_t keys() const { return remembered() + segments() * right + past_frames + frames; }
  FASTASR_MEMBER int64_t lanes() const { return memory + right + left + segment; }
  FASTASR_MEMBER int64_t panels() const { return (width + kPanel - 1) / kPanel; }

  FASTASR_MEMBER int64_t segment_queries() const { return right + segment + (memory ? 1 : 0); }
  FASTASR_MEMBER int64_t segments_per_block() const { return std::max<int64_t>(1, kPanel / segment_queries()); }
  FASTASR_MEMBER int64_t blocks_per_segment() const {
    return (segment_queries() + kPanel - 1) / kPanel;
  }  // 1 but for long segments
  FASTASR_MEMBER int64_t blocks() const {
    const int64_t together = segments_per_block();
    return (segments() + together - 1) / together * blocks_per_segment();
  }
  // Rows of a packed panel with room for the last tile, and rows of a block's scores.
  FASTASR_MEMBER int64_t packed_rows() const { return keys() + kTileRows; }
  FASTASR_MEMBER int64_t score_rows() const {
    const int64_t together = segments_per_block();
    return memory + together - 1 + together * right + left + together * segment + 3 * kTileRows;
  }
};

template <typename T>
struct SegmentAttention : SegmentWindows {
  Sequence<const T> query, key, value;
  const compute_t<T>* dropout;  // (B, heads, queries, lanes), or null
};

// Elements of the compute type that a unit needs.
FASTASR_INLINE int64_t segment_attention_scratch(const SegmentWindows& p, bool backward) {
  const int64_t tiles = p.panels() * kPanel * kPanel;
  const int64_t packed = p.panels() * p.packed_rows() * kPanel, scores = p.score_rows() * kPanel;
  return backward ? 4 * packed + 2 * scores + 5 * tiles : 2 * packed + scores + 2 * tiles;
}

// Computes one unit. y, dquery (queries, B, heads width), dkey and dvalue (keys, B, heads width) are contiguous.
template <typename T>
struct SegmentAttentionKernels {
  void (*forward)(const SegmentAttention<T>& p, int64_t unit, T* y, compute_t<T>* scratch);
  void (*backward)(const SegmentAttention<T>& p, const Sequence<const T>& grad, int64_t unit, T* dquery, T* dkey,
                   T* dvalue, compute_t<T>* scratch);
};

}  // namespace fastasr::cpu
