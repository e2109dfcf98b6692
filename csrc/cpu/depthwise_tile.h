// SPDX-License-Identifier: Apache-2.0
// Depthwise convolution over time, forward and both gradients, on tiles that stay in registers.
//
// No include guard: a kernel's source file includes this once per instruction set, inside a namespace and a target of
// its own (cpu/instruction_sets.h), with FASTASR_VECTOR_BYTES defined. Vector types are right here and a trap under
// target_clones, where the baseline's clone takes them apart before the clone for AVX-512 is made.
//
// Data are rows of kStripe channels, one per frame, one behind the other, 64-byte aligned: a stripe of the channels of
// one sequence. Forward, input gradient and weight gradient are one sum over rows,
//
//   sum[i] = sum over j < n of fixed[j] slide[i + j]       i < 8
//
// with the taps fixed and the input sliding; with the taps fixed, in reverse, and the output's gradient sliding; and
// with the output's gradient fixed and the input sliding. Eight sums stay in registers; four fixed rows at a time need
// 15 loads for 32 multiply-adds (one at a time: 9 for 8, and the loads would set the pace).

constexpr int64_t kStripe = 32;  // channels of a row
constexpr int64_t kTile = 8;     // rows of a tile

template <typename C>
struct Vector {
  typedef C type __attribute__((vector_size(FASTASR_VECTOR_BYTES), may_alias));
  static constexpr int64_t lanes = FASTASR_VECTOR_BYTES / sizeof(C);
};

// Rows of `slide` are kRow elements apart.
template <int kRows, int64_t kRow = kStripe, typename C>
FASTASR_INLINE void correlate(const C* slide, const C* fixed, int64_t fixed_stride, int64_t n,
                              typename Vector<C>::type (&sum)[kRows]) {
  using V = typename Vector<C>::type;
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

// out[i] (+)= sum over j < n of fixed[j] slide[i + j] for the kRows rows of a tile and all channels of the stripe.
template <int kRows, bool kAdd, typename C>
FASTASR_INLINE void tile(const C* slide, const C* fixed, int64_t fixed_stride, int64_t n, C* out) {
  using V = typename Vector<C>::type;
  for (int64_t v = 0; v < kStripe; v += Vector<C>::lanes) {
    V sum[kRows] = {};
    correlate<kRows>(slide + v, fixed + v, fixed_stride, n, sum);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) {
      V* to = reinterpret_cast<V*>(out + i * kStripe + v);
      *to = kAdd ? *to + sum[i] : sum[i];
    }
  }
}

// A function of its own: inlined into a larger one, the compiler keeps the sums on the stack. Tiles of four rows for
// what is that short. `slide` and `out` have a tile's rows, whatever `rows` is; sums of rows that are not asked for are
// waste.
template <bool kAdd, typename C>
__attribute__((noinline)) void tile_of(int64_t rows, const C* slide, const C* fixed, int64_t fixed_stride, int64_t n,
                                       C* out) {
  if (rows > 4) return tile<8, kAdd>(slide, fixed, fixed_stride, n, out);
  tile<4, kAdd>(slide, fixed, fixed_stride, n, out);
}

// taps (channels, K) of storage type T -> rows; channels beyond the last are 0.
template <typename T, typename C>
void stage_taps(const T* taps, int64_t channels, int64_t K, C* rows) {
  for (int64_t k = 0; k < K; k++)
    for (int64_t c = 0; c < kStripe; c++) rows[k * kStripe + c] = c < channels ? load(taps[c * K + k]) : C(0);
}

// out[t] = sum over k < K of taps[k] in[t + k], t < rows rounded up to whole tiles. ahead(t) before each tile: a place
// to prefetch from, a few rows at a time.
template <typename C, typename F>
void convolve(const C* in, const C* taps, int64_t K, int64_t rows, C* out, const F& ahead) {
  for (int64_t t = 0; t < rows; t += kTile) {
    ahead(t);
    tile_of<false>(rows - t, in + t * kStripe, taps, kStripe, K, out + t * kStripe);
  }
}

// dtaps[i] += sum over t < rows of grad[t] in[t + i], i < kTile, in chains of kChain products: in one chain of all rows
// short sequences' gradients were twice as inexact as eager's.
constexpr int64_t kChain = 8;
template <typename C>
void add_tap_gradient(const C* in, const C* grad, int64_t rows, C* dtaps) {
  for (int64_t t = 0; t < rows; t += kChain)
    tile_of<true>(kTile, in + t * kStripe, grad + t * kStripe, kStripe, std::min(kChain, rows - t), dtaps);
}

// Of all K taps, rounded up to whole tiles.
template <typename C>
void add_tap_gradients(const C* in, const C* grad, int64_t rows, int64_t K, C* dtaps) {
  for (int64_t k = 0; k < K; k += kTile) add_tap_gradient(in + k * kStripe, grad, rows, dtaps + k * kStripe);
}

// din[t] = sum over k < K of taps[k] grad[t + K - 1 - k], t < rows rounded up to whole tiles; ahead(t) as above.
template <typename C, typename F>
void convolve_reversed(const C* grad, const C* taps, int64_t K, int64_t rows, C* din, const F& ahead) {
  for (int64_t t = 0; t < rows; t += kTile) {
    ahead(t);
    tile_of<false>(rows - t, grad + t * kStripe, taps + (K - 1) * kStripe, -kStripe, K, din + t * kStripe);
  }
}
