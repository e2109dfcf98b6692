// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/tdt_lattice.h"

#include <cmath>

#include "bindings/lattice_boundary.h"
#include "bindings/written/tdt_lattice.h"

namespace fastasr::bindings::tdt_lattice {
namespace {

// Reads the durations: different numbers that are not negative.
std::vector<int64_t> checked_durations(const Tensor& durations, const char* op) {
  const int64_t* p = data<int64_t>(durations);
  std::vector<int64_t> found(p, p + durations.size(0));
  for (size_t i = 0; i < found.size(); i++)
    check(found[i] >= 0 && std::find(found.begin(), found.begin() + static_cast<int64_t>(i), found[i]) ==
                               found.begin() + static_cast<int64_t>(i),
          op, "durations");
  return found;
}

std::tuple<Tensor, Tensor> tdt_lattice_forward(const TdtLatticeForward& a) {
  const Tensor &x = a.symbol_logprobs, &y = a.blank_logprobs, &z = a.duration_logprobs;
  const int64_t batch = a.B, frames = a.T, row = a.S + 1, count = a.N;
  const std::vector<int64_t> steps = checked_durations(a.durations, a.kName);
  const cpu::TdtSize whole{a.S, frames, row, steps.data(), count};
  const int64_t slab = frames * 2 * count * cpu::tdt_row(row);
  Tensor scores = new_contiguous(x, {batch});
  Tensor shares = a.keep ? new_contiguous(x, {batch, frames, 2 * count, cpu::tdt_row(row)}) : new_without_elements(x);
  with_wide_kernels<cpu::TdtLatticeKernels>(x, a.kName, [&]<typename C>(const auto& kernel) {
    const C *xp = data<C>(x), *yp = data<C>(y), *zp = data<C>(z);
    C *sp = mutable_data<C>(scores), *kept = a.keep && slab ? mutable_data<C>(shares) : nullptr;
    each_sequence<C>(a, frames * row, cpu::tdt_scratch(whole), [&](int64_t b, const Boundary& at, C* scratch) {
      const cpu::TdtSize size{at.symbols(), at.frames(), row, steps.data(), count};
      const int64_t frame = b * frames + at.t_begin, first = frame * row + at.s_begin, used = size.frames * 2 * count;
      sp[b] = kernel.forward(size, xp + frame * (row - 1) + at.s_begin, yp + first, zp + first * count,
                             kept ? kept + b * slab : nullptr, scratch);
      if (kept) std::fill(kept + b * slab + used * cpu::tdt_row(row), kept + (b + 1) * slab, C(0));
    });
  });
  return {scores, shares};
}

std::tuple<Tensor, Tensor, Tensor> tdt_lattice_backward(const TdtLatticeBackward& a) {
  const Tensor &scores = a.scores, &shares = a.shares;
  const int64_t batch = a.B, frames = a.T, row = a.S + 1, count = a.N;
  const std::vector<int64_t> steps = checked_durations(a.durations, a.kName);
  const cpu::TdtSize whole{a.S, frames, row, steps.data(), count};
  const int64_t slab = frames * 2 * count * cpu::tdt_row(row);
  check(shares.numel() == batch * slab, a.kName, "shares");
  Tensor dx = new_contiguous(scores, {batch, frames, row - 1}), dy = new_contiguous(scores, {batch, frames, row});
  Tensor dz = new_contiguous(scores, {batch, frames, row, count});
  with_wide_kernels<cpu::TdtLatticeKernels>(scores, a.kName, [&]<typename C>(const auto& kernel) {
    const C *gp = data<C>(a.grad_scores), *sp = data<C>(scores), *kept = data<C>(shares);
    C *dxp = mutable_data<C>(dx), *dyp = mutable_data<C>(dy), *dzp = mutable_data<C>(dz);
    each_sequence<C>(a, frames * row, cpu::tdt_scratch(whole), [&](int64_t b, const Boundary& at, C* scratch) {
      const C g = gp[b], nan = std::isnan(sp[b]) ? sp[b] : C(0);
      // Writes zeros, or the score's NaN into the cells inside, and returns the first one's place.
      const auto filled = [&](C* d, int64_t width, int64_t cells, int64_t count) {
        d += b * frames * width * count;
        std::fill_n(d, frames * width * count, C(0));
        d += (at.t_begin * width + at.s_begin) * count;
        for (int64_t t = 0; nan != C(0) && t < at.frames(); t++) std::fill_n(d + t * width * count, cells * count, nan);
        return d;
      };
      C* const x = filled(dxp, row - 1, at.symbols(), 1);
      C* const y = filled(dyp, row, at.symbols() + 1, 1);
      C* const z = filled(dzp, row, at.symbols() + 1, count);
      if (!std::isfinite(sp[b]) || g == 0) return;
      kernel.backward({at.symbols(), at.frames(), row, steps.data(), count}, g, kept + b * slab, x, y, z, scratch);
    });
  });
  return {dx, dy, dz};
}

}  // namespace

FASTASR_OPERATORS(written<tdt_lattice_forward>, written<tdt_lattice_backward>)

}  // namespace fastasr::bindings::tdt_lattice
