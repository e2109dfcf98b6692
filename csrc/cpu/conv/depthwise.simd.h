// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/conv/depthwise_tiles.h"
#include "cpu/math/number.h"
#include "cpu/simd/vectors.simd.h"

namespace fastasr::cpu {
inline namespace FASTASR_SIMD {

// Depthwise convolution over time, forward and both gradients, on tiles that stay in registers. Vector types suit this
// file: they are as wide as the registers of the instruction set that the object is compiled for.
//
// Data are rows of kStripe channels, one per frame, one behind the other, 64-byte aligned: a stripe of the channels of
// one sequence. Forward, input gradient and weight gradient are one sum over rows,
//
//   sum[i] = sum over j < n of fixed[j] slide[i + j]       i < 8
//
// with the taps fixed and the input sliding; with the taps fixed, in reverse, and the output's gradient sliding; and
// with the output's gradient fixed and the input sliding. Eight sums stay in registers; four fixed rows at a time need
// 15 loads for 32 multiply-adds (one at a time: 9 for 8, and the loads would set the pace).

template <typename C>
struct Aligned {
  typedef C type __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr int64_t lanes = kVectorBytes / sizeof(C);
};

// Rows of `slide` are kRow elements apart.
template <int kRows, int64_t kRow = kStripe, typename C>
FASTASR_INLINE void correlate(const C* slide, const C* fixed, int64_t fixed_stride, int64_t n,
                              typename Aligned<C>::type (&sum)[kRows]) {
  using V = typename Aligned<C>::type;
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    V f[4];
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++) f[m] = *reinterpret_cast<const V*>(fixed + m * fixed_stride);
#pragma GCC unroll 16
    for (int r = 0; r < kRows + 3; r++) {
      const V x = *reinterpret_cast<const V*>(slide + r * kRow);
#pragma GCC unroll 4
      for (int m = 0; m < 4; m++)
        if (r - m >= 0 && r - m < kRows) sum[r - m] += f[m] * x;
    }
    slide += 4 * kRow, fixed += 4 * fixed_stride;
  }
  for (; j < n; j++) {
    const V f = *reinterpret_cast<const V*>(fixed);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) sum[i] += f * *reinterpret_cast<const V*>(slide + i * kRow);
    slide += kRow, fixed += fixed_stride;
  }
}

// Computes out[i] = sum over j < n of fixed[j] slide[i + j] for the rows of a tile and all channels of the stripe;
// kAdd adds it to what out holds.
template <bool kAdd, typename C>
FASTASR_INLINE void tile_of(int64_t rows, const C* slide, const C* fixed, int64_t fixed_stride, int64_t n, C* out) {
  const DepthwiseTiles<C>& tiles = kernels<DepthwiseTiles<C>>();
  (kAdd ? tiles.add : tiles.set)(rows, slide, fixed, fixed_stride, n, out);
}

// Copies taps (channels, K) of storage type T to rows; channels beyond the last are 0. One by one they took a fifth of
// a stream's step, so this transposes blocks in registers. The last block may overlap the one before.
template <typename T, typename C>
__attribute__((noinline)) void stage_taps(const T* taps, int64_t channels, int64_t K, C* rows) {
  constexpr int n = Lanes<C>::count;
  if constexpr (std::is_same_v<T, C> && kStripe % n == 0) {
    for (int64_t next = 0; K >= n && next < K; next += n) {
      const int64_t k = std::min(next, K - n);
      for (int64_t c = 0; c < kStripe; c += n) {
        Vector<C> r[n];
#pragma GCC unroll 16
        for (int i = 0; i < n; i++) r[i] = c + i < channels ? at(taps + (c + i) * K + k) : Vector<C>{};
        transpose<C>(r);
#pragma GCC unroll 16
        for (int i = 0; i < n; i++) put(rows + (k + i) * kStripe + c, r[i]);
      }
    }
    if (K >= n) return;
  }
  for (int64_t k = 0; k < K; k++)
    for (int64_t c = 0; c < kStripe; c++) rows[k * kStripe + c] = c < channels ? load(taps[c * K + k]) : C(0);
}

// Computes out[t] = sum over k < K of taps[k] in[t + k] for t < rows rounded up to whole tiles. It calls ahead(t)
// before each tile, which may prefetch a few rows at a time.
template <typename C, typename F>
void convolve(const C* in, const C* taps, int64_t K, int64_t rows, C* out, const F& ahead) {
  for (int64_t t = 0; t < rows; t += kTile) {
    ahead(t);
    tile_of<false>(rows - t, in + t * kStripe, taps, kStripe, K, out + t * kStripe);
  }
}

// Adds the sum over t < rows of grad[t] in[t + i] to dtaps[i], i < kTile, in chains of kChain products: in one chain of
// all rows the gradients of short sequences had twice the error of eager's.
constexpr int64_t kChain = 8;
template <typename C>
__attribute__((noinline)) void add_tap_gradient(const C* in, const C* grad, int64_t rows, C* dtaps) {
  for (int64_t t = 0; t < rows; t += kChain)
    tile_of<true>(kTile, in + t * kStripe, grad + t * kStripe, kStripe, std::min(kChain, rows - t), dtaps);
}

