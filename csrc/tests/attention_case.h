// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/attention/zipformer_attention_weights.h"
#include "tests/check.h"

// The operands of attention with relative positions, and what its kernels share.
namespace fastasr::test {

using cpu::AttentionProblem;

struct AttentionShape {
  int64_t frames, batch, heads, dim, pos_dim, left, pos_batch, chunk, left_chunks;
  int masks;  // 1: padding, 2: a mask, 4: a mask per sequence
  double penalty;
  // With recordings: the frames of each, one after the other behind two frames that are in none, and the longest one
  // that R has rows for.
  int64_t recording = 0, longest = 0;
  int64_t rows() const { return recording ? 2 * longest - 1 : 2 * frames - 1 + left; }
};

// Holds inputs, packed operands, the parts of the gradients of keys and positions, and these gradients.
template <typename T>
struct AttentionCase {
  using C = compute_t<T>;
  AttentionShape s;
  Random random;
  Buffer<T> x{s.frames * s.batch * s.heads * (2 * s.dim + s.pos_dim), 1, random, 0.5},
      pos{s.pos_batch * s.rows() * s.heads * s.pos_dim, 3, random},
      cached{s.left * s.batch * s.heads * s.dim, 0, random, 0.5};
  std::vector<uint8_t> padding, mask;
  std::vector<cpu::Recording> recordings;
  AttentionProblem a = problem();
  int64_t pairs = a.heads * a.batch, part = cpu::kAttentionStep * 2, parts = (a.frames + part - 1) / part;
  Buffer<C> kt{pairs * a.keys_transposed_size()}, rows{pairs * a.key_rows_size()},
      rt{a.heads * a.pos_batch * a.positions_size()}, dk{pairs * parts * a.key_rows_size()},
      drt{pairs * parts * a.positions_size()};
  Buffer<T> dx{x.size(), 1}, dpos{pos.size(), 1}, dcached{cached.size(), 1};
  std::vector<cpu::KeyRange> ranges = std::vector<cpu::KeyRange>(static_cast<size_t>(a.batch));
  const cpu::AttentionWeightsKernels<T>& kernel = cpu::kernels<cpu::AttentionWeightsKernels<T>>();

  AttentionCase(const AttentionShape& shape, uint64_t seed, Rounding rounding) : s(shape), random(seed, rounding) {
    dx.set(0), dpos.set(0), dcached.set(0);  // heads without values write none
    attention_key_ranges(a, ranges.data());
    for (int64_t pair = 0; pair < pairs; pair++) kernel.pack_keys(a, x, cached, pair, kt_of(pair), rows_of(pair));
    for (int64_t k = 0; k < a.heads * a.pos_batch; k++)
      kernel.pack_positions(a, pos, k / a.pos_batch, k % a.pos_batch, rt + k * a.positions_size());
  }
  AttentionProblem problem() {
    AttentionProblem a{};
    a.frames = s.frames, a.batch = s.batch, a.heads = s.heads, a.query_dim = s.dim, a.pos_dim = s.pos_dim;
    a.left = s.left, a.pos_batch = s.pos_batch, a.chunk = s.chunk, a.left_chunks = s.left_chunks;
    a.penalty = s.penalty, a.limit = 1.25;
    for (int64_t i = 0; s.recording && i < a.frames; i++) {
      const int64_t begin = i < 2 ? i : 2 + (i - 2) / s.recording * s.recording, end = begin + s.recording;
      recordings.push_back(i < 2 || end > a.frames ? cpu::Recording{i, i} : cpu::Recording{begin, end});
    }
    if (s.recording) a.recordings = recordings.data(), a.rows = s.rows();
    const auto draw = [&](std::vector<uint8_t>& m, int64_t n) {
      m.resize(static_cast<size_t>(n));
      for (auto& v : m) v = random.uniform() < 0.3;
    };
    draw(padding, a.batch * a.keys());
    draw(mask, (s.masks & 4 ? a.batch : 1) * a.frames * a.keys());
    if (a.batch > 1)  // one sequence with a padded tail, one that is all padding
      for (int64_t j = 0; j < a.keys(); j++) padding[j] = j >= a.keys() / 2, padding[(a.batch - 1) * a.keys() + j] = 1;
    a.padding = s.masks & 1 ? padding.data() : nullptr;
    a.mask = s.masks & 6 ? mask.data() : nullptr;
    a.mask_per_sequence = s.masks & 4;
    return a;
  }
  C* kt_of(int64_t pair) { return kt + pair * a.keys_transposed_size(); }
  C* rows_of(int64_t pair) { return rows + pair * a.key_rows_size(); }
  C* dk_of(int64_t pair, int64_t k) { return dk + (pair * parts + k) * a.key_rows_size(); }
  C* drt_of(int64_t pair, int64_t k) { return drt + (pair * parts + k) * a.positions_size(); }
  const C* positions_of(int64_t pair) {
    if (!a.pos_batch) return nullptr;
    return rt + (pair / a.batch * a.pos_batch + (a.pos_batch == 1 ? 0 : pair % a.batch)) * a.positions_size();
  }
  // Calls f(part, begin, end) for the parts of the queries.
  template <typename F>
  void each_part(const F& f) const {
    in_pieces(a.frames, part, [&](int64_t begin, int64_t end) { f(begin / part, begin, end); });
  }
  void store_keys(int64_t pair) { kernel.store_keys(a, dk_of(pair, 0), parts, pair, dx, dcached); }
  void store_positions(int64_t heads) {
    for (int64_t k = 0; k < heads * a.pos_batch; k++)
      kernel.store_positions(a, drt, parts, k / a.pos_batch, k % a.pos_batch, dpos);
  }
};

}  // namespace fastasr::test
