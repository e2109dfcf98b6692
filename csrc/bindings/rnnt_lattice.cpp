// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/rnnt_lattice.h"

#include <cmath>

#include "bindings/lattice_boundary.h"
#include "bindings/written/rnnt_lattice.h"

namespace fastasr::bindings::rnnt_lattice {
namespace {

cpu::LatticeSize size_of(const auto& a) {
  check(a.W == a.T || a.W == a.T + 1, a.kName, "columns of symbol_logprobs");
  return {a.S, a.T, a.W > a.T};
}

std::tuple<Tensor, Tensor> rnnt_lattice_forward(const RnntLatticeForward& a) {
  const Tensor &x = a.symbol_logprobs, &y = a.blank_logprobs;
  const int64_t batch = a.B, symbols = a.S, width = a.W, frames = a.T;
  const cpu::LatticeSize whole = size_of(a);
  const int64_t slab = whole.steps() * cpu::lattice_row(whole);
  Tensor scores = new_contiguous(x, {batch});
  Tensor shares = a.keep ? new_contiguous(x, {batch, whole.steps(), cpu::lattice_row(whole)}) : new_without_elements(x);
  with_wide_kernels<cpu::LatticeKernels>(x, a.kName, [&]<typename C>(const auto& kernel) {
    const C *xp = data<C>(x), *yp = data<C>(y);
    C *sp = mutable_data<C>(scores), *kept = a.keep && slab ? mutable_data<C>(shares) : nullptr;
    each_sequence<C>(a, slab, cpu::lattice_scratch(symbols), [&](int64_t b, const Boundary& at, C* scratch) {
      const cpu::LatticeSize size{at.symbols(), at.frames(), whole.regular};
      sp[b] = kernel.forward(size, xp + (b * symbols + at.s_begin) * width + at.t_begin, width,
                             yp + (b * (symbols + 1) + at.s_begin) * frames + at.t_begin, frames,
                             kept ? kept + b * slab : nullptr, scratch);
      if (kept) {
        const int64_t used = size.steps() * cpu::lattice_row(size);
        std::fill(kept + b * slab + used, kept + (b + 1) * slab, C(0));
      }
    });
  });
  return {scores, shares};
}

// Sets d (rows, width) to 0 outside rows [begin, end) and columns [from, to), and within them to *inside unless that is
// null.
template <typename C>
void fill_outside(C* d, int64_t rows, int64_t width, int64_t begin, int64_t end, int64_t from, int64_t to,
                  const C* inside) {
  std::fill(d, d + begin * width, C(0));
  for (int64_t s = begin; s < end; s++) {
    C* row = d + s * width;
    std::fill(row, row + from, C(0));
    if (inside) std::fill(row + from, row + to, *inside);
    std::fill(row + to, row + width, C(0));
  }
  std::fill(d + end * width, d + rows * width, C(0));
}

std::tuple<Tensor, Tensor> rnnt_lattice_backward(const RnntLatticeBackward& a) {
  const Tensor &scores = a.scores, &shares = a.shares;
  const int64_t batch = a.B, symbols = a.S, width = a.W, frames = a.T;
  const cpu::LatticeSize whole = size_of(a);
  const int64_t slab = whole.steps() * cpu::lattice_row(whole);
  check(shares.numel() == batch * slab, a.kName, "shares");
  Tensor dx = new_contiguous(scores, {batch, symbols, width}),
         dy = new_contiguous(scores, {batch, symbols + 1, frames});
  with_wide_kernels<cpu::LatticeKernels>(scores, a.kName, [&]<typename C>(const auto& kernel) {
    const C *gp = data_or_null<C>(a.grad_scores), *sp = data<C>(scores), *kept = data<C>(shares);
    C *dxp = mutable_data<C>(dx), *dyp = mutable_data<C>(dy);
    each_sequence<C>(a, slab, cpu::lattice_scratch(symbols), [&](int64_t b, const Boundary& at, C* scratch) {
      C *const x = dxp + b * symbols * width, *const y = dyp + b * (symbols + 1) * frames;
      const C g = gp ? gp[b] : C(1), constant = std::isnan(sp[b]) ? sp[b] : C(0);
      const bool done = !std::isfinite(sp[b]) || g == 0;
      fill_outside(x, symbols, width, at.s_begin, at.s_end, at.t_begin, at.t_end + (whole.regular ? 1 : 0),
                   done ? &constant : nullptr);
      fill_outside(y, symbols + 1, frames, at.s_begin, at.s_end + 1, at.t_begin, at.t_end, done ? &constant : nullptr);
      if (done) return;
      kernel.backward({at.symbols(), at.frames(), whole.regular}, g, kept + b * slab,
                      x + at.s_begin * width + at.t_begin, width, y + at.s_begin * frames + at.t_begin, frames,
                      scratch);
    });
  });
  return {dx, dy};
}

}  // namespace

FASTASR_OPERATORS(written<rnnt_lattice_forward>, written<rnnt_lattice_backward>)

}  // namespace fastasr::bindings::rnnt_lattice
