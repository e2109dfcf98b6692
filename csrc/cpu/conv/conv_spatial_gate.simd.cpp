// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/conv_spatial_gate.h"

#include <algorithm>
#include <cstring>

#include "cpu/conv/depthwise.simd.h"
#include "cpu/math/activation.h"

// Forward and backward work by stripes of channels. Rows of x lie 2 C elements apart, 12 KB at E-Branchformer's size,
// which no hardware prefetcher follows: the kernel prefetches what the next rows need.
namespace fastasr::cpu {
namespace {

static_assert(kStripe == kSpatialGateStripe);

// A block has this many frames: its rows, and 2 P + kTile more for the taps' reach, stay in the first or second cache.
constexpr int64_t kGateBlock = 64;

// The kernel prefetches this many rows ahead. Rows of 12 KB share their first-cache sets, so the prefetch fills the
// second cache; nearer rows would come too late.
constexpr int64_t kAhead = 48;

template <typename T>
class GateStripe {
 protected:
  using C = compute_t<T>;
  using Statistics = RowStatistics<C>;

  GateStripe(const ConvSpatialGate<T>& p, const Statistics* statistics)
      : p_(p),
        statistics_(statistics),
        pad_(p.pad()),
        first_tap_(std::max<int64_t>(0, pad_ + 1 - p.frames)),
        last_tap_(std::min(p.taps, pad_ + p.frames)),
        ring_rows_(kGateBlock + 2 * pad_ + 2 * kTile),
        taps_(p.taps),
        vectors_(3),
        u_(ring_rows_),
        z_(kGateBlock + kTile) {}

  void take(int64_t stripe) {
    first_ = stripe * kStripe, channels_ = std::min(kStripe, p_.channels - first_);
    stage_taps(p_.weight + first_ * p_.taps, channels_, p_.taps, taps_[0]);
    stage_vector(p_.bias, first_, channels_, vectors_[0]);
    stage_vector(p_.norm_weight, first_, channels_, vectors_[1]);
    stage_vector(p_.norm_bias, first_, channels_, vectors_[2]);
  }

  const T* input(int64_t b, int64_t t) const { return p_.x + b * p_.x_batch + t * p_.x_time + first_; }
  bool masked(int64_t b, int64_t t) const { return p_.mask && p_.mask[b * p_.frames + t]; }

  // Returns u of frames [t, t + n) of sequence b.
  __attribute__((noinline)) void stage(int64_t b, int64_t t, int64_t n, C* rows) {
    for (const int64_t end = t + n; t < end; t++, rows += kStripe) {
      if (t < 0 || t >= p_.frames || masked(b, t)) {
        clear_rows(rows, 1);
        continue;
      }
      if (t + kAhead < p_.frames) prefetch_row(input(b, t + kAhead) + p_.channels);
      const Statistics row = statistics_[b * p_.frames + t];
      const T* g = input(b, t) + p_.channels;
      if (channels_ == kStripe)
        normalise(g, row, kStripe, rows);
      else
        normalise(g, row, channels_, rows);
    }
  }

  // Computes z of the block's n frames, with its bias.
  template <typename F>
  void convolve_block(int64_t n, const F& ahead) {
    convolve(u_[first_tap_], taps_[first_tap_], last_tap_ - first_tap_, n, z_[0], ahead);
    C* __restrict z = z_[0];
    const C* __restrict bias = vectors_[0];
    for (int64_t i = 0; i < n; i++, z += kStripe) {
#pragma omp simd
      for (int64_t c = 0; c < kStripe; c++) z[c] += bias[c];
    }
  }

  const ConvSpatialGate<T>& p_;
  const Statistics* statistics_;
  const int64_t pad_;
  const int64_t first_tap_, last_tap_;  // other taps see no frame of sequences this short
  const int64_t ring_rows_;
  int64_t first_ = 0, channels_ = 0;
  Rows<C> taps_, vectors_, u_, z_;  // row r of u_ is frame t - P + r of the block that starts at t

 private:
  FASTASR_INLINE void normalise_row(const T* __restrict g, const Statistics& row, const C* __restrict weight,
                                    const C* __restrict bias, int64_t n, C* __restrict u) {
    const C high = row.high, low = row.low, scale = row.scale;
#pragma omp simd
    for (int64_t c = 0; c < n; c++) u[c] = ((load(g[c]) - high) - low) * scale * weight[c] + bias[c];
  }
  void normalise(const T* g, const Statistics& row, int64_t n, C* u) {
    normalise_row(g, row, vectors_[1], vectors_[2], n, u);
  }
};

template <typename T, typename C>
FASTASR_INLINE void gated_row(const T* __restrict r, const C* __restrict z, int64_t n, T* __restrict y) {
#pragma omp simd
  for (int64_t c = 0; c < n; c++) store(&y[c], static_cast<C>(load(r[c])) * z[c]);
}

template <typename T>
class GateForward : GateStripe<T> {
  using Base = GateStripe<T>;
  using Base::p_, Base::pad_, Base::u_, Base::z_, Base::first_, Base::channels_, Base::first_tap_;
  using typename Base::C;

