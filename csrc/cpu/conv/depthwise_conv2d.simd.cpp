// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/depthwise_conv2d.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/conv/depthwise.simd.h"

// A block of output frames is worked through stripe by stripe: a stripe is one vector of channels. Its input rows go
// through a ring in the first cache, where pixels lie one behind the other with zeros around them: the pixels of a map
// are 512 bytes apart at 128 channels, and those that a tile needs would share few sets of that cache. Tiles are two
// frames by kPixels pixels: their sums stay in registers over all taps, and each pixel that is loaded serves both
// frames.
namespace fastasr::cpu {
namespace {

constexpr int kPixels = kRegisters == 32 ? 10 : 6;  // 20 of 32, 12 of 16 registers hold sums
constexpr int64_t kTaps = 8;                        // taps of the weight gradient at a time
constexpr int64_t kFlushed = 8;  // Floats add this many frames, then double: more in floats are less exact than eager.

// Memory of zeros, 64-byte aligned.
template <typename C>
class Cleared {
 public:
  explicit Cleared(int64_t n) : n_(n), memory_(static_cast<size_t>(n + 64 / sizeof(C))) {
    const auto at = reinterpret_cast<uintptr_t>(memory_.data());
    data_ = reinterpret_cast<C*>((at + 63) & ~uintptr_t{63});
  }
  void clear() { std::memset(static_cast<void*>(data_), 0, sizeof(C) * static_cast<size_t>(n_)); }
  C* operator[](int64_t i) { return data_ + i; }

 private:
  int64_t n_;
  std::vector<C> memory_;
  C* data_;
};

// Copies `pixels` pixels of `channels` channels each, `stride` elements apart, to vectors.
template <int64_t kLanes, typename T, typename C>
FASTASR_INLINE void stage_pixels(const T* __restrict from, int64_t stride, int64_t pixels, int64_t channels,
                                 C* __restrict to) {
  for (int64_t f = 0; f < pixels; f++, from += stride, to += kLanes) copy_row<kLanes>(from, to, channels);
}

template <int64_t kLanes, typename T, typename C>
FASTASR_INLINE void write_pixels(const C* __restrict from, const C* __restrict bias, int64_t pixels, int64_t channels,
                                 T* __restrict to, int64_t stride) {
  if (channels == kLanes) {
    for (int64_t f = 0; f < pixels; f++, from += kLanes, to += stride) {
#pragma omp simd
      for (int64_t c = 0; c < kLanes; c++) store(&to[c], from[c] + bias[c]);
    }
    return;
  }
  for (int64_t f = 0; f < pixels; f++, from += kLanes, to += stride)
    for (int64_t c = 0; c < channels; c++) store(&to[c], from[c] + bias[c]);
}

// Holds the input rows of a block of output frames, one stripe: row(t) is frame t of the input, zeros outside it.
template <typename T>
class InputRows {
 public:
  using C = compute_t<T>;
  static constexpr int64_t kLanes = Aligned<C>::lanes;

  // `length` is the pixels of a row, with those that tiles read beyond the last; `reach` is the rows in use at a time.
  InputRows(const DepthwiseSizes& s, const T* in, int64_t length, int64_t reach)
      : s_(s), in_(in), row_(length * kLanes), reach_(reach), ring_(row_ * reach), zeros_(row_) {}

  // Starts with the rows from frame `first` of sequence b, channels [c, c + n).
  void start(int64_t b, int64_t first, int64_t c, int64_t n) {
    base_ = in_ + b * s_.frames * s_.width * s_.channels;
    next_ = first, c_ = c;
    if (n != n_) ring_.clear();  // lanes beyond the last channel are 0
    n_ = n;
  }

  // Loads rows up to frame t: t must increase, and at most `reach` rows are kept.
  const C* row(int64_t t) {
    for (; next_ <= t; next_++) {
      if (next_ < 0 || next_ >= s_.frames) continue;
      const T* from = base_ + next_ * s_.width * s_.channels;
      if (c_ == 0) prefetch(from + 2 * s_.width * s_.channels);
      stage_pixels<kLanes>(from + c_, s_.channels, s_.width, n_, slot(next_) + s_.pad_f * kLanes);
    }
    return t < 0 || t >= s_.frames ? zeros_[0] : slot(t);
  }