// Does this for all K taps, rounded up to whole tiles.
template <typename C>
void add_tap_gradients(const C* in, const C* grad, int64_t rows, int64_t K, C* dtaps) {
  for (int64_t k = 0; k < K; k += kTile) add_tap_gradient(in + k * kStripe, grad, rows, dtaps + k * kStripe);
}

// Computes din[t] = sum over k < K of taps[k] grad[t + K - 1 - k] for t < rows rounded up to whole tiles; ahead(t) as
// above.
template <typename C, typename F>
void convolve_reversed(const C* grad, const C* taps, int64_t K, int64_t rows, C* din, const F& ahead) {
  for (int64_t t = 0; t < rows; t += kTile) {
    ahead(t);
    tile_of<false>(rows - t, grad + t * kStripe, taps + (K - 1) * kStripe, -kStripe, K, din + t * kStripe);
  }
}

// Rows of a stripe in scratch memory, their prefetch, and sums of a channel.

// Scratch rows, 64-byte aligned, zeroed.
template <typename C>
class Rows {
 public:
  __attribute__((noinline)) explicit Rows(int64_t rows) : memory_(static_cast<size_t>(rows * kStripe + kSlack)) {
    rows_ = memory_.data();
    while (reinterpret_cast<uintptr_t>(rows_) % 64) rows_++;
  }
  C* operator[](int64_t row) { return rows_ + row * kStripe; }

 private:
  static constexpr int64_t kSlack = 64 / sizeof(C);
  std::vector<C> memory_;
  C* rows_;
};

// This is not __builtin_prefetch: GCC takes a function that does nothing else for one without effect and drops its
// calls.
template <typename T>
FASTASR_INLINE void prefetch_row(const T* row) {
  for (int64_t c = 0; c < kStripe; c += 64 / static_cast<int64_t>(sizeof(T))) {
#if defined(__x86_64__) && defined(__GNUC__)
    asm volatile("prefetcht0 %0" : : "m"(row[c]));
#elif defined(__aarch64__)
    asm volatile("prfm pldl1keep, %0" : : "Q"(row[c]));
#else
    __builtin_prefetch(row + c);
#endif
  }
}

template <typename C>
FASTASR_INLINE void clear_rows(C* rows, int64_t n) {
  for (int64_t i = 0; i < n * kStripe; i++) rows[i] = 0;
}

// Returns channels [first, first + n) of a vector, or zeros where it is absent; channels beyond are 0.
template <typename T, typename C>
__attribute__((noinline)) void stage_vector(const T* vector, int64_t first, int64_t n, C* row) {
  for (int64_t c = 0; c < kStripe; c++) row[c] = vector && c < n ? load(vector[first + c]) : C(0);
}

FASTASR_INLINE int64_t whole_tiles(int64_t n) { return (n + kTile - 1) / kTile * kTile; }

// Adds the sums of a channel: short chains of the compute type (a block's), added up in double.
template <typename C>
class Sums {
 public:
  explicit Sums(int64_t rows) : rows_(rows), part_(rows), total_(rows) {}
  void clear() {
    for (int64_t i = 0; i < rows_ * kStripe; i++) part_[0][i] = 0;
    for (int64_t i = 0; i < rows_ * kStripe; i++) total_[0][i] = 0;
  }
  C* part(int64_t row) { return part_[row]; }
  const double* total(int64_t row) { return total_[row]; }
  // Writes the sums of the first row to channels [first, first + n) of dbias, those of the K behind it to dweight's.
  void store(int64_t first, int64_t n, int64_t K, C* dweight, C* dbias) {
    for (int64_t c = 0; c < n; c++) {
      dbias[first + c] = static_cast<C>(total(0)[c]);
      for (int64_t k = 0; k < K; k++) dweight[(first + c) * K + k] = static_cast<C>(total(1 + k)[c]);
    }
  }
  __attribute__((noinline)) void carry(int64_t first, int64_t rows) {
    C* __restrict part = part_[first];
    double* __restrict total = total_[first];
#pragma omp simd
    for (int64_t i = 0; i < rows * kStripe; i++) {
      total[i] += static_cast<double>(part[i]);
      part[i] = 0;
    }
  }
  __attribute__((noinline)) void add(int64_t row, const C* rows, int64_t n) {
    double* __restrict total = total_[row];
    for (int64_t i = 0; i < n; i++) {
#pragma omp simd
      for (int64_t c = 0; c < kStripe; c++) total[c] += static_cast<double>(rows[i * kStripe + c]);
    }
  }

 private:
  const int64_t rows_;
  Rows<C> part_;
  Rows<double> total_;
};

}  // namespace FASTASR_SIMD
}  // namespace fastasr::cpu
