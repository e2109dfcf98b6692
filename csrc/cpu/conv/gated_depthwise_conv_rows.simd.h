// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/conv/depthwise.simd.h"
#include "cpu/conv/gated_depthwise_conv.h"
#include "cpu/math/activation.h"
#include "cpu/simd/logistic_avx512.simd.h"

// The forward and backward of gated_depthwise_conv share this: the stripe's rows, their staging, and a block's chunks.
namespace fastasr::cpu {
inline namespace FASTASR_SIMD {

static_assert(kStripe == kGatedStripe);

// A block has this many frames: its rows, and 2 P + kTile more for the taps' reach, stay in the first or second cache.
constexpr int64_t kBlock = 64;

// One stripe of the channels of one recording, whose frames count from its first one.
template <typename T>
struct Stripe {
  const GatedDepthwiseConv<T>& conv;
  int64_t batch, begin, frames;  // begin: of the recording in its sequence
  int64_t chunk;                 // of the frames: the whole recording if it is shorter
  int64_t first, channels;       // channels [first, first + channels), at most kStripe
  const T* origin;               // of the inputs

  Stripe(const GatedDepthwiseConv<T>& conv_, int64_t stripe, int64_t recording)
      : conv(conv_),
        batch(recording / conv_.recordings),
        begin(conv_.starts ? conv_.starts[recording % conv_.recordings] : 0),
        frames(conv_.starts ? conv_.starts[recording % conv_.recordings + 1] - begin : conv_.frames),
        chunk(std::min(conv_.chunk, std::max<int64_t>(1, frames))),
        first(stripe * kStripe),
        channels(std::min(kStripe, conv_.channels - first)),
        origin(conv_.h + offset(0, conv_.h_time, conv_.h_batch) + first) {}

  bool valid(int64_t t) const {
    return t >= 0 && t < frames && !(conv.mask && conv.mask[batch * conv.frames + begin + t]);
  }
  const T* input(int64_t t) const { return origin + t * conv.h_time; }
  // Where frame t lies in a tensor of these strides, and the row of y and dh that it is.
  int64_t offset(int64_t t, int64_t time, int64_t batch_stride) const {
    return (begin + t) * time + batch * batch_stride;
  }
  int64_t row(int64_t t) const { return offset(t, conv.batch, 1); }

  // of the inputs of frames [t, t + n)
  void prefetch(int64_t t, int64_t n) const {
    for (const int64_t end = std::min(t + n, frames); t < end; t++) {
      prefetch_row(input(t));
      prefetch_row(input(t) + conv.channels);
    }
  }
};

// u = x gate(s). kSlopes: gate = gate(s) too, and slope = ds / du: u (1 - gate) for the sigmoid, whose last product is
// left to the end, and x gate'(s) for SiLU.
template <Gate kGate, bool kSlopes, typename T, typename C>
FASTASR_INLINE void gate_row(const T* __restrict x, const T* __restrict s, int64_t n, C* __restrict u,
                             C* __restrict gate, C* __restrict slope) {
#ifdef __AVX512F__
  if constexpr (!std::is_same_v<T, double>) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int64_t c = 0; c < n; c += 16) {
      const __mmask16 lanes = FASTASR_SIMD::lanes(n - c);
      const __m512 in = FASTASR_SIMD::load16(x + c, lanes), v = FASTASR_SIMD::load16(s + c, lanes);
      const __m512 g = FASTASR_SIMD::logistic(v);
      const __m512 factor = kGate == Gate::silu ? _mm512_mul_ps(v, g) : g;
      _mm512_store_ps(u + c, _mm512_mul_ps(in, factor));
      if constexpr (kSlopes) _mm512_store_ps(gate + c, factor);
      if constexpr (kSlopes && kGate == Gate::silu) {
        const __m512 d = _mm512_mul_ps(g, _mm512_fmadd_ps(v, _mm512_sub_ps(one, g), one));
        _mm512_store_ps(slope + c, _mm512_mul_ps(in, d));
      }
    }
    return;
  }
#endif
#pragma omp simd
  for (int64_t c = 0; c < n; c++) {
    const C v = load(s[c]), g = sigmoid(v), factor = kGate == Gate::silu ? v * g : g;
    u[c] = load(x[c]) * factor;
    if constexpr (kSlopes) gate[c] = factor;
    if constexpr (kSlopes && kGate == Gate::silu) slope[c] = load(x[c]) * (g * (C(1) + v * (C(1) - g)));
  }
}

