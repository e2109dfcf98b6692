// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/tdt_lattice.h"

#include <bit>

#include "cpu/rnnt/scaled_number.simd.h"

// Frame by frame; lanes are neighbouring u. An arc is read once, when the frame that it leads to is computed. Arcs of
// duration 0 lead from u - 1 to u within a frame: a scan of plain numbers, which follows the vectors.
namespace fastasr::cpu {
namespace {

template <typename C>
struct Numbers {
  C *m, *e;
};

template <typename C>
FASTASR_INLINE C one_power_of_two(C d) {
  using U = std::make_unsigned_t<typename Bits<C>::integer>;
  const C least = -Bits<C>::bias;
  return std::bit_cast<C>(std::bit_cast<U>((d > least ? d : least) + (Bits<C>::magic + Bits<C>::bias))
                          << Bits<C>::mantissa);
}

template <typename C>
FASTASR_INLINE void normalise_one(C& m, C& e) {
  using U = std::make_unsigned_t<typename Bits<C>::integer>;
  const U b = std::bit_cast<U>(m), fraction = (U{1} << Bits<C>::mantissa) - 1;
  e += static_cast<C>(static_cast<int64_t>(b >> Bits<C>::mantissa) - Bits<C>::bias);
  m = std::bit_cast<C>((b & fraction) | static_cast<U>(Bits<C>::bias) << Bits<C>::mantissa);
  e = e > kFloor<C> ? e : kFloor<C>;
}

template <typename C>
FASTASR_INLINE bool unfit(const C* p, int64_t count) {
  int found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t i = 0; i < count; i++) found |= !(p[i] < std::numeric_limits<C>::infinity());
  return found != 0;
}

// Writes a[u] + z[u count], the log weights of the arcs of one duration, and -infinity behind the last.
template <typename C>
FASTASR_INLINE void weigh(const C* __restrict a, const C* __restrict z, int64_t count, int64_t cells, int64_t end,
                          C* __restrict out) {
  for (int64_t u = 0; u < cells; u++) out[u] = a[u] + z[u * count];
  for (int64_t u = cells; u < end; u++) out[u] = -std::numeric_limits<C>::infinity();
}

// Adds the arcs with these weights from cells `from` to `to`, and writes the numbers that it adds.
template <typename C>
FASTASR_INLINE void add_arcs(const C* weights, int64_t cells, Numbers<C> from, Numbers<C> to, Numbers<C> added) {
  for (int64_t u = 0; u < cells; u += Lanes<C>::count) {
    Vector<C> m, e;
    split<C>(at(weights + u), m, e);
    m *= at(from.m + u), e += at(from.e + u);
    put(added.m + u, m), put(added.e + u, e);
    const Vector<C> before = at(to.e + u), top = e > before ? e : before;
    put(to.m + u, at(to.m + u) * power_of_two<C>(before - top) + m * power_of_two<C>(e - top));
    put(to.e + u, top);
  }
}

template <typename C>
C forward(const TdtSize& size, const C* x, const C* y, const C* z, C* shares, C* scratch) {
  constexpr int n = Lanes<C>::count;
  const int64_t symbols = size.symbols, cells = symbols + 1, count = size.count, window = size.window();
  const int64_t kept = tdt_row(size.row), row = kept + 16, end = (cells + n - 1) / n * n;
  if (shares) std::fill(shares, shares + size.frames * 2 * count * kept, C(0));
  for (int64_t t = 0; t < size.frames; t++)
    if (unfit(x + t * (size.row - 1), symbols) || unfit(y + t * size.row, cells) ||
        unfit(z + t * size.row * count, cells * count))
      return std::numeric_limits<C>::quiet_NaN();
  const auto cells_of = [&](int64_t t) {
    C* const at = scratch + t % window * 2 * row;
    return Numbers<C>{at, at + row};
  };
  C *const terms = scratch + window * 2 * row, *const weights = terms + 4 * count * row;
  const auto term = [&](int64_t arc) { return Numbers<C>{terms + 2 * arc * row, terms + (2 * arc + 1) * row}; };
  for (int64_t t = 0; t <= size.frames; t++) {
    const bool last = t == size.frames;  // blanks alone end a path
    const Numbers<C> p = cells_of(t);
    std::fill(p.m, p.m + row, C(1));
    std::fill(p.e, p.e + row, kFloor<C>);
    if (t == 0) p.e[0] = 0;
    int64_t within = -1;  // the duration 0
    for (int64_t i = 0; i < count; i++) {
      const int64_t d = size.durations[i], from = t - d;
      if (d == 0) within = i;
      if (d == 0 || from < 0) continue;
      const C* const at = z + from * size.row * count + i;
      weigh(y + from * size.row, at, count, cells, end, weights);
      add_arcs<C>(weights, cells, cells_of(from), p, term(i));
      if (last) continue;
      weigh(x + from * (size.row - 1), at, count, symbols, end, weights);
      add_arcs<C>(weights, symbols, cells_of(from), {p.m + 1, p.e + 1}, term(count + i));
    }
    for (int64_t u = 0; u < end; u += n) {
      Vector<C> m = at(p.m + u), e = at(p.e + u);
      normalise<C>(m, e);
      put(p.m + u, m), put(p.e + u, e);
    }
    if (within >= 0 && !last) {
      const Numbers<C> added = term(count + within);
      weigh(x + t * (size.row - 1), z + t * size.row * count + within, count, symbols, end, weights);
      for (int64_t u = 0; u < symbols; u += n) {
        Vector<C> m, e;
        split<C>(at(weights + u), m, e);
        put(added.m + u, m), put(added.e + u, e);
      }
      C m = p.m[0], e = p.e[0];
      for (int64_t u = 0; u < symbols; u++) {
        added.m[u] *= m, added.e[u] += e;
        const C other = p.e[u + 1], top = other > added.e[u] ? other : added.e[u];
        m = p.m[u + 1] * one_power_of_two(other - top) + added.m[u] * one_power_of_two(added.e[u] - top);
        e = top;
        normalise_one(m, e);
        p.m[u + 1] = m, p.e[u + 1] = e;
      }
    }
    for (int64_t arc = 0; shares && arc < 2 * count; arc++) {
      const bool symbol = arc >= count;
      const int64_t from = t - size.durations[symbol ? arc - count : arc], leads = symbol ? symbols : cells;
      if (from < 0 || (symbol ? last : from == t)) continue;
      C* const out = shares + (from * 2 * count + arc) * kept;
      const Numbers<C> added = term(arc), to{p.m + symbol, p.e + symbol};
      for (int64_t u = 0; u < leads; u += n) {
        // a cell's mantissa is normalised, an arc's is 0.7 at least: its power is higher by at most 1
        Vector<C> power = at(added.e + u) - at(to.e + u) - static_cast<C>(1);
        power = power < Vector<C>{} ? power : Vector<C>{};
        const Vector<C> share = at(added.m + u) * (power_of_two<C>(power) * static_cast<C>(2)) / at(to.m + u);
        for (int j = 0; j < n && u + j < leads; j++) out[u + j] = share[j];
      }
    }
  }
  const Numbers<C> p = cells_of(size.frames);
  return logarithm(p.m[symbols], p.e[symbols]);
}

template <typename C>
void backward(const TdtSize& size, C grad, const C* shares, C* dx, C* dy, C* dz, C* scratch) {
  const int64_t symbols = size.symbols, cells = symbols + 1, count = size.count, window = size.window();
  const int64_t kept = tdt_row(size.row), row = kept + 16;
  std::fill(scratch, scratch + window * row, C(0));
  const auto mass_of = [&](int64_t t) { return scratch + t % window * row; };
  mass_of(size.frames)[symbols] = grad;
  for (int64_t t = size.frames - 1; t >= 0; t--) {
    C* const g = mass_of(t);
    C *const to_x = dx + t * (size.row - 1), *const to_y = dy + t * size.row, *const to_z = dz + t * size.row * count;
    std::fill(to_x, to_x + symbols, C(0));
    std::fill(to_y, to_y + cells, C(0));
    std::fill(g, g + cells, C(0));
    int64_t within = -1;
    for (int64_t i = 0; i < count; i++) {
      const int64_t d = size.durations[i];
      const C* const blank = shares + (t * 2 * count + i) * kept;
      const C* const symbol = blank + count * kept;
      const bool leads = t + d <= size.frames;
      if (d == 0) within = i;
      if (d == 0 || !leads) {
        for (int64_t u = 0; u < cells; u++) to_z[u * count + i] = 0;
        continue;
      }
      const C* const mass = mass_of(t + d);
#pragma omp simd
      for (int64_t u = 0; u < cells; u++) {
        const C by_blank = blank[u] * mass[u], all = by_blank + symbol[u] * mass[u + 1];
        to_y[u] += by_blank;
        g[u] += all;
        to_z[u * count + i] = all;
      }
#pragma omp simd
      for (int64_t u = 0; u < symbols; u++) to_x[u] += symbol[u] * mass[u + 1];
    }
    if (within < 0) continue;
    const C* const symbol = shares + (t * 2 * count + count + within) * kept;
    for (int64_t u = symbols - 1; u >= 0; u--) {
      const C d = symbol[u] * g[u + 1];
      g[u] += d;
      to_x[u] += d;
      to_z[u * count + within] = d;
    }
  }
}

}  // namespace

FASTASR_KERNELS_COMPUTE(TdtLatticeKernels, .forward = forward<T>, .backward = backward<T>)

}  // namespace fastasr::cpu