 public:
  GateForward(const ConvSpatialGate<T>& p, const RowStatistics<C>* statistics) : Base(p, statistics) {}

  void run(T* y, int64_t begin, int64_t end) {
    for (int64_t task = begin, taken = -1; task < end; task++) {
      const int64_t stripe = task / p_.batch;
      if (stripe != taken) this->take(stripe), taken = stripe;
      sequence(task % p_.batch, y);
    }
  }

 private:
  void sequence(int64_t b, T* y) {
    const int64_t frames = p_.frames, reach = std::min(2 * pad_, pad_ + frames - 1);
    this->stage(b, first_tap_ - pad_, reach - first_tap_, u_[first_tap_]);
    for (int64_t t = 0; t < frames;) {
      const int64_t end = std::min(t + kGateBlock, frames), n = end - t;
      this->stage(b, t + reach - pad_, n, u_[reach]);
      T* to = y + (b * frames + t) * p_.channels + first_;
      this->convolve_block(n, [&](int64_t i) {
        for (int64_t j = i; j < std::min(i + kTile, n); j++) {
          prefetch_row(this->input(b, t + j));
          prefetch_row(to + j * p_.channels);
        }
      });
      if (p_.activation) activate(p_.activation, z_[0], n * kStripe);
      for (int64_t i = 0; i < n; i++) {
        const T* r = this->input(b, t + i);
        if (channels_ == kStripe)
          gated_row(r, z_[i], kStripe, to + i * p_.channels);
        else
          gated_row(r, z_[i], channels_, to + i * p_.channels);
      }
      if (end < frames) std::memmove(u_[0], u_[n], sizeof(C) * static_cast<size_t>(reach * kStripe));
      t = end;
    }
  }
};

// dr = grad z, q = grad r slope, where a null slope stands for 1; z is activated
template <bool kSlope, typename T, typename C>
FASTASR_INLINE void gate_gradients(const T* __restrict grad, const T* __restrict r, const C* __restrict z,
                                   const C* __restrict slope, int64_t n, T* __restrict dr, C* __restrict q) {
#pragma omp simd
  for (int64_t c = 0; c < n; c++) {
    const C g = load(grad[c]);
    store(&dr[c], g * z[c]);
    q[c] = kSlope ? g * load(r[c]) * slope[c] : g * load(r[c]);
  }
}

template <typename T>
class GateBackward : GateStripe<T> {
  using Base = GateStripe<T>;
  using Base::p_, Base::pad_, Base::u_, Base::z_, Base::first_, Base::channels_, Base::taps_, Base::ring_rows_;
  using typename Base::C;
  using typename Base::Statistics;

 public:
  struct Gradient {
    const T* grad;
    T* dx;
    C* du;
    int64_t du_row;
    C *dweight, *dbias;
  };

  GateBackward(const ConvSpatialGate<T>& p, const Statistics* statistics, const Gradient& g)
      : Base(p, statistics),
        g_(g),
        q_(ring_rows_),
        slope_(p.activation ? kGateBlock : 0),
        sums_(1 + whole_tiles(p.taps)) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t stripe = begin; stripe < end; stripe++) {
      this->take(stripe);
      sums_.clear();
      for (int64_t b = 0; b < p_.batch; b++) sequence(b);
      sums_.store(first_, channels_, p_.taps, g_.dweight, g_.dbias);
    }
  }

 private:
  const T* grad(int64_t b, int64_t t) const { return g_.grad + (b * p_.frames + t) * p_.channels + first_; }
  T* dr(int64_t b, int64_t t) const { return g_.dx + (b * p_.frames + t) * 2 * p_.channels + first_; }
  C* du(int64_t b, int64_t t) const { return g_.du + (b * p_.frames + t) * g_.du_row + first_; }

  // Row r of q_ is frame t - 2 P + r of the block that starts at t.
  void sequence(int64_t b) {
    const int64_t frames = p_.frames, reach = 2 * pad_;
    this->stage(b, -pad_, reach, u_[0]);
    clear_rows(q_[0], reach);
    for (int64_t t = 0; t < frames + pad_;) {
      const bool within = t < frames;
      const int64_t end = std::min(t + kGateBlock, within ? frames : frames + pad_), n = end - t;
      this->stage(b, t + pad_, n, u_[reach]);
      if (within) {
        output_gradients(b, t, n);
        sums_.add(0, q_[reach], n);
        add_tap_gradients(u_[0], q_[reach], n, p_.taps, sums_.part(1));
        sums_.carry(1, p_.taps);
      } else {
        clear_rows(q_[reach], n);
      }
      input_gradients(b, t, n);
      for (Rows<C>* ring : {&u_, &q_})
        std::memmove((*ring)[0], (*ring)[n], sizeof(C) * static_cast<size_t>(reach * kStripe));
      t = end;
    }
  }

