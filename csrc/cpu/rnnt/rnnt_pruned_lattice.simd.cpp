// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/rnnt_pruned_lattice.h"

#include <algorithm>
#include <cstring>

#include "cpu/rnnt/scaled_number.simd.h"

// Lanes are sequences, because a band is too narrow to fill vectors. A row holds cell r of every sequence; a window
// that moves shifts its lane's cells by a binary decomposition of the distance.
namespace fastasr::cpu {
namespace {

// The arcs of frame t inside the boundary: symbols from cells [0, symbols), blanks from [0, blanks), both less `low`.
struct BandArcs {
  int64_t low, symbols, blanks;
  template <typename C>
  FASTASR_INLINE BandArcs at(const BandSize& size, const BandSequence<C>& q, int64_t t) {
    const int64_t start = q.starts[t];
    const int64_t last = size.modified ? size.window : size.window - 1;
    const int64_t symbols = t < q.t_begin || t > q.t_end - (size.modified ? 1 : 0) ? 0 : q.s_end - start;
    const int64_t blanks = t < q.t_begin || t >= q.t_end ? 0 : q.s_end - start + 1;
    return {std::clamp<int64_t>(q.s_begin - start, 0, size.window), std::clamp<int64_t>(symbols, 0, last),
            std::clamp<int64_t>(blanks, 0, size.window)};
  }
};

template <typename C>
FASTASR_INLINE bool in_window(const BandSize& size, const BandSequence<C>& q, int64_t t, int64_t s) {
  return t < size.frames && s >= q.starts[t] && s - q.starts[t] < size.window;
}

// Returns which of the window + 1 cells that frame t leads to is the end, or -1.
template <typename C>
FASTASR_INLINE int64_t leaves_at(const BandSize& size, const BandSequence<C>& q, int64_t t) {
  const int64_t j = q.s_end - q.starts[t];
  return q.t_end == t + 1 && j >= 0 && j <= size.window ? j : -1;
}

// Returns how far each window moves from frame t to t + 1, at most `most`.
template <typename C>
FASTASR_INLINE int64_t moves(const BandSequence<C>* sequences, int64_t count, int64_t t, int64_t most,
                             BitVector<C>& by) {
  alignas(64) typename Bits<C>::integer move[Lanes<C>::count] = {};
  int64_t farthest = 0;
  for (int64_t l = 0; l < count; l++) {
    const int64_t d = std::min(sequences[l].starts[t + 1] - sequences[l].starts[t], most);
    move[l] = static_cast<typename Bits<C>::integer>(d);
    farthest = std::max(farthest, d);
  }
  std::memcpy(&by, move, sizeof(by));
  return farthest;
}

template <typename C, bool kKeep>
void band_forward_lanes(const BandSize& size, BandSequence<C>* sequences, int64_t count, C* shares, C* scratch) {
  constexpr int n = Lanes<C>::count;
  const int64_t window = size.window, rows = window + 1;
  C *const m = scratch, *const e = m + rows * n, *const xs = e + rows * n, *const ys = xs + rows * n;
  const C none = -std::numeric_limits<C>::infinity();
  int64_t first = size.frames, last = 0;
  for (int64_t l = 0; l < count; l++) {
    const BandSequence<C>& q = sequences[l];
    first = std::min(first, q.t_begin), last = std::max(last, std::min(q.t_end + 1, size.frames));
    sequences[l].score = none;
  }
  if constexpr (kKeep)
    for (int64_t i = 0; i < size.frames * rows; i++)
      if (i < first * rows || i >= last * rows) put(shares + i * kBandLanes, Vector<C>{});
  for (int64_t i = 0; i < rows * n; i += n) {
    put(m + i, vector_of<C>(1)), put(e + i, vector_of(kFloor<C>));
    put(xs + i, vector_of(none)), put(ys + i, vector_of(none));
  }
  Vector<C> bad{};  // becomes a NaN where one was read
  for (int64_t t = first; t < last; t++) {
    C* const kept = shares + t * rows * kBandLanes;
    for (int64_t l = 0; l < count; l++) {
      const BandSequence<C>& q = sequences[l];
      const BandArcs arcs = BandArcs::at(size, q, t);
      const C *const x = q.x + t * window, *const y = q.y + t * window;
      for (int64_t r = 0; r < window; r++) xs[r * n + l] = r >= arcs.low && r < arcs.symbols ? x[r] : none;
      for (int64_t r = 0; r < window; r++) ys[r * n + l] = r >= arcs.low && r < arcs.blanks ? y[r] : none;
      if (t == q.t_begin && in_window(size, q, t, q.s_begin)) {
        const int64_t at_row = (q.s_begin - q.starts[t]) * n + l;
        m[at_row] = 1, e[at_row] = 0;
      }
    }
    if (!size.modified) {  // along the frame
      if constexpr (kKeep) put(kept, Vector<C>{}), put(kept + window * kBandLanes, Vector<C>{});
      Vector<C> pm = at(m), pe = at(e);
      for (int64_t r = 1; r < window; r++) {
        Vector<C> xm, xe;
        split<C>(at(xs + (r - 1) * n), xm, xe);
        bad += xm - xm;
        xm *= pm, xe += pe;
        const Vector<C> ce = at(e + r * n), top = xe > ce ? xe : ce;
        const Vector<C> symbol = xm * power_of_two<C>(xe - top);
        pm = at(m + r * n) * power_of_two<C>(ce - top) + symbol;
        pe = top;
        if constexpr (kKeep) put(kept + r * kBandLanes, symbol / pm);
        if (r % 16 == 0) normalise<C>(pm, pe);  // a sum of many grows
        put(m + r * n, pm), put(e + r * n, pe);
      }
    }
    for (int64_t l = 0; l < count; l++) {
      BandSequence<C>& q = sequences[l];
      if (q.t_end == t && in_window(size, q, t, q.s_end)) {
        const int64_t at_row = (q.s_end - q.starts[t]) * n + l;
        q.score = logarithm(m[at_row], e[at_row]);
      }
    }
    if (size.modified) {  // a[j], from the top: it needs cells j and j - 1
      Vector<C> pm = vector_of<C>(1), pe = vector_of(kFloor<C>);
      Vector<C> ym = vector_of<C>(1), ye = vector_of(kImpossible<C>);
      for (int64_t j = window; j >= 0; j--) {
        const Vector<C> cm = pm, ce = pe;  // cell j and its blank
        const Vector<C> bm = cm * ym, be = ce + ye;
        Vector<C> xm = vector_of<C>(1), xe = vector_of(kImpossible<C>);
        if (j > 0) {
          pm = at(m + (j - 1) * n), pe = at(e + (j - 1) * n);
          split<C>(at(xs + (j - 1) * n), xm, xe);
          split<C>(at(ys + (j - 1) * n), ym, ye);
          bad += (xm - xm) + (ym - ym);
          xm *= pm, xe += pe;
        }
        const Vector<C> top = xe > be ? xe : be;
        const Vector<C> symbol = xm * power_of_two<C>(xe - top);
        Vector<C> am = bm * power_of_two<C>(be - top) + symbol, ae = top;
        if constexpr (kKeep) put(kept + j * kBandLanes, symbol / am);
        normalise<C>(am, ae);
        put(m + j * n, am), put(e + j * n, ae);
      }
    } else {
      for (int64_t r = 0; r < window; r++) {
        Vector<C> ym, ye;
        split<C>(at(ys + r * n), ym, ye);
        bad += ym - ym;
        Vector<C> am = at(m + r * n) * ym, ae = at(e + r * n) + ye;
        normalise<C>(am, ae);
        put(m + r * n, am), put(e + r * n, ae);
      }
      put(m + window * n, vector_of<C>(1)), put(e + window * n, vector_of(kFloor<C>));
    }
    for (int64_t l = 0; l < count; l++)
      if (const int64_t j = leaves_at(size, sequences[l], t); j >= 0)
        sequences[l].score = logarithm(m[j * n + l], e[j * n + l]);
    if (t + 1 == last) break;
    BitVector<C> by;
    const int64_t farthest = moves(sequences, count, t, rows, by);
    for (int64_t step = 1; step <= farthest; step *= 2) {
      const BitVector<C> moved = (by & static_cast<typename Bits<C>::integer>(step)) != 0;
      for (int64_t r = 0; r < rows; r++) {
        const bool there = r + step < rows;
        const Vector<C> from_m = there ? at(m + (r + step) * n) : vector_of<C>(1);
        const Vector<C> from_e = there ? at(e + (r + step) * n) : vector_of(kFloor<C>);
        put(m + r * n, moved ? from_m : at(m + r * n));
        put(e + r * n, moved ? from_e : at(e + r * n));
      }
    }
  }
  for (int64_t l = 0; l < count; l++) {
    BandSequence<C>& q = sequences[l];
    if (q.s_begin == q.s_end && q.t_begin == q.t_end) q.score = 0;
    if (bad[l] != bad[l]) q.score = std::numeric_limits<C>::quiet_NaN();
  }
}

// Sets dx and dy of a sequence to a constant inside the boundary and to 0 outside, for frames [from, to).
template <typename C>
void fill_band(const BandSize& size, const BandSequence<C>& q, int64_t from, int64_t to, C constant) {
  for (int64_t t = from; t < to; t++) {
    const BandArcs arcs = BandArcs::at(size, q, t);
    for (int64_t r = 0; r < size.window; r++) {
      q.dx[t * size.window + r] = r >= arcs.low && r < arcs.symbols ? constant : C(0);
      q.dy[t * size.window + r] = r >= arcs.low && r < arcs.blanks ? constant : C(0);
    }
  }
}

template <typename C>
void band_backward_lanes(const BandSize& size, const BandSequence<C>* sequences, int64_t count, const C* shares,
                         C* scratch) {
  constexpr int n = Lanes<C>::count;
  const int64_t window = size.window, rows = window + 1;
  C *const g = scratch, *const xs = g + rows * n, *const ys = xs + rows * n;
  alignas(64) C ends[n] = {};  // what each end receives
  int64_t first = size.frames, last = 0;
  for (int64_t l = 0; l < count; l++) {
    const BandSequence<C>& q = sequences[l];
    ends[l] = std::isfinite(q.score) ? q.grad : C(0);
    first = std::min(first, q.t_begin), last = std::max(last, std::min(q.t_end + 1, size.frames));
  }
  for (int64_t i = 0; i < rows * n; i += n) put(g + i, Vector<C>{}), put(xs + i, Vector<C>{}), put(ys + i, Vector<C>{});
  for (int64_t t = last - 1; t >= first; t--) {
    const C* const kept = shares + t * rows * kBandLanes;
    for (int64_t l = 0; l < count; l++) {
      const BandSequence<C>& q = sequences[l];
      const int64_t j = leaves_at(size, q, t);
      if (j >= 0 && !in_window(size, q, t + 1, q.s_end)) g[j * n + l] += ends[l];
    }
    // g: the cells that frame t leads to
    if (size.modified) {
      Vector<C> blank = at(g) - at(g) * at(kept);
      for (int64_t j = 1; j < rows; j++) {
        const Vector<C> whole = at(g + j * n), symbol = whole * at(kept + j * kBandLanes);
        put(xs + (j - 1) * n, symbol);
        put(ys + (j - 1) * n, blank);
        put(g + (j - 1) * n, symbol + blank);
        blank = whole - symbol;
      }
    } else {
      for (int64_t r = 0; r < window; r++) put(ys + r * n, at(g + r * n));
    }
    put(g + window * n, Vector<C>{});
    for (int64_t l = 0; l < count; l++) {
      const BandSequence<C>& q = sequences[l];
      if (q.t_end == t && in_window(size, q, t, q.s_end)) g[(q.s_end - q.starts[t]) * n + l] += ends[l];
    }
    if (!size.modified) {
      Vector<C> whole = at(g + (window - 1) * n);
      for (int64_t r = window - 1; r > 0; r--) {
        const Vector<C> symbol = whole * at(kept + r * kBandLanes);
        put(xs + (r - 1) * n, symbol);
        put(g + r * n, whole - symbol);
        whole = at(g + (r - 1) * n) + symbol;
      }
      put(g, whole);
    }
    for (int64_t l = 0; l < count; l++) {
      const BandSequence<C>& q = sequences[l];
      C *const dx = q.dx + t * window, *const dy = q.dy + t * window;
      const bool begun = t >= q.t_begin;
      for (int64_t r = 0; r < window; r++) dx[r] = begun ? xs[r * n + l] : C(0);
      for (int64_t r = 0; r < window; r++) dy[r] = begun ? ys[r * n + l] : C(0);
    }
    if (t == first) break;
    BitVector<C> by;
    const int64_t farthest = moves(sequences, count, t - 1, rows, by);
    for (int64_t step = 1; step <= farthest; step *= 2) {
      const BitVector<C> moved = (by & static_cast<typename Bits<C>::integer>(step)) != 0;
      for (int64_t r = rows - 1; r >= 0; r--) {
        const Vector<C> from = r >= step ? at(g + (r - step) * n) : Vector<C>{};
        put(g + r * n, moved ? from : at(g + r * n));
      }
    }
  }
  for (int64_t l = 0; l < count; l++) {
    const BandSequence<C>& q = sequences[l];
    fill_band(size, q, 0, std::min(first, last), C(0));
    fill_band(size, q, last, size.frames, C(0));
    if (std::isnan(q.score)) fill_band(size, q, 0, size.frames, q.score);
  }
}

template <typename C>
void forward(const BandSize& size, BandSequence<C>* sequences, int64_t count, C* shares, C* scratch) {
  for (int64_t l = 0; l < (shares ? kBandLanes : count); l += Lanes<C>::count) {
    const int64_t here = std::clamp<int64_t>(count - l, 0, Lanes<C>::count);
    if (shares)
      band_forward_lanes<C, true>(size, sequences + l, here, shares + l, scratch);
    else
      band_forward_lanes<C, false>(size, sequences + l, here, nullptr, scratch);
  }
}

template <typename C>
void backward(const BandSize& size, const BandSequence<C>* sequences, int64_t count, const C* shares, C* scratch) {
  for (int64_t l = 0; l < count; l += Lanes<C>::count)
    band_backward_lanes<C>(size, sequences + l, std::min<int64_t>(count - l, Lanes<C>::count), shares + l, scratch);
}

}  // namespace

FASTASR_KERNELS_COMPUTE(PrunedLatticeKernels, .forward = forward<T>, .backward = backward<T>)

}  // namespace fastasr::cpu