template <Gate kGate, bool kSlopes, typename T, typename C>
FASTASR_INLINE void gate_stripe(const Stripe<T>& stripe, const T* x, C* u, C* gate, C* slope) {
  const T* s = x + stripe.conv.channels;
  if (stripe.channels == kStripe)
    gate_row<kGate, kSlopes>(x, s, kStripe, u, gate, slope);
  else
    gate_row<kGate, kSlopes>(x, s, stripe.channels, u, gate, slope);
}

// Computes u of frames [t, t + n) into rows `u`, and with kSlopes the gates and, for SiLU, slopes. Frames that do not
// count are 0; before the first frame u is the cache. Channels beyond the stripe's stay 0.
template <bool kSlopes, typename T, typename C>
void stage(const Stripe<T>& stripe, int64_t t, int64_t n, C* u, C* gate, C* slope) {
  const GatedDepthwiseConv<T>& conv = stripe.conv;
  const int64_t channels = stripe.channels, past = conv.past;
  const int64_t gates = kSlopes ? kStripe : 0, slopes = kSlopes && conv.gate == Gate::silu ? kStripe : 0;
  for (const int64_t end = t + n; t < end; t++, u += kStripe, gate += gates, slope += slopes) {
    if (stripe.valid(t)) {
      if (conv.gate == Gate::silu)
        gate_stripe<Gate::silu, kSlopes>(stripe, stripe.input(t), u, gate, slope);
      else
        gate_stripe<Gate::sigmoid, kSlopes>(stripe, stripe.input(t), u, gate, slope);
      continue;
    }
    for (int64_t c = 0; c < kStripe; c++) u[c] = 0;
    for (int64_t c = 0; c < gates; c++) gate[c] = 0;
    for (int64_t c = 0; c < slopes; c++) slope[c] = 0;
    if (t < 0 && conv.cache)
      for (int64_t c = 0; c < channels; c++)
        u[c] = load(conv.cache[(stripe.batch * conv.channels + stripe.first + c) * past + past + t]);
  }
}

// Returns the frame after the last of the block that starts at frame t: whole chunks, or a part of one.
FASTASR_INLINE int64_t block_end(int64_t t, int64_t block, int64_t frames, int64_t chunk, bool chunked) {
  int64_t end = t + block;
  if (chunked) end = chunk > block ? std::min(end, (t / chunk + 1) * chunk) : t + block / chunk * chunk;
  return std::min(end, frames);
}

// Returns what frames [begin, end) of chunk [first, last) see of their chunk: rows of frames begin - pad on. `rows`
// holds frames begin - pad to end + pad. Where these reach beyond the chunk, they are copied to `copy` and are 0 there;
// a tile reads at most kTile - 1 rows beyond the chunk, which chunk_taps and chunk_rows ensure.
template <typename C>
__attribute__((noinline)) const C* window(const C* rows, int64_t begin, int64_t end, int64_t first, int64_t last,
                                          int64_t pad, C* copy) {
  const int64_t start = begin - pad;
  if (start >= first && end + pad <= last) return rows;
  const int64_t low = std::max(start, first), high = std::min(end + pad, last);
  const int64_t zeros = std::max(start, first - kTile), stop = std::min(end + pad + kTile, last + kTile);
  for (int64_t i = (zeros - start) * kStripe; i < (low - start) * kStripe; i++) copy[i] = 0;
  std::memcpy(copy + (low - start) * kStripe, rows + (low - start) * kStripe,
              sizeof(C) * static_cast<size_t>((high - low) * kStripe));
  for (int64_t i = (high - start) * kStripe; i < (stop - start) * kStripe; i++) copy[i] = 0;
  return copy;
}

// Returns taps [first, last) of K that reach into the chunk from any of the frames [t, t + n).
struct Range {
  int64_t first, last;
};
FASTASR_INLINE Range chunk_taps(int64_t t, int64_t n, int64_t first, int64_t last, int64_t taps) {
  const int64_t pad = taps / 2;
  return {std::max<int64_t>(0, first - (t + n - 1) + pad), std::min(taps, last - t + pad)};
}

// Calls f(begin, end, first, last) for the parts [begin, end) of frames [t, stop) within one chunk [first, last) each.
template <typename F>
FASTASR_INLINE void for_each_chunk(int64_t t, int64_t stop, int64_t chunk, int64_t frames, const F& f) {
  while (t < stop) {
    const int64_t first = t / chunk * chunk, last = std::min(first + chunk, frames);
    const int64_t end = std::min(stop, last);
    f(t, end, first, last);
    t = end;
  }
}