  void output_gradients(int64_t b, int64_t t, int64_t n) {
    this->convolve_block(n, [&](int64_t i) {
      for (int64_t j = t + i; j < std::min(t + i + kTile, t + n); j++) {
        prefetch_row(this->input(b, j));
        prefetch_row(grad(b, j));
        prefetch_row(dr(b, j));
      }
    });
    if (p_.activation) activate_with_slope(p_.activation, z_[0], slope_[0], n * kStripe);
    C* q = q_[2 * pad_];
    for (int64_t i = 0; i < n; i++, q += kStripe) {
      const auto rows = p_.activation ? gate_gradients<true, T, C> : gate_gradients<false, T, C>;
      rows(grad(b, t + i), this->input(b, t + i), z_[i], slope_[i], channels_, dr(b, t + i), q);
    }
  }

  // These are frames [t - P, t + n - P): their gradient is complete.
  void input_gradients(int64_t b, int64_t t, int64_t n) {
    const int64_t start = t - pad_, low = std::max<int64_t>(start, 0), high = std::min(start + n, p_.frames);
    convolve_reversed(q_[0], taps_[0], p_.taps, n, z_[0], [&](int64_t i) {
      for (int64_t j = std::max(low, start + i); j < std::min(start + i + kTile, high); j++) prefetch_row(du(b, j));
    });
    for (int64_t i = low; i < high; i++) {
      C* __restrict to = du(b, i);
      const C* __restrict from = z_[i - start];
      const bool masked = this->masked(b, i);
#pragma omp simd
      for (int64_t c = 0; c < channels_; c++) to[c] = masked ? C(0) : from[c];
    }
  }

  const Gradient g_;
  Rows<C> q_, slope_;
  Sums<C> sums_;
};

template <typename T, typename C = compute_t<T>>
void forward(const ConvSpatialGate<T>& p, const RowStatistics<C>* statistics, T* y, int64_t begin, int64_t end) {
  if (begin < end) GateForward<T>(p, statistics).run(y, begin, end);
}

template <typename T, typename C = compute_t<T>>
void backward(const ConvSpatialGate<T>& p, const RowStatistics<C>* statistics, const T* grad, T* dx, C* du,
              int64_t du_row, C* dweight, C* dbias, int64_t begin, int64_t end) {
  if (begin < end) GateBackward<T>(p, statistics, {grad, dx, du, du_row, dweight, dbias}).run(begin, end);
}

template <typename T, typename C = compute_t<T>>
void statistics(const ConvSpatialGate<T>& p, RowStatistics<C>* out, int64_t begin, int64_t end, C* __restrict scratch) {
  for (int64_t i = begin; i < end; i++) {
    const T* __restrict g = p.gate(i);
    convert(g, scratch, p.channels);
    out[i] = centre(scratch, p.channels, p.eps);
  }
}

template <typename T, typename C = compute_t<T>>
void norm_backward(const ConvSpatialGate<T>& p, const RowStatistics<C>* statistics, const C* du, int64_t du_row, T* dx,
                   C* __restrict dweight, C* __restrict dbias, int64_t begin, int64_t end) {
  const int64_t n = p.channels;
  const C* __restrict w = p.norm_weight;
  for (int64_t j = 0; j < n; j++) dweight[j] = 0, dbias[j] = 0;
  for (int64_t i = begin; i < end; i++) {
    const T* __restrict g = p.gate(i);
    const C* d = du + i * du_row;  // may be where the result goes
    T* out = dx + i * 2 * n + n;
    if (p.mask && p.mask[i]) {
      for (int64_t j = 0; j < n; j++) store(&out[j], C(0));
      continue;
    }
    const C high = statistics[i].high, low = statistics[i].low, scale = statistics[i].scale;
    const auto gate = [&](int64_t j) __attribute__((always_inline)) { return load(g[j]); };
    const Means<C> mean = project<C>(w, n, statistics[i], d, gate, [](int64_t, C, C) {}, dweight, dbias);
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
      const C nj = ((load(g[j]) - high) - low) * scale;
      store(&out[j], (d[j] * w[j] - mean.d - nj * mean.along) * scale);
    }
  }
}

}  // namespace

FASTASR_KERNELS(ConvSpatialGateKernels, .statistics = statistics<T>, .forward = forward<T>, .backward = backward<T>,
                .norm_backward = norm_backward<T>)

}  // namespace fastasr::cpu
