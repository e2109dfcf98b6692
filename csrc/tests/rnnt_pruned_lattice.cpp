// SPDX-License-Identifier: Apache-2.0
#include "cpu/rnnt/rnnt_pruned_lattice.h"

#include "cpu/rnnt/rnnt_lattice.h"
#include "tests/lattice_case.h"

namespace fastasr::test {
namespace {

using cpu::BandSequence;
using cpu::BandSize;
using cpu::kBandLanes;

// Compares each of a batch of bands with the whole lattice that holds it among minus infinities, in double.
template <typename C>
struct Batch {
  BandSize size;
  int64_t count, step, elements = size.frames * size.window;
  Random random{static_cast<uint64_t>(size.frames * 1000 + size.window * 10 + step)};
  Buffer<C> x{count * elements, 1, random, 1, -1}, y{count * elements, 3, random, 1, -1};
  Buffer<C> dx{count * elements, 2}, dy{count * elements, 1};
  std::vector<int64_t> starts;
  std::vector<BandSequence<C>> sequences;

  Batch(int64_t count_, int64_t frames, int64_t window, bool modified, int64_t step_)
      : size{frames, window, modified}, count(count_), step(step_), starts(static_cast<size_t>(count * frames)) {
    const auto draw = [&](int64_t most) { return static_cast<int64_t>(random.uniform() * double(most + 1)); };
    for (int64_t b = 0; b < count; b++) {
      int64_t* start = starts.data() + b * frames;
      for (int64_t t = 0; t < frames; t++) start[t] = t ? start[t - 1] + draw(step) : draw(b % 4 == 0 ? 2 : 0);
      BandSequence<C> q{};
      q.starts = start;
      q.t_end = b % 5 ? frames : draw(frames);
      q.t_begin = b % 3 ? 0 : draw(q.t_end) / 2;
      const int64_t low = q.t_begin < frames && frames ? start[q.t_begin] : 0;
      const int64_t high = q.t_end > 0 ? start[q.t_end - 1] : 0;
      q.s_begin = b % 3 ? 0 : low;
      q.s_end = std::max(q.s_begin, high + draw(window));
      q.x = x + b * elements, q.y = y + b * elements;
      q.dx = dx + b * elements, q.dy = dy + b * elements;
      q.grad = make<C>(1 + double(b % 3));
      sequences.push_back(q);
    }
  }

  void run() {
    const auto& kernel = cpu::kernels<cpu::PrunedLatticeKernels<C>>();
    Aligned<C> shares(cpu::band_shares(size)), scratch(cpu::band_scratch(size));
    for (int64_t first = 0; first < count; first += kBandLanes) {
      const int64_t here = std::min(kBandLanes, count - first);
      kernel.forward(size, sequences.data() + first, here, static_cast<C*>(nullptr), scratch);
      std::vector<C> alone;
      for (int64_t l = 0; l < here; l++) alone.push_back(sequences[first + l].score);
      kernel.forward(size, sequences.data() + first, here, shares, scratch);
      for (int64_t l = 0; l < here; l++)
        CHECK(same_bits(alone[l], sequences[first + l].score), "%s: keeping shares changes the score", Type<C>::name);
      for (int64_t i = 0; i < cpu::band_shares(size); i++) {
        const int64_t l = i % kBandLanes;
        if (l < here && std::isnan(value(sequences[first + l].score))) continue;
        CHECK(shares[i] >= 0 && shares[i] <= 1, "%s: share %ld is %g", Type<C>::name, long(i), double(shares[i]));
      }
      kernel.backward(size, sequences.data() + first, here, shares, scratch);
    }
  }

