// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/rnnt_lattice.h"

#include <cmath>
#include <tuple>

#include "bindings/lattice_boundary.h"
#include "bindings/pooled.h"

namespace fastasr::bindings::rnnt_lattice {
namespace {

std::tuple<Tensor, Tensor> rnnt_lattice_forward(const Tensor& x, const Tensor& y, const Optional& boundary, bool keep) {
  const char* op = "rnnt_lattice_forward";
  check_like(x, x, op, "symbol_logprobs");
  check_like(y, x, op, "blank_logprobs");
  check(x.dim() == 3 && y.dim() == 3 && y.size(0) == x.size(0) && y.size(1) == x.size(1) + 1, op, "sizes");
  const int64_t batch = x.size(0), symbols = x.size(1), width = x.size(2), frames = y.size(2);
  check(width == frames || width == frames + 1, op, "columns of symbol_logprobs");
  const std::vector<Boundary> boundaries = checked_boundaries(boundary, batch, symbols, frames, op);
  const cpu::LatticeSize whole{symbols, frames, width > frames};
  const int64_t slab = whole.steps() * cpu::lattice_row(whole);
  Tensor scores = new_pooled(x, {batch});
  Tensor shares = keep ? new_pooled(x, {batch, whole.steps(), cpu::lattice_row(whole)}) : new_without_elements(x);
  with_compute_type(dtype_of(x), op, [&]<typename C>() {
    const auto& kernel = cpu::kernels<cpu::LatticeKernels<C>>();
    const C *xp = data<C>(x), *yp = data<C>(y);
    C *sp = mutable_data<C>(scores), *kept = keep && slab ? mutable_data<C>(shares) : nullptr;
    parallel_tasks(batch, slab, [&](int64_t begin, int64_t end) {
      const Scratch<C> scratch(cpu::lattice_scratch(symbols));
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = dealt(i, batch);
        const Boundary& at = boundaries[static_cast<size_t>(b)];
        const cpu::LatticeSize size{at.symbols(), at.frames(), whole.regular};
        sp[b] = kernel.forward(size, xp + (b * symbols + at.s_begin) * width + at.t_begin, width,
                               yp + (b * (symbols + 1) + at.s_begin) * frames + at.t_begin, frames,
                               kept ? kept + b * slab : nullptr, scratch.data());
        if (kept) {
          const int64_t used = size.steps() * cpu::lattice_row(size);
          std::fill(kept + b * slab + used, kept + (b + 1) * slab, C(0));
        }
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

std::tuple<Tensor, Tensor> rnnt_lattice_backward(const Optional& grad, const Tensor& scores, const Tensor& shares,
                                                 const Optional& boundary, int64_t symbols, int64_t width,
                                                 int64_t frames) {
  const char* op = "rnnt_lattice_backward";
  check_like(scores, scores, op, "scores");
  check_like(shares, scores, op, "shares");
  check(scores.dim() == 1 && symbols >= 0 && frames >= 0 && (width == frames || width == frames + 1), op, "sizes");
  const int64_t batch = scores.size(0);
  if (grad.has_value()) check_same_size(*grad, scores, op, "grad");
  const std::vector<Boundary> boundaries = checked_boundaries(boundary, batch, symbols, frames, op);
  const cpu::LatticeSize whole{symbols, frames, width > frames};
  const int64_t slab = whole.steps() * cpu::lattice_row(whole);
  check(shares.numel() == batch * slab, op, "shares");
  Tensor dx = new_pooled(scores, {batch, symbols, width}), dy = new_pooled(scores, {batch, symbols + 1, frames});
  with_compute_type(dtype_of(scores), op, [&]<typename C>() {
    const auto& kernel = cpu::kernels<cpu::LatticeKernels<C>>();
    const C *gp = data_or_null<C>(grad), *sp = data<C>(scores), *kept = data<C>(shares);
    C *dxp = mutable_data<C>(dx), *dyp = mutable_data<C>(dy);
    parallel_tasks(batch, slab, [&](int64_t begin, int64_t end) {
      const Scratch<C> scratch(cpu::lattice_scratch(symbols));
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = dealt(i, batch);
        const Boundary& at = boundaries[static_cast<size_t>(b)];
        C *const x = dxp + b * symbols * width, *const y = dyp + b * (symbols + 1) * frames;
        const C g = gp ? gp[b] : C(1), constant = std::isnan(sp[b]) ? sp[b] : C(0);
        const bool done = !std::isfinite(sp[b]) || g == 0;
        fill_outside(x, symbols, width, at.s_begin, at.s_end, at.t_begin, at.t_end + (whole.regular ? 1 : 0),
                     done ? &constant : nullptr);
        fill_outside(y, symbols + 1, frames, at.s_begin, at.s_end + 1, at.t_begin, at.t_end,
                     done ? &constant : nullptr);
        if (done) continue;
        kernel.backward({at.symbols(), at.frames(), whole.regular}, g, kept + b * slab,
                        x + at.s_begin * width + at.t_begin, width, y + at.s_begin * frames + at.t_begin, frames,
                        scratch.data());
      }
    });
  });
  return {dx, dy};
}

}  // namespace

FASTASR_OPERATORS({"rnnt_lattice_forward(Tensor symbol_logprobs, Tensor blank_logprobs, Tensor? boundary, "
                   "bool keep) -> (Tensor,Tensor)",
                   Boxed<rnnt_lattice_forward>::call},
                  {"rnnt_lattice_backward(Tensor? grad, Tensor scores, Tensor shares, Tensor? boundary, "
                   "int symbols, int width, int frames) -> (Tensor,Tensor)",
                   Boxed<rnnt_lattice_backward>::call})

}  // namespace fastasr::bindings::rnnt_lattice
