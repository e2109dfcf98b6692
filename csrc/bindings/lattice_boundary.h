// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bindings/scratch.h"

// The lattices' bindings share boundaries and the values outside them.
namespace fastasr {

struct Boundary {
  int64_t s_begin, t_begin, s_end, t_end;
  int64_t symbols() const { return s_end - s_begin; }
  int64_t frames() const { return t_end - t_begin; }
};

// The boundary of every sequence; symbols < 0: s_end has no limit.
inline std::vector<Boundary> checked_boundaries(const Optional& boundary, int64_t batch, int64_t symbols,
                                                int64_t frames, const char* op) {
  std::vector<Boundary> out(static_cast<size_t>(batch), Boundary{0, 0, symbols, frames});
  if (!boundary.has_value()) return out;
  const int64_t* p = data<int64_t>(*boundary);
  for (Boundary& b : out) {
    b = {p[0], p[1], p[2], p[3]};
    check(0 <= b.s_begin && b.s_begin <= b.s_end && (symbols < 0 || b.s_end <= symbols) && 0 <= b.t_begin &&
              b.t_begin <= b.t_end && b.t_end <= frames,
          op, "boundary outside the lattice");
    p += 4;
  }
  return out;
}

// Calls run(b, boundary, scratch) for every sequence. Neighbours, which are often alike in length, go to different
// threads.
template <typename C>
void each_sequence(const auto& a, int64_t work, int64_t scratch_size, const auto& run) {
  const std::vector<Boundary> boundaries = checked_boundaries(a.boundary, a.B, a.S, a.T, a.kName);
  parallel_tasks(a.B, work, [&](int64_t begin, int64_t end) {
    const Scratch<C> scratch(scratch_size);
    for (int64_t i = begin; i < end; i++) {
      const int64_t even = (a.B + 1) / 2, b = i < even ? 2 * i : 2 * (i - even) + 1;
      run(b, boundaries[static_cast<size_t>(b)], scratch.data());
    }
  });
}

}  // namespace fastasr