 private:
  C* slot(int64_t t) { return ring_[t % reach_ * row_]; }
  // Prefetches a whole row in the order of memory, for all stripes: each stripe reads one line of a pixel, which no
  // hardware prefetcher follows.
  void prefetch(const T* row) const {
    const char* p = reinterpret_cast<const char*>(row);
    const int64_t bytes = s_.width * s_.channels * static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
  }

  const DepthwiseSizes& s_;
  const T *in_, *base_ = nullptr;
  int64_t row_, reach_, next_ = 0, c_ = 0, n_ = -1;
  Cleared<C> ring_, zeros_;
};

// Computes a[f] += sum_j u[j] row[f + j] and e[f] += sum_j v[j] row[f + j].
template <int N, bool kFirst, bool kSecond, typename C, typename V>
FASTASR_INLINE void add_row(const C* row, const C* u, const C* v, int64_t taps, V (&a)[N], V (&e)[N]) {
  constexpr int64_t kLanes = Aligned<C>::lanes;
  for (int64_t j = 0; j < taps; j++) {
    V first{}, second{};
    if (kFirst) first = *reinterpret_cast<const V*>(u + j * kLanes);
    if (kSecond) second = *reinterpret_cast<const V*>(v + j * kLanes);
#pragma GCC unroll 16
    for (int f = 0; f < N; f++) {
      const V x = *reinterpret_cast<const V*>(row + (f + j) * kLanes);
      if (kFirst) a[f] += first * x;
      if (kSecond) e[f] += second * x;
    }
  }
}

// Computes pixels [0, N) of two frames, whose taps see rows[0 .. taps_t - 1] and rows[1 .. taps_t], from `offset` on.
// It is a function of its own: inlined into a larger one, the compiler keeps the sums on the stack.
template <int N, typename C>
__attribute__((noinline)) void tile_of_two(const C* const* rows, int64_t offset, const C* taps, int64_t taps_t,
                                           int64_t taps_f, C* out, C* next_out) {
  using V = typename Aligned<C>::type;
  constexpr int64_t kLanes = Aligned<C>::lanes;
  const int64_t step = taps_f * kLanes;
  V a[N] = {}, e[N] = {};
  add_row<N, true, false>(rows[0] + offset, taps, taps, taps_f, a, e);
  for (int64_t i = 1; i < taps_t; i++)
    add_row<N, true, true>(rows[i] + offset, taps + i * step, taps + (i - 1) * step, taps_f, a, e);
  add_row<N, false, true>(rows[taps_t] + offset, taps, taps + (taps_t - 1) * step, taps_f, a, e);
#pragma GCC unroll 16
  for (int f = 0; f < N; f++) {
    *reinterpret_cast<V*>(out + f * kLanes) = a[f];
    *reinterpret_cast<V*>(next_out + f * kLanes) = e[f];
  }
}

// A tile has this many pixels: the rows of a map are cut into tiles of one size, and the surplus of the last is
// discarded.
FASTASR_INLINE int64_t tile_pixels(int64_t width) {
  const int64_t tiles = (width + kPixels - 1) / kPixels, least = (width + tiles - 1) / tiles;
  return least <= 2 ? 2 : least <= 4 ? 4 : least <= 5 ? 5 : least <= 6 ? 6 : kPixels;
}

template <typename C>
FASTASR_INLINE void tile_of_two(int64_t pixels, const C* const* rows, int64_t offset, const C* taps, int64_t taps_t,
                                int64_t taps_f, C* out, C* next_out) {
  if (pixels == 2) return tile_of_two<2>(rows, offset, taps, taps_t, taps_f, out, next_out);
  if (pixels == 4) return tile_of_two<4>(rows, offset, taps, taps_t, taps_f, out, next_out);
  if (pixels == 5) return tile_of_two<5>(rows, offset, taps, taps_t, taps_f, out, next_out);
  if (pixels == 6) return tile_of_two<6>(rows, offset, taps, taps_t, taps_f, out, next_out);
  tile_of_two<kPixels>(rows, offset, taps, taps_t, taps_f, out, next_out);
}

template <typename T>
void forward(const DepthwiseSizes& s, const T* in, const T* weight, const T* bias, bool flip, T* out, int64_t begin,
             int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t kLanes = Aligned<C>::lanes;
  const int64_t frames = s.out_frames(), width = s.out_width(), K = s.taps(), channels = s.channels;
  if (begin >= end || !width) return;
  const int64_t pixels = tile_pixels(width), tiles = (width + pixels - 1) / pixels;
  InputRows<T> rows(s, in, tiles * pixels + s.taps_f - 1, s.taps_t + 1);
  const int64_t stripes = (channels + kLanes - 1) / kLanes;
  Cleared<C> taps(stripes * K * kLanes), offsets(stripes * kLanes), sums(2 * tiles * pixels * kLanes);
  for (int64_t c = 0; c < channels; c++) {
    const int64_t v = c / kLanes, lane = c % kLanes;
    for (int64_t k = 0; k < K; k++) *taps[(v * K + k) * kLanes + lane] = load(weight[c * K + (flip ? K - 1 - k : k)]);
    *offsets[c] = bias ? load(bias[c]) : C(0);
  }
  std::vector<const C*> seen(static_cast<size_t>(s.taps_t + 1));
  C *sum = sums[0], *next = sums[tiles * pixels * kLanes];
  const int64_t blocks = (frames + kDepthwiseFrames - 1) / kDepthwiseFrames;
  for (int64_t block = begin; block < end; block++) {
    const int64_t b = block / blocks, first = block % blocks * kDepthwiseFrames;
    const int64_t last = std::min(first + kDepthwiseFrames, frames);
    for (int64_t v = 0; v < stripes; v++) {
      const int64_t c = v * kLanes, n = std::min(kLanes, channels - c);
      rows.start(b, first - s.pad_t, c, n);
      for (int64_t t = first; t < last; t += 2) {
        for (int64_t i = 0; i <= s.taps_t; i++) seen[size_t(i)] = rows.row(t - s.pad_t + i);
        for (int64_t f = 0; f < tiles * pixels; f += pixels)
          tile_of_two(pixels, seen.data(), f * kLanes, taps[v * K * kLanes], s.taps_t, s.taps_f, sum + f * kLanes,
                      next + f * kLanes);
        T* to = out + ((b * frames + t) * width) * channels + c;
        write_pixels<kLanes>(sum, offsets[c], width, n, to, channels);
        if (t + 1 < last) write_pixels<kLanes>(next, offsets[c], width, n, to + width * channels, channels);
      }
    }
  }
}

// Computes sums[j] += sum over f of grad[f] row[f + j], j < kTaps, in chains of at most 16 products.
template <typename C>
__attribute__((noinline)) void add_taps(const C* row, const C* grad, int64_t width, C* sums) {
  using V = typename Aligned<C>::type;
  constexpr int64_t kLanes = Aligned<C>::lanes;
  for (int64_t f = 0; f < width; f += 16) {
    V sum[kTaps] = {};
    correlate<kTaps, kLanes>(row + f * kLanes, grad + f * kLanes, kLanes, std::min<int64_t>(16, width - f), sum);
#pragma GCC unroll 8
    for (int j = 0; j < kTaps; j++) *reinterpret_cast<V*>(sums + j * kLanes) += sum[j];
  }
}

// Adds the pixels' sum to total, in chains of 8.
template <typename C>
FASTASR_INLINE void add_pixels(const C* __restrict pixels, int64_t width, double* __restrict total) {
  constexpr int64_t kLanes = Aligned<C>::lanes;
  for (int64_t f = 0; f < width; f += 8) {
    alignas(64) C sum[kLanes] = {};
    for (int64_t i = f; i < std::min(f + 8, width); i++) {
#pragma omp simd
      for (int64_t c = 0; c < kLanes; c++) sum[c] += pixels[i * kLanes + c];
    }
#pragma omp simd
    for (int64_t c = 0; c < kLanes; c++) total[c] += static_cast<double>(sum[c]);
  }
}

// Adds the sums of the taps, `padded` in a row, to part[k * channels] and resets them to 0.
template <typename C>
FASTASR_INLINE void flush(const DepthwiseSizes& s, Cleared<C>& sums, int64_t padded, int64_t n, double* part) {
  constexpr int64_t kLanes = Aligned<C>::lanes;
  for (int64_t k = 0; k < s.taps(); k++) {
    const C* sum = sums[(k / s.taps_f * padded + k % s.taps_f) * kLanes];
    for (int64_t c = 0; c < n; c++) part[k * s.channels + c] += static_cast<double>(sum[c]);
  }
  sums.clear();
}

template <typename T>
void weight_gradient(const DepthwiseSizes& s, const T* grad, const T* in, double* parts, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t kLanes = Aligned<C>::lanes;
  const int64_t frames = s.out_frames(), width = s.out_width(), K = s.taps(), channels = s.channels;
  const int64_t padded = (s.taps_f + kTaps - 1) / kTaps * kTaps;  // taps of a row of the table
  const int64_t blocks = (frames + kDepthwiseFrames - 1) / kDepthwiseFrames, all = s.batch * blocks;
  const int64_t groups = depthwise_groups(s);
  InputRows<T> rows(s, in, width + padded, s.taps_t);
  Cleared<C> q(width * kLanes), sums(s.taps_t * padded * kLanes);
  for (int64_t group = begin; group < end; group++) {
    double* part = parts + group * (K + 1) * channels;
    std::fill(part, part + (K + 1) * channels, 0.0);
    for (int64_t block = all * group / groups; block < all * (group + 1) / groups; block++) {
      const int64_t b = block / blocks, first = block % blocks * kDepthwiseFrames;
      const int64_t last = std::min(first + kDepthwiseFrames, frames);
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int64_t n = std::min(kLanes, channels - c);
        rows.start(b, first - s.pad_t, c, n);
        if (n < kLanes) q.clear();
        double* to = part + c;
        alignas(64) double bias[kLanes] = {};
        for (int64_t t = first; t < last; t++) {
          stage_pixels<kLanes>(grad + (b * frames + t) * width * channels + c, channels, width, n, q[0]);
          for (int64_t i = 0; i < s.taps_t; i++) {
            const C* row = rows.row(t - s.pad_t + i);
            for (int64_t j = 0; j < padded; j += kTaps)
              add_taps(row + j * kLanes, q[0], width, sums[(i * padded + j) * kLanes]);
          }
          add_pixels(q[0], width, bias);
          if ((t - first) % kFlushed == kFlushed - 1 || t + 1 == last) flush(s, sums, padded, n, to);
        }
        for (int64_t i = 0; i < n; i++) to[K * channels + i] += bias[i];
      }
    }
  }
}

template <typename T>
void reduce(const DepthwiseSizes& s, const double* parts, T* dweight, T* dbias) {
  using C = compute_t<T>;
  const int64_t taps = s.taps(), groups = depthwise_groups(s);
  std::vector<double> sum(static_cast<size_t>((taps + 1) * s.channels));
  for (int64_t g = 0; g < groups; g++)
    for (int64_t i = 0; i < (taps + 1) * s.channels; i++) sum[size_t(i)] += parts[g * (taps + 1) * s.channels + i];
  for (int64_t c = 0; c < s.channels; c++) {
    for (int64_t k = 0; k < taps; k++) store(&dweight[c * taps + k], static_cast<C>(sum[size_t(k * s.channels + c)]));
    if (dbias) store(&dbias[c], static_cast<C>(sum[size_t(taps * s.channels + c)]));
  }
}

}  // namespace

FASTASR_KERNELS(DepthwiseConv2dKernels, .forward = forward<T>, .weight_gradient = weight_gradient<T>,
                .reduce = reduce<T>)

}  // namespace fastasr::cpu
