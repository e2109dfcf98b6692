// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/rnnt_lattice.h"

#include <algorithm>

#include "cpu/rnnt/scaled_number.simd.h"

// Lanes are neighbouring s. A transposition in registers turns N steps of N rows at a time into steps of N cells, and
// back, X by the s a symbol leads to: there are no gathers. The forward pass goes step by step over blocks [step][s] in
// the first cache. The backward pass keeps N steps of a vector of cells in registers.
namespace fastasr::cpu {
namespace {

template <typename C, size_t... kJ>
FASTASR_INLINE Vector<C> previous_lane(Vector<C> before, Vector<C> v, std::index_sequence<kJ...>) {
  return __builtin_shufflevector(before, v, (Lanes<C>::count - 1 + static_cast<int>(kJ))...);
}
template <typename C, size_t... kJ>
FASTASR_INLINE Vector<C> next_lane(Vector<C> v, Vector<C> after, std::index_sequence<kJ...>) {
  return __builtin_shufflevector(v, after, (1 + static_cast<int>(kJ))...);
}

// Loads columns t to t + N - 1 of a row whose ends lie among them. It is not inlined: sixteen copies of it do not fit
// in the instruction cache beside the rest.
template <typename C>
__attribute__((noinline)) Vector<C> load_edge(const C* from, int64_t t, int64_t columns) {
  alignas(64) C part[Lanes<C>::count];
  for (int j = 0; j < Lanes<C>::count; j++)
    part[j] = t + j >= 0 && t + j < columns ? from[t + j] : -std::numeric_limits<C>::infinity();
  return at(part);
}
template <typename C>
__attribute__((noinline)) void store_edge(C* to, int64_t t, int64_t columns, Vector<C> v) {
  alignas(64) C part[Lanes<C>::count];
  put(part, v);
  for (int j = 0; j < Lanes<C>::count; j++)
    if (t + j >= 0 && t + j < columns) to[t + j] = part[j];
}

// Memory is prefetched this many steps ahead: there are more rows than the hardware follows. Waiting for
// the shares of 40 sequences of 100 symbols took half of the backward pass and a seventh of the forward pass.
constexpr int64_t kAhead = 32;
constexpr int64_t kSharesAhead = 16;  // rows

// Loads N rows from `row` on of a matrix (rows, columns), N columns of row i from first - i * skew on, and transposes
// them; elements outside are -inf. Results are `stride` vectors apart.
template <typename C>
FASTASR_INLINE void load_steps(const C* p, int64_t distance, int64_t row, int64_t rows, int64_t first, int64_t skew,
                               int64_t columns, C* out, int64_t stride) {
  constexpr int n = Lanes<C>::count;
  const C none = -std::numeric_limits<C>::infinity();
  Vector<C> r[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; i++) {
    const int64_t at_row = row + i, t = first - i * skew;
    if (at_row < 0 || at_row >= rows || t >= columns || t + n <= 0) {
      r[i] = vector_of(none);
    } else if (t >= 0 && t + n <= columns) {
      __builtin_prefetch(p + at_row * distance + t + kAhead);
      r[i] = at(p + at_row * distance + t);
    } else {
      r[i] = load_edge(p + at_row * distance, t, columns);
    }
  }
  transpose<C>(r);
#pragma GCC unroll 16
  for (int i = 0; i < n; i++) put(out + i * stride, r[i]);
}

// Stores the transposition of N vectors as N rows.
template <typename C>
FASTASR_INLINE void store_rows(C* p, int64_t distance, int64_t row, int64_t rows, int64_t first, int64_t skew,
                               int64_t columns, const Vector<C>* r) {
  constexpr int n = Lanes<C>::count;
#pragma GCC unroll 16
  for (int i = 0; i < n; i++) {
    const int64_t at_row = row + i, t = first - i * skew;
    if (at_row < 0 || at_row >= rows || t >= columns || t + n <= 0) continue;
    C* to = p + at_row * distance;
    if (t >= 0 && t + n <= columns) {
      __builtin_prefetch(to + t - kAhead, 1);
      put(to + t, r[i]);
    } else {
      store_edge(to, t, columns, r[i]);
    }
  }
}

// Loads N steps from `first` on, step 1 being the first that has incoming arcs, and the vectors whose cells they reach.
struct LatticeBlock {
  int64_t first, steps, low, high;
  FASTASR_INLINE LatticeBlock at(const LatticeSize& size, int64_t first, int64_t n) {
    const int64_t left = size.steps() + 1 - first, top = size.symbols / n;
    if (!size.regular) return {first, std::min(n, left), 0, top};
    return {first, std::min(n, left), std::max<int64_t>(0, first - size.frames) / n,
            std::min(size.symbols, first + n - 1) / n};
  }
};

template <typename C, bool kKeep>
C forward_steps(const LatticeSize& size, const C* x, int64_t x_row, const C* y, int64_t y_row, C* shares, C* scratch) {
  constexpr int n = Lanes<C>::count;
  const auto lanes = std::make_index_sequence<n>();
  const int64_t vectors = size.symbols / n + 1, row = vectors * n, skew = size.regular;
  const int64_t kept_row = lattice_row(size);
  // p and its powers, after a vector of impossible cells before s = 0
  C *const m = scratch + n, *const e = m + row + n, *const xs = e + row, *const ys = xs + n * row;
  for (int64_t v = -n; v < row; v += n) put(m + v, vector_of<C>(1)), put(e + v, vector_of(kFloor<C>));
  e[0] = 0;
  for (int64_t first = 1; first <= size.steps(); first += n) {
    const LatticeBlock b = LatticeBlock::at(size, first, n);
    for (int64_t v = b.low; v <= b.high; v++) {
      const int64_t s = v * n;
      load_steps(x, x_row, s - 1, size.symbols, first - (size.regular ? s : 1), skew, size.columns(), xs + s, row);
      load_steps(y, y_row, s, size.symbols + 1, first - 1 - s * skew, skew, size.frames, ys + s, row);
    }
    for (int64_t j = 0; j < b.steps; j++) {
      C* const kept = shares + (first - 1 + j) * kept_row;
      if constexpr (kKeep)  // no cells there: zeros, so that kept values repeat bit for bit
        for (int64_t s = (b.high - b.low + 1) * n; s < kept_row; s += n) put(kept + s, Vector<C>{});
      Vector<C> pm = at(m + b.high * n), pe = at(e + b.high * n);
      for (int64_t s = b.high * n; s >= b.low * n; s -= n) {
        const Vector<C> before_m = at(m + s - n), before_e = at(e + s - n);
        Vector<C> xm, xe, ym, ye;
        split<C>(at(xs + j * row + s), xm, xe);
        split<C>(at(ys + j * row + s), ym, ye);
        xm *= previous_lane<C>(before_m, pm, lanes);
        xe += previous_lane<C>(before_e, pe, lanes);
        ym *= pm;
        ye += pe;
        const Vector<C> top = xe > ye ? xe : ye;
        const Vector<C> symbol = xm * power_of_two<C>(xe - top);
        const Vector<C> sum = ym * power_of_two<C>(ye - top) + symbol;
        if constexpr (kKeep) {
          C* const share = kept + s - b.low * n;
          __builtin_prefetch(share + kSharesAhead * kept_row, 1);
          put(share, symbol / sum);
        }
        put(m + s, sum);
        put(e + s, top);
        pm = before_m, pe = before_e;
      }
    }
    for (int64_t s = b.low * n; s <= b.high * n; s += n) {
      Vector<C> vm = at(m + s), ve = at(e + s);
      normalise<C>(vm, ve);
      put(m + s, vm), put(e + s, ve);
    }
  }
  if (!size.regular)  // a NaN may stand in a cell that does not lead to the end
    for (int64_t s = 0; s < size.symbols; s++)
      if (m[s] != m[s]) return m[s];
  return logarithm(m[size.symbols], e[size.symbols]);
}

template <typename C>
C forward(const LatticeSize& size, const C* x, int64_t x_row, const C* y, int64_t y_row, C* shares, C* scratch) {
  return shares ? forward_steps<C, true>(size, x, x_row, y, y_row, shares, scratch)
                : forward_steps<C, false>(size, x, x_row, y, y_row, shares, scratch);
}

template <typename C>
void backward(const LatticeSize& size, C grad, const C* shares, C* dx, int64_t x_row, C* dy, int64_t y_row,
              C* scratch) {
  constexpr int n = Lanes<C>::count;
  const auto lanes = std::make_index_sequence<n>();
  const int64_t kept_row = lattice_row(size), skew = size.regular;
  C* const g = scratch;
  for (int64_t s = 0; s <= size.symbols; s += n) put(g + s, Vector<C>{});
  g[size.symbols] = grad;
  for (int64_t first = size.steps() - (size.steps() + n - 1) % n; first > 0; first -= n) {
    const LatticeBlock b = LatticeBlock::at(size, first, n);
    alignas(64) C above[2 * n]{};  // of each step: the symbol arcs from the first of the next vector of cells
    for (int64_t s = b.high * n; s >= b.low * n; s -= n) {
      Vector<C> symbol[n], blank[n], whole = at(g + s);
      const C* kept = shares + (first - 1) * kept_row + s - b.low * n;
#pragma GCC unroll 16
      for (int j = n - 1; j >= 0; j--) {
        symbol[j] = blank[j] = Vector<C>{};
        if (j >= b.steps) continue;  // steps behind the end are transposed, though never stored
        __builtin_prefetch(kept + (j - kSharesAhead) * kept_row);
        symbol[j] = whole * at(kept + j * kept_row);
        blank[j] = whole - symbol[j];
        whole = blank[j] + next_lane<C>(symbol[j], at(above + j), lanes);
      }
      put(g + s, whole);
      transpose<C>(symbol);
      put(above, symbol[0]);
      store_rows(dx, x_row, s - 1, size.symbols, first - (size.regular ? s : 1), skew, size.columns(), symbol);
      transpose<C>(blank);
      store_rows(dy, y_row, s, size.symbols + 1, first - 1 - s * skew, skew, size.frames, blank);
    }
    if (b.low > 0) g[b.low * n - 1] += above[0];  // in later steps no arc leads there
  }
}

}  // namespace

FASTASR_KERNELS_COMPUTE(LatticeKernels, .forward = forward<T>, .backward = backward<T>)

}  // namespace fastasr::cpu
