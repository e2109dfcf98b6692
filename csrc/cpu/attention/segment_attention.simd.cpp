// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/segment_attention.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/attention/softmax_backward.simd.h"
#include "cpu/math/elementary.h"

namespace fastasr::cpu {
namespace {

constexpr int64_t kTile = kPanel * kPanel;
constexpr int64_t kAhead = 16;  // rows between a load and its prefetch

// The rows of keys that some query of a block sees, and where their scores lie. Query l sees [begin[l], end[l]) of
// them.
struct Run {
  int64_t first, count, offset;
  alignas(64) int32_t begin[kPanel], end[kPanel];
  int64_t lane[kPanel];  // of the window, of the run's first row
  bool whole;            // every query sees every row
};

struct Block {
  int64_t queries;      // queries of the block
  int64_t lanes;        // computed lanes: whole vectors
  int64_t row[kPanel];  // row of each query
  Run runs[3];          // memory, right context, utterance
  int64_t rows;         // rows of scores
};

__attribute__((noinline)) Block block_of(const SegmentWindows& p, int64_t unit, int64_t block) {
  const int64_t b = unit / p.heads, segments = p.segments(), per = p.segment_queries();
  const int64_t s0 = block / p.blocks_per_segment() * p.segments_per_block();
  const int64_t s1 = std::min(segments, s0 + p.segments_per_block());
  const int64_t skip = block % p.blocks_per_segment() * kPanel;
  const int64_t length = p.lengths ? std::clamp<int64_t>(p.lengths[b], 0, p.frames) : p.frames;
  const int64_t old_frames = p.history ? std::clamp<int64_t>(p.history[0], 0, p.past_frames) : p.past_frames;
  const int64_t old_memory = p.history ? std::clamp<int64_t>(p.history[1], 0, p.past_memory) : p.past_memory;
  // Returns what segment s sees, as rows of each run's own kind.
  const auto window = [&](int64_t s, int64_t kind, int64_t* begin, int64_t* end) {
    if (kind == 0) {
      *end = p.memory ? p.past_memory + s : 0;
      *begin = std::max(p.past_memory - old_memory, p.past_memory + s - p.memory);
    } else if (kind == 1) {
      *begin = s * p.right, *end = *begin + p.right;
    } else {
      *end = p.past_frames + std::min(length, (s + 1) * p.segment);
      *begin = std::max(p.past_frames - old_frames, p.past_frames + s * p.segment - p.left);
    }
    *end = std::max(*begin, *end);
  };
  const int64_t base[3] = {0, p.remembered(), p.remembered() + segments * p.right};
  const int64_t lanes[3] = {0, p.memory, p.memory + p.right};
  Block out;
  out.queries = out.rows = 0;
  int64_t lowest[3];
  for (int64_t kind = 0; kind < 3; kind++) {
    Run& run = out.runs[kind];
    int64_t begin, end, unused;
    window(s0, kind, &begin, &unused);
    window(s1 - 1, kind, &unused, &end);
    run.first = base[kind] + begin, run.count = std::max<int64_t>(0, end - begin), run.offset = out.rows;
    out.rows += (run.count + kTileRows - 1) / kTileRows * kTileRows;
    lowest[kind] = begin;
    std::memset(run.begin, 0, sizeof(run.begin)), std::memset(run.end, 0, sizeof(run.end));
  }
  for (int64_t s = s0; s < s1; s++) {
    const int64_t here = std::min(p.segment, p.frames - s * p.segment);
    for (int64_t i = skip; i < std::min(per, skip + kPanel); i++) {
      const bool summary = i == p.right + p.segment;
      if (!summary && i >= p.right + here) continue;
      const int64_t l = out.queries++;
      out.row[l] = i < p.right ? s * p.right + i
                   : summary   ? segments * p.right + p.frames + s
                               : segments * p.right + s * p.segment + i - p.right;
      for (int64_t kind = 0; kind < 3; kind++) {
        if (kind == 0 && summary) continue;
        Run& run = out.runs[kind];
        int64_t begin, end;
        window(s, kind, &begin, &end);
        run.begin[l] = static_cast<int32_t>(begin - lowest[kind]),
        run.end[l] = static_cast<int32_t>(end - lowest[kind]);
        const int64_t start = kind == 0   ? p.past_memory + s - p.memory
                              : kind == 1 ? s * p.right
                                          : p.past_frames + s * p.segment - p.left;
        run.lane[l] = lanes[kind] + lowest[kind] - start;
      }
    }
  }
  for (Run& run : out.runs) {
    run.whole = true;
    for (int64_t l = 0; l < out.queries; l++) run.whole &= run.begin[l] == 0 && run.end[l] == run.count;
  }
  out.lanes = std::max<int64_t>(16, (out.queries + 7) / 8 * 8);
  return out;
}

// Packs a row's channels of one head into panels that are `stride` apart, with zeros beyond.
template <typename T, typename C = compute_t<T>>
FASTASR_INLINE void unpack_row(const T* __restrict in, int64_t width, C scale, C* __restrict out, int64_t stride) {
  int64_t j = 0;
  for (; j + kPanel <= width; j += kPanel, out += stride) {
#pragma omp simd
    for (int64_t i = 0; i < kPanel; i++) out[i] = load(in[j + i]) * scale;
  }
  if (j == width) return;
  for (int64_t i = 0; i < kPanel; i++) out[i] = j + i < width ? load(in[j + i]) * scale : C(0);
}

template <typename T, typename C = compute_t<T>>
FASTASR_INLINE void put_row(T* __restrict out, int64_t width, C scale, const C* __restrict in, int64_t stride) {
  int64_t j = 0;
  for (; j + kPanel <= width; j += kPanel, in += stride) {
#pragma omp simd
    for (int64_t i = 0; i < kPanel; i++) store(&out[j + i], in[i] * scale);
  }
  for (int64_t i = 0; j + i < width; i++) store(&out[j + i], in[i] * scale);
}

template <typename T, typename C = compute_t<T>>
__attribute__((noinline)) void pack(const SegmentAttention<T>& p, const Sequence<const T>& t, int64_t unit, C* out) {
  const int64_t rows = p.packed_rows(), keys = p.keys(), b = unit / p.heads, first = unit % p.heads * p.width;
  for (int64_t k = 0; k < keys; k++) {
    // the rows of one head are too far apart for the hardware's prefetcher
    const char* ahead = reinterpret_cast<const char*>(t.at(std::min(k + kAhead, keys - 1), b) + first);
    for (size_t line = 0; line < static_cast<size_t>(p.width) * sizeof(T); line += 64) __builtin_prefetch(ahead + line);
    unpack_row(t.at(k, b) + first, p.width, C(1), out + k * kPanel, rows * kPanel);
  }
  for (int64_t panel = 0; panel < p.panels(); panel++)
    std::memset(out + (panel * rows + keys) * kPanel, 0, sizeof(C) * kTileRows * kPanel);
}

// Packs the block's rows of t, times scale: [panel][32 queries][32 channels], and transposed.
template <typename T, typename C = compute_t<T>>
__attribute__((noinline)) void gather(const SegmentAttention<T>& p, const Sequence<const T>& t, int64_t unit,
                                      const Block& block, C scale, C* rows, C* transposed) {
  const int64_t b = unit / p.heads, first = unit % p.heads * p.width;
  for (int64_t l = 0; l < block.queries; l++)
    unpack_row(t.at(block.row[l], b) + first, p.width, scale, rows + l * kPanel, kTile);
  for (int64_t panel = 0; panel < p.panels(); panel++) {
    C* __restrict in = rows + panel * kTile, * __restrict out = transposed + panel * kTile;
    std::memset(in + block.queries * kPanel, 0, sizeof(C) * static_cast<size_t>(kPanel - block.queries) * kPanel);
    for (int64_t l = 0; l < block.lanes; l++)
      for (int64_t c = 0; c < kPanel; c++) out[c * kPanel + l] = in[l * kPanel + c];
  }
}

// Returns how many rows the next tile has when n rows are left.
FASTASR_INLINE int64_t tile_rows_of(int64_t n) { return std::min(kTileRows, (n + 3) / 4 * 4); }

// Computes scores[j][l] = sum over channels of packed[j] transposed[l].
template <typename C>
__attribute__((noinline)) void products(const SegmentWindows& p, const Block& block, const C* packed,
                                        const C* transposed, C* scores) {
  for (const Run& run : block.runs) {
    for (int64_t j = 0; j < run.count; j += kTileRows)
      tile_rows(packed + (run.first + j) * kPanel, p.packed_rows() * kPanel, transposed, p.width,
                scores + (run.offset + j) * kPanel, false, {tile_rows_of(run.count - j), block.lanes});
    const int64_t spare = (kTileRows - run.count % kTileRows) % kTileRows;  // no key's: zeros
    std::memset(scores + (run.offset + run.count) * kPanel, 0, sizeof(C) * static_cast<size_t>(spare * kPanel));
  }
}

// Computes S = exp(S - max) where a query sees a key, else exactly 0; inverse[l] = 1 / sum, or 0 where there is none.
template <int64_t kLanes, typename C>
FASTASR_INLINE void softmax(const Block& block, C* scores, C* __restrict inverse) {
  constexpr C kNone = -std::numeric_limits<C>::infinity();
  alignas(64) C most[kLanes];
  alignas(64) double total[kLanes] = {};
  for (int64_t l = 0; l < kLanes; l++) most[l] = kNone;
  // Lanes beyond the queries may see anything: nobody reads them.
  for (const Run& run : block.runs) {
    const C* __restrict s = scores + run.offset * kPanel;
    const int32_t* __restrict begin = run.begin, * __restrict end = run.end;
    for (int32_t j = 0; j < run.count; j++, s += kPanel) {
      if (run.whole) {
#pragma omp simd
        for (int64_t l = 0; l < kLanes; l++) most[l] = s[l] > most[l] ? s[l] : most[l];
      } else {
#pragma omp simd
        for (int64_t l = 0; l < kLanes; l++) {
          const C v = (j >= begin[l]) & (j < end[l]) ? s[l] : kNone;
          most[l] = v > most[l] ? v : most[l];
        }
      }
    }
  }
  for (const Run& run : block.runs) {
    C* __restrict s = scores + run.offset * kPanel;
    const int32_t* __restrict begin = run.begin, * __restrict end = run.end;
    for (int32_t j0 = 0; j0 < run.count; j0 += kPanel) {
      alignas(64) C part[kLanes] = {};
      const int32_t j1 = static_cast<int32_t>(std::min<int64_t>(run.count, j0 + kPanel));
      for (int32_t j = j0; j < j1; j++, s += kPanel) {
        if (run.whole) {
#pragma omp simd
          for (int64_t l = 0; l < kLanes; l++) {
            s[l] = exp_nonpositive(s[l] - most[l]);
            part[l] += s[l];
          }
        } else {
#pragma omp simd
          for (int64_t l = 0; l < kLanes; l++) {
            const C e = exp_nonpositive(s[l] - most[l]);
            s[l] = (j >= begin[l]) & (j < end[l]) ? e : C(0);
            part[l] += s[l];
          }
        }
      }
#pragma omp simd
      for (int64_t l = 0; l < kLanes; l++) total[l] += static_cast<double>(part[l]);
    }
  }
  for (int64_t l = 0; l < kLanes; l++) inverse[l] = total[l] == 0 ? C(0) : static_cast<C>(1 / total[l]);
}

template <typename C>
__attribute__((noinline)) void softmax(const Block& block, C* scores, C* inverse) {
  switch (block.lanes) {
    case 16:
      return softmax<16>(block, scores, inverse);
    case 24:
      return softmax<24>(block, scores, inverse);
    default:
      return softmax<kPanel>(block, scores, inverse);
  }
}

template <typename C>
__attribute__((noinline)) void drop(const SegmentWindows& p, const C* dropout, int64_t unit, const Block& block,
                                    C* scores) {
  for (int64_t l = 0; l < block.queries; l++) {
    const C* __restrict m = dropout + (unit * p.queries() + block.row[l]) * p.lanes();
    for (const Run& run : block.runs) {
      C* __restrict s = scores + run.offset * kPanel + l;
      for (int64_t j = run.begin[l]; j < run.end[l]; j++) s[j * kPanel] *= m[run.lane[l] + j];
    }
  }
}

// Columns of a panel's tiles.
FASTASR_INLINE int64_t columns_of(const SegmentWindows& p, int64_t panel) {
  return std::min(kPanel, (p.width - panel * kPanel + 7) / 8 * 8);
}

// Computes out[panel][l][c] = sum over keys of a[j][l] packed[j][c].
template <typename C>
__attribute__((noinline)) void mix(const SegmentWindows& p, const Block& block, const C* a, const C* packed, C* out) {
  for (int64_t panel = 0; panel < p.panels(); panel++)
    for (int64_t l = 0; l < block.queries; l += kTileRows) {
      const TilePart part{tile_rows_of(block.queries - l), columns_of(p, panel)};
      bool add = false;
      for (const Run& run : block.runs) {
        if (run.count == 0) continue;
        tile_columns(a + run.offset * kPanel + l, packed + (panel * p.packed_rows() + run.first) * kPanel, run.count,
                     out + panel * kTile + l * kPanel, add, part);
        add = true;
      }
      if (!add) std::memset(out + panel * kTile + l * kPanel, 0, sizeof(C) * kTileRows * kPanel);
    }
}

// A value that is not finite, even times a weight of 0, spoils the sums of queries that do not see it. Each query's
// sums are then computed again over the keys that it sees.
template <typename C>
__attribute__((noinline)) void mix_seen(const SegmentWindows& p, const Block& block, const C* a, const C* packed,
                                        C* out) {
  C zero = 0;
  for (int64_t panel = 0; panel < p.panels(); panel++) {
    const int64_t columns = columns_of(p, panel);
    for (int64_t l = 0; l < block.queries; l++) {
#pragma omp simd reduction(+ : zero)
      for (int64_t c = 0; c < columns; c++) zero += out[panel * kTile + l * kPanel + c] * C(0);
    }
  }
  if (zero == 0) return;
  for (int64_t panel = 0; panel < p.panels(); panel++)
    for (int64_t l = 0; l < block.queries; l++) {
      C* __restrict row = out + panel * kTile + l * kPanel;
      std::memset(row, 0, sizeof(C) * kPanel);
      for (const Run& run : block.runs)
        for (int64_t j = run.begin[l]; j < run.end[l]; j++) {
          const C w = a[(run.offset + j) * kPanel + l];
          const C* __restrict v = packed + (panel * p.packed_rows() + run.first + j) * kPanel;
          for (int64_t c = 0; c < kPanel; c++) row[c] += w * v[c];
        }
    }
}

// Computes sums[j][c] += sum over queries of a[j][l] rows[l][c].
template <typename C>
__attribute__((noinline)) void scatter(const SegmentWindows& p, const Block& block, const C* a, const C* rows,
                                       C* sums) {
  for (int64_t panel = 0; panel < p.panels(); panel++)
    for (const Run& run : block.runs)
      for (int64_t j = 0; j < run.count; j += kTileRows)
        tile_rows(a + (run.offset + j) * kPanel, 0, rows + panel * kTile, block.queries,
                  sums + (panel * p.packed_rows() + run.first + j) * kPanel, true,
                  {tile_rows_of(run.count - j), columns_of(p, panel)});
}

template <typename C>
__attribute__((noinline)) void block_softmax_backward(const Block& block, const C* a, C* ds) {
  switch (block.lanes) {
    case 16:
      return softmax_backward<16>(block.rows, a, ds);
    case 24:
      return softmax_backward<24>(block.rows, a, ds);
    default:
      return softmax_backward<kPanel>(block.rows, a, ds);
  }
}

template <typename C>
FASTASR_INLINE C scale_of(const SegmentWindows& p) {
  return static_cast<C>(1 / std::sqrt(static_cast<double>(p.width)));
}

template <typename T, typename C = compute_t<T>>
void forward(const SegmentAttention<T>& p, int64_t unit, T* y, C* scratch) {
  const int64_t packed = p.panels() * p.packed_rows() * kPanel, tiles = p.panels() * kTile;
  const int64_t b = unit / p.heads, channels = p.heads * p.width, first = unit % p.heads * p.width;
  C *key = scratch, *value = key + packed, *scores = value + packed, *rows = scores + p.score_rows() * kPanel;
  C* transposed = rows + tiles;
  alignas(64) C inverse[kPanel];
  pack(p, p.key, unit, key);
  pack(p, p.value, unit, value);
  for (int64_t i = 0; i < p.blocks(); i++) {
    const Block block = block_of(p, unit, i);
    gather(p, p.query, unit, block, scale_of<C>(p), rows, transposed);
    products(p, block, key, transposed, scores);
    softmax(block, scores, inverse);
    if (p.dropout) drop(p, p.dropout, unit, block, scores);
    mix(p, block, scores, value, rows);
    mix_seen(p, block, scores, value, rows);
    for (int64_t l = 0; l < block.queries; l++)
      put_row(y + (block.row[l] * p.batch + b) * channels + first, p.width, inverse[l], rows + l * kPanel, kTile);
  }
}

template <typename T, typename C = compute_t<T>>
void backward(const SegmentAttention<T>& p, const Sequence<const T>& grad, int64_t unit, T* dquery, T* dkey, T* dvalue,
              C* scratch) {
  const int64_t packed = p.panels() * p.packed_rows() * kPanel, tiles = p.panels() * kTile;
  const int64_t b = unit / p.heads, channels = p.heads * p.width, first = unit % p.heads * p.width;
  C *key = scratch, *value = key + packed, *key_sums = value + packed, *value_sums = key_sums + packed;
  C *a = value_sums + packed, *ds = a + p.score_rows() * kPanel, *query = ds + p.score_rows() * kPanel;
  C *query_t = query + tiles, *g = query_t + tiles, *g_t = g + tiles, *dq = g_t + tiles;
  alignas(64) C inverse[kPanel];
  pack(p, p.key, unit, key);
  pack(p, p.value, unit, value);
  std::memset(key_sums, 0, sizeof(C) * static_cast<size_t>(2 * packed));
  for (int64_t i = 0; i < p.blocks(); i++) {
    const Block block = block_of(p, unit, i);
    gather(p, p.query, unit, block, scale_of<C>(p), query, query_t);
    gather(p, grad, unit, block, C(1), g, g_t);
    products(p, block, key, query_t, a);
    softmax(block, a, inverse);
    for (int64_t j = 0; j < block.rows; j++) {
#pragma omp simd
      for (int64_t l = 0; l < block.lanes; l++) a[j * kPanel + l] *= inverse[l];
    }
    products(p, block, value, g_t, ds);
    if (p.dropout) drop(p, p.dropout, unit, block, ds);
    block_softmax_backward(block, a, ds);
    if (p.dropout) drop(p, p.dropout, unit, block, a);
    mix(p, block, ds, key, dq);
    scatter(p, block, ds, query, key_sums);
    scatter(p, block, a, g, value_sums);
    for (int64_t l = 0; l < block.queries; l++)
      put_row(dquery + (block.row[l] * p.batch + b) * channels + first, p.width, scale_of<C>(p), dq + l * kPanel,
              kTile);
  }
  for (int64_t k = 0; k < p.keys(); k++) {
    const int64_t at = (k * p.batch + b) * channels + first;
    put_row(dkey + at, p.width, C(1), key_sums + k * kPanel, p.packed_rows() * kPanel);
    put_row(dvalue + at, p.width, C(1), value_sums + k * kPanel, p.packed_rows() * kPanel);
  }
}

}  // namespace

FASTASR_KERNELS(SegmentAttentionKernels, .forward = forward<T>, .backward = backward<T>)

}  // namespace fastasr::cpu
