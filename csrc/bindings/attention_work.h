// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bindings/dispatch.h"
#include "cpu/attention/attention_tiles.h"

// The bindings of attention share this: the work of a task, by which threads are given tasks.
namespace fastasr {

// Returns the work of queries that meet keys, in whole tiles. Each pair costs an element for its weight, and another
// for 32 multiply-adds, one for each of `channels`.
inline int64_t pairs_work(int64_t queries, int64_t keys, int64_t channels) {
  const auto tiles = [](int64_t n, int64_t of) { return (n + of - 1) / of * of; };
  return tiles(queries, cpu::kAttentionRows) * tiles(keys, cpu::kAttentionPad) * (channels + 32) / 32;
}

// Runs f(begin, end) over [0, tasks), into which the attention of every sequence to itself is cut, for all heads;
// `channels` as in pairs_work.
inline void parallel_packed(int64_t tasks, const std::vector<int64_t>& starts, int64_t heads, int64_t channels,
                            RangeFunction f) {
  int64_t work = 0;
  for (size_t i = 1; i < starts.size(); i++) {
    const int64_t frames = starts[i] - starts[i - 1];
    work += heads * pairs_work(frames, frames, channels);
  }
  parallel_tasks(tasks, work / std::max<int64_t>(1, tasks), f);
}

}  // namespace fastasr