  void compare(const BandSequence<C>& q) {
    INFO(Type<C>::name, size.modified ? " modified" : " regular", ", ", size.frames, " frames, window ", size.window);
    const int64_t frames = size.frames, window = size.window, extent = q.t_end - q.t_begin;
    const cpu::LatticeSize whole{q.s_end - q.s_begin, extent, !size.modified};
    const int64_t symbols = whole.symbols, columns = whole.columns();
    std::vector<double> wx(static_cast<size_t>(symbols * columns), -kInf), wdx(wx.size(), 0);
    std::vector<double> wy(static_cast<size_t>((symbols + 1) * extent), -kInf), wdy(wy.size(), 0);
    const auto each = [&](const auto& f) {  // every arc of the band, and whether the boundary holds it
      for (int64_t t = 0; t < frames; t++)
        for (int64_t r = 0; r < window; r++) {
          const int64_t s = q.starts[t] + r - q.s_begin, at = t - q.t_begin;
          const bool row = s >= 0 && at >= 0;
          f(t * window + r, row && s < symbols && at < columns && (size.modified || r + 1 < window),
            row && s <= symbols && at < extent, static_cast<size_t>(std::max<int64_t>(0, s * columns + at)),
            static_cast<size_t>(std::max<int64_t>(0, s * extent + at)));
        }
    };
    each([&](int64_t i, bool has_x, bool has_y, size_t ix, size_t iy) {
      if (has_x) wx[ix] = value(q.x[i]);
      if (has_y) wy[iy] = value(q.y[i]);
    });
    Aligned<double> shares(whole.steps() * cpu::lattice_row(whole)), scratch(cpu::lattice_scratch(symbols));
    const double score = cpu::kernels<cpu::LatticeKernels<double>>().forward(whole, wx.data(), columns, wy.data(),
                                                                             extent, shares, scratch);
    const double allowed = sizeof(C) == 8 ? 1e-12 : 1e-5;
    EXPECT_WITHIN(&q.score, 0, score, allowed * (1 + std::fabs(score)));
    if (std::isfinite(score))
      cpu::kernels<cpu::LatticeKernels<double>>().backward(whole, 1.0, shares, wdx.data(), columns, wdy.data(), extent,
                                                           scratch);
    each([&](int64_t i, bool has_x, bool has_y, size_t ix, size_t iy) {
      const double ex = has_x ? wdx[ix] * q.grad : 0, ey = has_y ? wdy[iy] * q.grad : 0;
      EXPECT_WITHIN(q.dx, i, ex, allowed);
      EXPECT_WITHIN(q.dy, i, ey, allowed);
    });
  }
};

template <typename C>
void all() {
  for (const bool modified : {false, true})
    for (const int64_t count : {1, 3, 16, 19, 37})
      for (const int64_t frames : {0, 1, 2, 9, 40})
        for (const int64_t window : {1, 2, 5, 17})
          for (const int64_t step : {0, 1, 3, 40}) {
            if (count > 19 && frames < 9) continue;
            Batch<C> batch(count, frames, window, modified, step);
            batch.run();
            for (const auto& q : batch.sequences) batch.compare(q);
          }
  // the window is so wide that a frame's sum grows past a float's exponent unless it is brought back
  Batch<C> wide(2, 3, 400, false, 0);
  wide.x.fill(*std::make_unique<Random>(5), 0.1, 1);
  wide.run();
  for (const auto& q : wide.sequences) wide.compare(q);
  for (const double special : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()})
    for (const bool modified : {false, true}) {
      Batch<C> batch(19, 12, 4, modified, 1);
      batch.sequences[18].t_begin = 0, batch.sequences[18].s_begin = 0, batch.sequences[18].t_end = 12;
      batch.sequences[18].s_end = batch.starts[18 * 12 + 11];
      batch.x[17 * batch.elements + 1] = make<C>(special);
      batch.y[18 * batch.elements + 5] = make<C>(special);
      batch.run();
      CHECK(std::isnan(value(batch.sequences[17].score)), "%s: %g in x is lost", Type<C>::name, special);
      CHECK(std::isnan(value(batch.sequences[18].score)), "%s: %g in y is lost", Type<C>::name, special);
      for (int64_t b = 0; b < 17; b++) batch.compare(batch.sequences[b]);
    }
}

}  // namespace

TEST_CASE("rnnt_pruned_lattice") {
  all<float>();
  all<double>();
}

}  // namespace fastasr::test