// Computes the convolution within the chunk for frames [begin, end) of chunk [first, last): out[i] = sum_k taps[k] u[t
// + k - P], taken from their window. `step` is the rows of taps from one to the next, negative to run them in reverse.
template <typename C>
__attribute__((noinline)) void convolve_chunk(const C* seen, int64_t begin, int64_t end, int64_t first, int64_t last,
                                              const C* taps, int64_t step, int64_t K, C* out) {
  for (int64_t t = begin; t < end; t += kTile) {
    const int64_t n = end - t > 4 ? kTile : 4;  // rows that the tile computes
    const Range k = chunk_taps(t, n, first, last, K);
    tile_of<false>(n, seen + (t - begin + k.first) * kStripe, taps + k.first * step, step, k.last - k.first,
                   out + (t - begin) * kStripe);
  }
}

// Computes z += e scale; e + bias is stored in e's place.
template <typename C>
FASTASR_INLINE void add_scaled(C* __restrict z, C* __restrict e, const C* __restrict bias, const C* __restrict left,
                               const C* __restrict right) {
#pragma omp simd
  for (int64_t c = 0; c < kStripe; c++) {
    e[c] += bias[c];
    z[c] += e[c] * (C(1) + (left[c] + right[c]));
  }
}

// Holds the weights of a stripe, and z of a block of frames without the bias that is common to all.
template <typename T>
class Convolution {
 protected:
  using C = compute_t<T>;

  explicit Convolution(const GatedDepthwiseConv<T>& conv)
      : conv_(conv),
        pad_(conv.past),
        taps_(conv.taps),
        causal_(conv.chunked() ? pad_ + 1 : 0),
        edges_(conv.chunked() ? 2 * conv.taps + 1 : 0),
        bias_(2),
        z_(kBlock + kTile),
        e_(conv.chunked() ? kBlock + kTile : 0),
        copy_(conv.chunked() ? kBlock + 2 * pad_ + 2 * kTile : 0) {}

  void stage_weights(const Stripe<T>& stripe) {
    const int64_t c = stripe.first, n = stripe.channels, K = conv_.taps;
    stage_taps(conv_.weight + c * K, n, K, taps_[0]);
    // bias_[0] is added to z, bias_[1] to the convolution within the chunk
    stage_vector(conv_.chunked() ? conv_.causal_bias : conv_.bias, c, n, bias_[0]);
    if (!conv_.chunked()) return;
    stage_vector(conv_.bias, c, n, bias_[1]);
    stage_taps(conv_.causal_weight + c * (pad_ + 1), n, pad_ + 1, causal_[0]);
    stage_taps(conv_.chunk_scale + c * K, n, K, edges_[0]);
    stage_taps(conv_.chunk_scale + (conv_.channels + c) * K, n, K, edges_[K]);
  }

  // Computes z_ of frames [t, stop), and e_ in chunk-causal form; rows of u begin with frame t - P.
  template <typename F>
  void convolve_block(const Stripe<T>& stripe, C* u, int64_t t, int64_t stop, const F& ahead) {
    if (!conv_.chunked()) return convolve(u, taps_[0], conv_.taps, stop - t, z_[0], ahead);
    convolve(u, causal_[0], pad_ + 1, stop - t, z_[0], ahead);
    for_each_chunk(t, stop, stripe.chunk, stripe.frames, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
      const C* seen = window(u + (begin - t) * kStripe, begin, end, first, last, pad_, copy_[0]);
      convolve_chunk(seen, begin, end, first, last, taps_[0], kStripe, conv_.taps, e_[begin - t]);
      for (int64_t i = begin; i < end; i++)
        add_scaled(z_[i - t], e_[i - t], bias_[1], left(i - first), right(i - first, stripe.chunk));
    });
  }

  // Returns rows of the scale at position p of a chunk, zeros where they do not reach.
  bool has_left(int64_t p) const { return p < conv_.taps; }
  bool has_right(int64_t p, int64_t chunk) const { return p >= chunk - conv_.taps; }
  const C* left(int64_t p) { return edges_[has_left(p) ? p : 2 * conv_.taps]; }
  const C* right(int64_t p, int64_t chunk) { return edges_[2 * conv_.taps + (has_right(p, chunk) ? p - chunk : 0)]; }

  const GatedDepthwiseConv<T>& conv_;
  const int64_t pad_;
  Rows<C> taps_, causal_, edges_, bias_, z_, e_, copy_;
};

}  // namespace FASTASR_SIMD
}  // namespace fastasr::cpu
