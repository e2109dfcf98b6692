// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bindings/scratch.h"
#include "cpu/attention/zipformer_attention_weights.h"

// The bindings of attention with relative positions share this: checks of the arguments, packed keys and positions.
namespace fastasr {

using cpu::AttentionProblem;

// Returns the recordings of the frames of an op's `starts`, or nothing without them.
std::vector<cpu::Recording> recordings_of(const auto& a) {
  if (!a.starts) return {};
  const int64_t* const values = data<int64_t>(*a.starts);
  std::vector<int64_t> starts(values, values + a.N);
  std::sort(starts.begin(), starts.end());
  std::vector<cpu::Recording> found;
  for (int64_t i = 0; i < a.T; i++) {
    const auto end = std::upper_bound(starts.begin(), starts.end(), i);
    const bool none = end == starts.begin() || end == starts.end();
    found.push_back(none ? cpu::Recording{i, i} : cpu::Recording{std::max<int64_t>(0, end[-1]), std::min(a.T, *end)});
  }
  return found;
}

// Returns the problem that the checked arguments of an op with Zipformer's positions describe.
AttentionProblem problem_of(const auto& a, const std::vector<cpu::Recording>& recordings) {
  AttentionProblem p{};
  p.frames = a.T, p.batch = a.B, p.left = a.L, p.heads = a.num_heads, p.query_dim = a.query_head_dim;
  p.pos_dim = a.P - 2 * a.query_head_dim;
  p.chunk = a.chunk_size, p.left_chunks = a.left_context_chunks;
  if (a.pos && p.pos_dim > 0) p.pos_batch = a.pos->size(0);
  p.padding = data_or_null<uint8_t>(a.key_padding_mask);
  p.mask = data_or_null<uint8_t>(a.attn_mask);
  p.mask_per_sequence = a.attn_mask && a.attn_mask->dim() == 3;
  const int64_t rows = p.offsets();
  if (a.starts) {
    check(!a.L, a.kName, "a cache with starts");
    check(!a.pos || a.R == rows || (a.R < rows && a.R % 2), a.kName, "rows of pos");
    p.recordings = recordings.data(), p.rows = a.pos ? a.R : rows;
  } else {
    check(!a.pos || a.R == rows, a.kName, "rows of pos");
  }
  return p;
}

// The queries of each of `pairs` heads and sequences are processed in parts: each part has its own dk, dR and dV,
// `elements` in all, and the parts are then added in order. Their number depends on the shape alone.
struct QueryParts {
  static constexpr int64_t kElements = int64_t{1} << 24;  // 64 MB for all of them, unless one part per pair takes more
  int64_t rows, count;
  QueryParts(const AttentionProblem& a, int64_t pairs, int64_t elements) {
    pairs = std::max<int64_t>(1, pairs);
    const int64_t fit = std::max<int64_t>(1, kElements / std::max<int64_t>(1, pairs * elements));
    const int64_t most = std::min(fit, std::max<int64_t>(1, a.frames / 128));
    const int64_t wanted = std::clamp<int64_t>((32 + pairs - 1) / pairs, 1, most);
    rows = std::max<int64_t>(1, (a.frames + wanted - 1) / wanted);
    rows = (rows + cpu::kAttentionStep - 1) / cpu::kAttentionStep * cpu::kAttentionStep;
    count = std::max<int64_t>(1, (a.frames + rows - 1) / rows);
  }
};

template <typename C>
struct WorkspaceLayout {
  int64_t kt, key_rows, rt, total;  // offsets into the workspace
  WorkspaceLayout(const AttentionProblem& a, bool backward) {
    const int64_t pairs = a.heads * a.batch;
    kt = 0;
    key_rows = kt + pairs * a.keys_transposed_size();
    rt = key_rows + (backward ? pairs * a.key_rows_size() : 0);
    total = rt + a.heads * a.pos_batch * a.positions_size();
  }
};

template <typename T>
void pack(const AttentionProblem& a, const Tensor& x, const Optional& pos, const Optional& cached_key,
          const WorkspaceLayout<cpu::compute_t<T>>& layout, cpu::compute_t<T>* w, bool backward) {
  const auto& kernel = cpu::kernels<cpu::AttentionWeightsKernels<T>>();
  const int64_t pairs = a.heads * a.batch, work = a.padded_keys() * a.query_dim;
  const T *xp = data<T>(x), *cp = a.left ? data<T>(*cached_key) : nullptr, *pp = a.pos_batch ? data<T>(*pos) : nullptr;
  parallel_tasks(pairs + a.heads * a.pos_batch, work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      if (i < pairs) {
        kernel.pack_keys(a, xp, cp, i, w + layout.kt + i * a.keys_transposed_size(),
                         backward ? w + layout.key_rows + i * a.key_rows_size() : nullptr);
      } else {
        const int64_t k = i - pairs;
        kernel.pack_positions(a, pp, k / a.pos_batch, k % a.pos_batch, w + layout.rt + k * a.positions_size());
      }
    }
  });
}

template <typename C>
const C* positions_of(const AttentionProblem& a, const C* rt, int64_t pair) {
  if (!a.pos_batch) return nullptr;
  return rt + (pair / a.batch * a.pos_batch + (a.pos_batch == 1 ? 0 : pair % a.batch)) * a.positions_size();
}

}  // namespace fastasr
