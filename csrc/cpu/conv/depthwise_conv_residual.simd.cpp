// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/depthwise_conv_residual.h"

#include <algorithm>
#include <cstring>

#include "cpu/conv/depthwise.simd.h"

namespace fastasr::cpu {
namespace {

// Forward and backward work by stripes of channels.
static_assert(kStripe == kResidualStripe);

// A block has this many frames: its rows, and K - 1 + kTile more for the taps' reach, stay in the first or second
// cache.
constexpr int64_t kResidualBlock = 64;

// The backward pass takes this many stripes through a block before the next block: a frame's row is often a page of its
// own, and its stripes then share one walk through the page table.
constexpr int64_t kResidualGroup = 4;

// The kernel prefetches this many rows ahead: rows lie C elements apart.
constexpr int64_t kResidualAhead = 32;

// Rows of one sequence, kStripe channels wide, `time` elements apart.
template <typename T>
struct Sequence {
  const T* first;
  int64_t time, frames, channels;  // channels: of the stripe
  const bool* mask;                // of the frames, or null

  // Loads frames [t, t + n) in the compute type; padding and those outside the sequence are 0. Channels beyond the last
  // hold what an earlier stripe left there: no result reads them.
  template <typename C>
  __attribute__((noinline)) void stage(int64_t t, int64_t n, C* rows) const {
    for (const int64_t end = t + n; t < end; t++, rows += kStripe) {
      if (t < 0 || t >= frames || (mask && mask[t])) {
        clear_rows(rows, 1);
        continue;
      }
      if (t + kResidualAhead < frames) prefetch_row(first + (t + kResidualAhead) * time);
      copy_row<kStripe>(first + t * time, rows, channels);
    }
  }
};

// y[c] = row[c] + (sum[c] + bias[c])
template <typename T, typename C>
FASTASR_INLINE void add_row(const C* __restrict row, const C* __restrict sum, const C* __restrict bias, int64_t n,
                            T* __restrict y) {
#pragma omp simd
  for (int64_t c = 0; c < n; c++) store(&y[c], row[c] + (sum[c] + bias[c]));
}

template <typename T>
class ResidualConvolution {
  using C = compute_t<T>;

 public:
  explicit ResidualConvolution(const DepthwiseConvResidual<T>& p, bool backward)
      : p_(p),
        reach_(p.taps - 1),
        taps_(p.taps),
        vectors_(2),
        x_(kResidualBlock + reach_ + 2 * kTile),
        grad_(backward ? kResidualBlock + reach_ + 2 * kTile : 0),
        sum_(kResidualBlock + kTile),
        sums_(backward ? 1 + whole_tiles(p.taps) : 0) {}

  void forward(T* y, int64_t begin, int64_t end) {
    for (int64_t task = begin, taken = -1; task < end; task++) {
      const int64_t stripe = task / p_.batch, b = task % p_.batch;
      if (stripe != taken) take(stripe), taken = stripe;
      for (int64_t t = 0; t < p_.frames; t += kResidualBlock) {
        const int64_t n = std::min(kResidualBlock, p_.frames - t);
        advance(input(b), p_.past, t, n, x_);
        convolve(x_[0], taps_[0], p_.taps, n, sum_[0], [](int64_t) {});
        add_rows(x_[p_.past], n, vectors_[0], y + (b * p_.frames + t) * p_.channels + first_);
      }
    }
  }

  void begin_backward(int64_t stripe) {
    take(stripe);
    sums_.clear();
  }

  void backward(const T* grad, T* dx, int64_t b, int64_t t) {
    const int64_t n = std::min(kResidualBlock, p_.frames - t), at = b * p_.frames * p_.channels + first_;
    const int64_t future = reach_ - p_.past;
    advance(input(b), p_.past, t, n, x_);
    advance({grad + at, p_.channels, p_.frames, channels_, nullptr}, future, t, n, grad_);
    convolve_reversed(grad_[0], taps_[0], p_.taps, n, sum_[0], [](int64_t) {});
    T* const to = dx + at + t * p_.channels;
    add_rows(grad_[future], n, vectors_[1], to);
    for (int64_t i = 0; p_.mask && i < n; i++)
      if (p_.mask[b * p_.frames + t + i]) std::fill_n(to + i * p_.channels, channels_, T{});
    sums_.add(0, grad_[future], n);
    add_tap_gradients(x_[0], grad_[future], n, p_.taps, sums_.part(1));
    sums_.carry(1, p_.taps);
  }

  void end_backward(C* dweight, C* dbias) { sums_.store(first_, channels_, p_.taps, dweight, dbias); }

 private:
  void take(int64_t stripe) {
    first_ = stripe * kStripe, channels_ = std::min(kStripe, p_.channels - first_);
    stage_taps(p_.weight + first_ * p_.taps, channels_, p_.taps, taps_[0]);
    stage_vector(p_.bias, first_, channels_, vectors_[0]);  // the other one stays 0
  }

  Sequence<T> input(int64_t b) const {
    return {p_.x + b * p_.x_batch + first_, p_.x_time, p_.frames, channels_,
            p_.mask ? p_.mask + b * p_.frames : nullptr};
  }

  // Row r of the ring is frame t - before + r, r < n + K - 1. A block before this one had kResidualBlock frames.
  void advance(const Sequence<T>& source, int64_t before, int64_t t, int64_t n, Rows<C>& ring) const {
    if (t == 0)
      source.stage(t - before, reach_, ring[0]);
    else
      std::memmove(ring[0], ring[kResidualBlock], sizeof(C) * static_cast<size_t>(reach_ * kStripe));
    source.stage(t + reach_ - before, n, ring[reach_]);
  }

  void add_rows(const C* rows, int64_t n, const C* bias, T* y) {
    for (int64_t i = 0; i < n; i++) {
      if (channels_ == kStripe)
        add_row(rows + i * kStripe, sum_[i], bias, kStripe, y + i * p_.channels);
      else
        add_row(rows + i * kStripe, sum_[i], bias, channels_, y + i * p_.channels);
    }
  }

  const DepthwiseConvResidual<T>& p_;
  const int64_t reach_;  // K - 1
  int64_t first_ = 0, channels_ = 0;
  Rows<C> taps_, vectors_, x_, grad_, sum_;
  Sums<C> sums_;
};

template <typename T>
void forward(const DepthwiseConvResidual<T>& p, T* y, int64_t begin, int64_t end) {
  if (begin < end) ResidualConvolution<T>(p, false).forward(y, begin, end);
}

template <typename T, typename C = compute_t<T>>
void backward(const DepthwiseConvResidual<T>& p, const T* grad, T* dx, C* dweight, C* dbias, int64_t begin,
              int64_t end) {
  std::vector<ResidualConvolution<T>> group;
  group.reserve(kResidualGroup);
  for (int64_t i = 0; i < std::min(kResidualGroup, end - begin); i++) group.emplace_back(p, true);
  for (int64_t first = begin; first < end; first += kResidualGroup) {
    const int64_t n = std::min(kResidualGroup, end - first);
    for (int64_t i = 0; i < n; i++) group[i].begin_backward(first + i);
    for (int64_t b = 0; b < p.batch; b++)
      for (int64_t t = 0; t < p.frames; t += kResidualBlock)
        for (int64_t i = 0; i < n; i++) group[i].backward(grad, dx, b, t);
    for (int64_t i = 0; i < n; i++) group[i].end_backward(dweight, dbias);
  }
}

}  // namespace

FASTASR_KERNELS(DepthwiseConvResidualKernels, .forward = forward<T>, .backward = backward<T>)

}  // namespace fastasr::cpu
