// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/gated_depthwise_conv.h"

#include "cpu/conv/gated_depthwise_conv_rows.simd.h"

namespace fastasr::cpu {
namespace {

// Computes y[i] = act(z[i] + bias) for n rows of `channels`; rows of y are y_row elements apart.
template <GatedActivation kActivation, typename T, typename C>
__attribute__((noinline)) void finish(const C* __restrict z, const C* __restrict bias, int64_t n, int64_t channels,
                                      T* __restrict y, int64_t y_row) {
#ifdef __AVX512F__
  if constexpr (kActivation != GatedActivation::identity && !std::is_same_v<T, double>) {
    const FASTASR_SIMD::Registers table = FASTASR_SIMD::load_table();
    for (int64_t i = 0; i < n; i++, z += kStripe, y += y_row)
      for (int64_t c = 0; c < channels; c += 16) {
        const __m512 v = _mm512_add_ps(_mm512_load_ps(z + c), _mm512_load_ps(bias + c));
        const __m512 value = kActivation == GatedActivation::silu ? _mm512_mul_ps(v, FASTASR_SIMD::logistic(v))
                                                                  : FASTASR_SIMD::swoosh(table, v, 1.0f, 0.313261687f);
        FASTASR_SIMD::store16(y + c, FASTASR_SIMD::lanes(channels - c), value);
      }
    return;
  }
#endif
  for (int64_t i = 0; i < n; i++, z += kStripe, y += y_row) {
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) {
      const C v = z[c] + bias[c], e = v - C(1);
      if constexpr (kActivation == GatedActivation::swoosh_r) {
        const C tail = log1p_unit(exp_nonpositive(-std::fabs(e))) - C(0.313261687);
        store(&y[c], tail + ((e > 0 ? e : C(0)) - C(0.08) * v));
      } else {
        store(&y[c], kActivation == GatedActivation::silu ? v * sigmoid(v) : v);
      }
    }
  }
}

template <typename T>
class Forward : Convolution<T> {
  using Base = Convolution<T>;
  using Base::conv_, Base::pad_, Base::bias_, Base::z_;
  using typename Base::C;

 public:
  explicit Forward(const GatedDepthwiseConv<T>& conv) : Base(conv), ring_(kBlock + conv.taps - 1 + 2 * kTile) {}

  void run(T* y, T* new_cache, int64_t begin, int64_t end) {
    for (int64_t task = begin, staged = -1; task < end; task++) {
      const Stripe<T> stripe(conv_, task / conv_.count(), task % conv_.count());
      if (staged != stripe.first) this->stage_weights(stripe), staged = stripe.first;
      recording(stripe, y);
      if (new_cache) keep(stripe, new_cache);
    }
  }

 private:
  static constexpr C* none = nullptr;  // of gates and slopes

  void recording(const Stripe<T>& stripe, T* y) {
    const int64_t frames = stripe.frames, reach = conv_.taps - 1, future = reach - pad_;
    const int64_t y_row = conv_.batch * conv_.channels;
    constexpr decltype(&finish<GatedActivation::identity, T, C>) writes[] = {finish<GatedActivation::identity, T, C>,
                                                                             finish<GatedActivation::swoosh_r, T, C>,
                                                                             finish<GatedActivation::silu, T, C>};
    const auto write = writes[static_cast<int>(conv_.activation)];
    stage<false>(stripe, -pad_, reach, ring_[0], none, none);
    for (int64_t t = 0; t < frames;) {  // row r of the ring: frame t - pad + r
      const int64_t end = block_end(t, kBlock, frames, stripe.chunk, conv_.chunked()), n = end - t;
      stage<false>(stripe, t + future, n, ring_[reach], none, none);
      T* to = y + stripe.row(t) * conv_.channels + stripe.first;
      this->convolve_block(stripe, ring_[0], t, end, [&](int64_t i) {
        stripe.prefetch(end + future + i, kTile);
        for (int64_t j = i; j < std::min(i + kTile, n); j++) prefetch_row(to + j * y_row);
      });
      write(z_[0], bias_[0], n, stripe.channels, to, y_row);
      std::memmove(ring_[0], ring_[n], sizeof(C) * static_cast<size_t>(reach * kStripe));
      t = end;
    }
  }

  // Writes u of the last P frames, and of the cache where there are fewer.
  void keep(const Stripe<T>& stripe, T* new_cache) {
    for (int64_t p = 0; p < pad_; p++) {
      stage<false>(stripe, conv_.frames - pad_ + p, 1, ring_[0], none, none);
      for (int64_t c = 0; c < stripe.channels; c++)
        store(&new_cache[(stripe.batch * conv_.channels + stripe.first + c) * pad_ + p], ring_[0][c]);
    }
  }

  Rows<C> ring_;
};

template <typename T>
void forward(const GatedDepthwiseConv<T>& conv, T* y, T* new_cache, int64_t begin, int64_t end) {
  if (begin < end) Forward<T>(conv).run(y, new_cache, begin, end);
}

}  // namespace

FASTASR_KERNELS(GatedDepthwiseConvForward, .run = forward<T>)

}  // namespace fastasr::cpu
