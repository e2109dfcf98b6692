// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/rnnt_pruned_lattice.h"

#include <array>

#include "bindings/lattice_boundary.h"
#include "bindings/written/rnnt_pruned_lattice.h"

namespace fastasr::bindings::rnnt_pruned_lattice {
namespace {

using cpu::kBandLanes;

int64_t groups_of(int64_t batch) { return (batch + kBandLanes - 1) / kBandLanes; }

// Returns every sequence's boundary; without one it reaches from (0, 0) to the top of the last window. starts must not
// decrease.
std::vector<Boundary> checked_band(const auto& a) {
  const int64_t frames = a.T;
  std::vector<Boundary> out = checked_boundaries(a.boundary, a.B, -1, frames, a.kName);
  const int64_t* p = data<int64_t>(a.starts);
  for (int64_t b = 0; b < a.B; b++, p += frames) {
    int64_t before = 0;
    bool ok = true;
    for (int64_t t = 0; t < frames; t++) ok = ok && p[t] >= before, before = p[t];
    check(ok, a.kName, "starts decrease or are negative");
    if (!a.boundary) out[static_cast<size_t>(b)] = {0, 0, frames ? p[frames - 1] + a.R - 1 : 0, frames};
  }
  return out;
}

// Calls run(i, group, count, scratch) for every group of sequences, after fill(b, sequence) for each of them.
template <typename C>
void run_groups(const auto& a, const cpu::BandSize& size, const auto& fill, const auto& run) {
  const std::vector<Boundary> boundaries = checked_band(a);
  const int64_t* const starts = data<int64_t>(a.starts);
  const int64_t batch = a.B, frames = a.T;
  parallel_tasks(groups_of(batch), 4 * frames * a.R, [&](int64_t begin, int64_t end) {
    const Scratch<C> scratch(cpu::band_scratch(size));
    std::array<cpu::BandSequence<C>, kBandLanes> group;
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = i * kBandLanes, count = std::min(kBandLanes, batch - first);
      for (int64_t l = 0; l < count; l++) {
        const Boundary& at = boundaries[static_cast<size_t>(first + l)];
        auto& sequence = group[static_cast<size_t>(l)];
        sequence = {.starts = starts + (first + l) * frames,
                    .s_begin = at.s_begin,
                    .t_begin = at.t_begin,
                    .s_end = at.s_end,
                    .t_end = at.t_end,
                    .grad = 1};
        fill(first + l, sequence);
      }
      run(i, group.data(), count, scratch.data());
    }
  });
}

std::tuple<Tensor, Tensor> rnnt_pruned_lattice_forward(const RnntPrunedLatticeForward& a) {
  const Tensor &x = a.symbol_logprobs, &y = a.blank_logprobs;
  const int64_t frames = a.T, window = a.R;
  const cpu::BandSize size{frames, window, a.modified};
  Tensor scores = new_contiguous(x, {a.B});
  Tensor shares =
      a.keep ? new_contiguous(x, {groups_of(a.B), frames, window + 1, kBandLanes}) : new_without_elements(x);
  with_wide_kernels<cpu::PrunedLatticeKernels>(x, a.kName, [&]<typename C>(const auto& kernel) {
    const C *xp = data<C>(x), *yp = data<C>(y);
    C *sp = mutable_data<C>(scores), *kept = a.keep && shares.numel() ? mutable_data<C>(shares) : nullptr;
    run_groups<C>(
        a, size,
        [&](int64_t b, auto& sequence) {
          sequence.x = xp + b * frames * window, sequence.y = yp + b * frames * window;
        },
        [&](int64_t i, auto* group, int64_t count, C* scratch) {
          kernel.forward(size, group, count, kept ? kept + i * cpu::band_shares(size) : nullptr, scratch);
          for (int64_t l = 0; l < count; l++) sp[i * kBandLanes + l] = group[l].score;
        });
  });
  return {scores, shares};
}

std::tuple<Tensor, Tensor> rnnt_pruned_lattice_backward(const RnntPrunedLatticeBackward& a) {
  const Tensor &scores = a.scores, &shares = a.shares;
  const int64_t frames = a.T, window = a.R;
  const cpu::BandSize size{frames, window, a.modified};
  check(window >= 1 && shares.numel() == groups_of(a.B) * cpu::band_shares(size), a.kName, "shares");
  Tensor dx = new_contiguous(scores, {a.B, frames, window}), dy = new_contiguous(scores, {a.B, frames, window});
  with_wide_kernels<cpu::PrunedLatticeKernels>(scores, a.kName, [&]<typename C>(const auto& kernel) {
    const C *gp = data_or_null<C>(a.grad_scores), *sp = data<C>(scores), *kept = data<C>(shares);
    C *dxp = mutable_data<C>(dx), *dyp = mutable_data<C>(dy);
    run_groups<C>(
        a, size,
        [&](int64_t b, auto& sequence) {
          sequence.dx = dxp + b * frames * window, sequence.dy = dyp + b * frames * window;
          sequence.score = sp[b];
          if (gp) sequence.grad = gp[b];
        },
        [&](int64_t i, auto* group, int64_t count, C* scratch) {
          kernel.backward(size, group, count, kept + i * cpu::band_shares(size), scratch);
        });
  });
  return {dx, dy};
}

}  // namespace

FASTASR_OPERATORS(written<rnnt_pruned_lattice_forward>, written<rnnt_pruned_lattice_backward>)

}  // namespace fastasr::bindings::rnnt_pruned_lattice
