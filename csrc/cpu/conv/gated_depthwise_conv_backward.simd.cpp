// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/gated_depthwise_conv.h"
#include "cpu/conv/gated_depthwise_conv_rows.simd.h"

// With q = dy act'(z), r = q scale and e the convolution within the chunk:
//   dbias = sum_t r (plain: q)         dweight[k] = sum_t r[t] u[t + k - P]      (within chunks)
//   dcausal_bias = sum_t q             dcausal_weight[j] = sum_t q[t] u[t + j - P]
//   dL[p], dR[p - (S - K)] = sum over the frames at position p of q e
//   du[t] = sum_k weight[k] r[t - k + P] (within chunks) + sum_j causal_weight[j] q[t - j + P]
//   dx = du gate        ds = du u (1 - gate) for the sigmoid, du x gate'(s) for SiLU
namespace fastasr::cpu {
namespace {

// q = grad act'(z + bias)
template <GatedActivation kActivation, typename T, typename C>
FASTASR_INLINE void output_gradient(const T* __restrict grad, const C* __restrict z, const C* __restrict bias,
                                    int64_t n, C* __restrict q) {
#ifdef __AVX512F__
  if constexpr (kActivation != GatedActivation::identity && !std::is_same_v<T, double>) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int64_t c = 0; c < n; c += 16) {
      const __m512 v = _mm512_add_ps(_mm512_load_ps(z + c), _mm512_load_ps(bias + c));
      __m512 d;
      if constexpr (kActivation == GatedActivation::silu) {
        const __m512 s = FASTASR_SIMD::logistic(v);
        d = _mm512_mul_ps(s, _mm512_fmadd_ps(v, _mm512_sub_ps(one, s), one));
      } else {
        d = _mm512_sub_ps(FASTASR_SIMD::logistic(_mm512_sub_ps(v, one)), _mm512_set1_ps(0.08f));
      }
      _mm512_store_ps(q + c, _mm512_mul_ps(FASTASR_SIMD::load16(grad + c, FASTASR_SIMD::lanes(n - c)), d));
    }
    return;
  }
#endif
#pragma omp simd
  for (int64_t c = 0; c < n; c++) {
    C d = 1;
    if constexpr (kActivation == GatedActivation::swoosh_r) {
      d = sigmoid(z[c] + bias[c] - C(1)) - C(0.08);
    } else if constexpr (kActivation == GatedActivation::silu) {
      const C v = z[c] + bias[c], s = sigmoid(v);
      d = s * (C(1) + v * (C(1) - s));
    }
    q[c] = static_cast<C>(load(grad[c])) * d;
  }
}

template <typename C>
FASTASR_INLINE void scaled(const C* __restrict q, const C* __restrict left, const C* __restrict right,
                           C* __restrict r) {
#pragma omp simd
  for (int64_t c = 0; c < kStripe; c++) r[c] = q[c] * (C(1) + (left[c] + right[c]));
}

template <typename C>
FASTASR_INLINE void add_product(const C* __restrict a, const C* __restrict b, C* __restrict sum) {
#pragma omp simd
  for (int64_t c = 0; c < kStripe; c++) sum[c] += a[c] * b[c];
}

template <typename C>
FASTASR_INLINE void add_row(const C* __restrict row, C* __restrict sum) {
#pragma omp simd
  for (int64_t c = 0; c < kStripe; c++) sum[c] += row[c];
}

// `of_s` is u for the sigmoid, and the slope for SiLU.
template <Gate kGate, typename T, typename C>
FASTASR_INLINE void gate_gradient(const C* __restrict du, const C* __restrict of_s, const C* __restrict gate, int64_t n,
                                  T* __restrict dx, T* __restrict ds) {
#pragma omp simd
  for (int64_t c = 0; c < n; c++) {
    store(&dx[c], du[c] * gate[c]);
    store(&ds[c], kGate == Gate::silu ? du[c] * of_s[c] : du[c] * of_s[c] * (C(1) - gate[c]));
  }
}

template <typename T>
class Backward : Convolution<T> {
  using Base = Convolution<T>;
  using Base::conv_, Base::pad_, Base::bias_, Base::z_, Base::e_, Base::copy_, Base::taps_, Base::causal_;
  using typename Base::C;

 public:
  explicit Backward(const GatedDepthwiseConv<T>& conv)
      : Base(conv),
        reach_(conv.taps - 1),
        weight_row_(1),
        causal_bias_row_(weight_row_ + whole_tiles(conv.taps)),
        causal_row_(causal_bias_row_ + 1),
        edge_row_(causal_row_ + whole_tiles(pad_ + 1)),
        sums_(conv.chunked() ? edge_row_ + 2 * conv.taps : causal_bias_row_),
        u_(kBlock + reach_ + 2 * kTile),
        gate_(kBlock + reach_ + 2 * kTile),
        slope_(conv.gate == Gate::silu ? kBlock + reach_ + 2 * kTile : 0),
        q_(kBlock + reach_ + 2 * kTile),
        r_(conv.chunked() ? kBlock + reach_ + 2 * kTile : 0) {}

  struct Gradient {
    const T* grad;
    int64_t time, batch;
    T *dh, *dcache;
  };

  void run(const Gradient& g, C* parts, int64_t groups, int64_t begin, int64_t end) {
    const int64_t each = (conv_.count() + groups - 1) / groups;
    for (int64_t task = begin, staged = -1; task < end; task++) {
      const int64_t group = task % groups;
      const Stripe<T> stripe(conv_, task / groups, 0);
      if (staged != stripe.first) this->stage_weights(stripe), staged = stripe.first;
      sums_.clear();
      for (int64_t i = group * each; i < std::min(conv_.count(), (group + 1) * each); i++)
        recording(Stripe<T>(conv_, task / groups, i), g);
      write_sums(stripe, parts + group * conv_.sums() * conv_.channels);
    }
  }

 private:
  // Row r of u_, gate_ and slope_ is frame t - P + r; row r of q_ and r_ is frame t - (K - 1) + r.
  void recording(const Stripe<T>& stripe, const Gradient& g) {
    const int64_t frames = stripe.frames, reach = reach_, future = reach - pad_;
    stage<true>(stripe, -pad_, reach, u_[0], gate_[0], slopes(0));
    clear_rows(q_[0], reach);
    if (conv_.chunked()) clear_rows(r_[0], reach);
    int64_t chained = 0;
    for (int64_t t = 0; t < frames + pad_;) {
      const bool within = t < frames;
      const int64_t end =
          within ? block_end(t, kBlock, frames, stripe.chunk, conv_.chunked()) : std::min(t + kBlock, frames + pad_);
      const int64_t n = end - t;
      stage<true>(stripe, t + future, n, u_[reach], gate_[reach], slopes(reach));
      if (within) {
        if (conv_.activation != GatedActivation::identity || conv_.chunked()) {
          this->convolve_block(stripe, u_[0], t, end, [&](int64_t i) { stripe.prefetch(end + future + i, kTile); });
        }
        output_gradients(stripe, g, t, end);
        tap_gradients(stripe, t, end);
        chained += n / stripe.chunk + 1;
        if (conv_.chunked() && chained > kChain)  // chunks whose edges are one chain
          sums_.carry(edge_row_, 2 * conv_.taps), chained = 0;
      } else {
        clear_rows(q_[reach], n);
        if (conv_.chunked()) clear_rows(r_[reach], n);
      }
      input_gradients(stripe, g, t, end);
      for (Rows<C>* ring : {&u_, &gate_, &slope_, &q_, &r_})
        if ((ring != &r_ || conv_.chunked()) && (ring != &slope_ || conv_.gate == Gate::silu))
          std::memmove((*ring)[0], (*ring)[n], sizeof(C) * static_cast<size_t>(reach * kStripe));
      t = end;
    }
    if (conv_.chunked()) sums_.carry(edge_row_, 2 * conv_.taps);
  }

  C* slopes(int64_t row) { return conv_.gate == Gate::silu ? slope_[row] : nullptr; }

  const T* row_of(const Gradient& g, const Stripe<T>& stripe, int64_t t) const {
    return g.grad + stripe.offset(t, g.time, g.batch) + stripe.first;
  }

  T* output(const Stripe<T>& stripe, const Gradient& g, int64_t t) const {
    return g.dh + stripe.row(t) * 2 * conv_.channels + stripe.first;
  }

  void output_gradients(const Stripe<T>& stripe, const Gradient& g, int64_t t, int64_t end) {
    const int64_t reach = reach_, n = end - t;
    C *q = q_[reach], *z = z_[0];
    for (int64_t i = t; i < end; i++, q += kStripe, z += kStripe) {
      if (conv_.activation == GatedActivation::swoosh_r)
        output_gradient<GatedActivation::swoosh_r>(row_of(g, stripe, i), z, bias_[0], stripe.channels, q);
      else if (conv_.activation == GatedActivation::silu)
        output_gradient<GatedActivation::silu>(row_of(g, stripe, i), z, bias_[0], stripe.channels, q);
      else
        output_gradient<GatedActivation::identity>(row_of(g, stripe, i), z, bias_[0], stripe.channels, q);
    }
    sums_.add(conv_.chunked() ? causal_bias_row_ : 0, q_[reach], n);
    if (!conv_.chunked()) return;
    for (int64_t i = t; i < end; i++) {
      const int64_t chunk = stripe.chunk, p = i % chunk;
      const C* row = q_[reach + i - t];
      scaled(row, this->left(p), this->right(p, chunk), r_[reach + i - t]);
      if (this->has_left(p)) add_product(row, e_[i - t], sums_.part(edge_row_ + p));
      if (this->has_right(p, chunk)) add_product(row, e_[i - t], sums_.part(edge_row_ + 2 * conv_.taps + p - chunk));
    }
    sums_.add(0, r_[reach], n);
  }

  void tap_gradients(const Stripe<T>& stripe, int64_t t, int64_t end) {
    const int64_t reach = reach_, K = conv_.taps;
    if (!conv_.chunked()) {
      add_tap_gradients(u_[0], q_[reach], end - t, K, sums_.part(weight_row_));
      return sums_.carry(weight_row_, K);
    }
    add_tap_gradients(u_[0], q_[reach], end - t, pad_ + 1, sums_.part(causal_row_));
    sums_.carry(causal_row_, pad_ + 1);
    for_each_chunk(t, end, stripe.chunk, stripe.frames, [&](int64_t begin, int64_t stop, int64_t first, int64_t last) {
      const C* seen = window(u_[begin - t], begin, stop, first, last, pad_, copy_[0]);
      for (int64_t k = 0; k < K; k += kTile) {  // the frames from which one of these taps reaches into the chunk
        const int64_t low = std::max(begin, first - (k + kTile - 1) + pad_), high = std::min(stop, last - k + pad_);
        add_tap_gradient(seen + (low - begin + k) * kStripe, r_[reach + low - t], high - low,
                         sums_.part(weight_row_ + k));
      }
    });
    sums_.carry(weight_row_, K);
  }

  // These are frames [t - P, end - P): their gradient is complete.
  void input_gradients(const Stripe<T>& stripe, const Gradient& g, int64_t t, int64_t end) {
    const int64_t channels = conv_.channels, n = end - t, start = t - pad_;
    const int64_t low = std::max<int64_t>(start, 0), high = std::min(end - pad_, stripe.frames);
    const auto ahead = [&](int64_t i) {  // what the end of this block writes and the next one reads
      for (int64_t j = std::max(low, start + i); j < std::min(start + i + kTile, high); j++) {
        prefetch_row(output(stripe, g, j));
        prefetch_row(output(stripe, g, j) + channels);
      }
      for (int64_t j = end + i; j < std::min(end + i + kTile, stripe.frames); j++) prefetch_row(row_of(g, stripe, j));
    };
    if (!conv_.chunked()) {
      convolve_reversed(q_[0], taps_[0], conv_.taps, n, z_[0], ahead);
    } else {
      convolve_reversed(q_[pad_], causal_[0], pad_ + 1, n, z_[0], ahead);
      for_each_chunk(
          low, high, stripe.chunk, stripe.frames, [&](int64_t begin, int64_t stop, int64_t first, int64_t last) {
            const C* seen = window(r_[begin - pad_ - t + 2 * pad_], begin, stop, first, last, pad_, copy_[0]);
            convolve_chunk(seen, begin, stop, first, last, taps_[conv_.taps - 1], -kStripe, conv_.taps,
                           e_[begin - start]);
          });
      for (int64_t i = low; i < high; i++) add_row(e_[i - start], z_[i - start]);
    }
    if (g.dcache)
      for (int64_t i = start; i < std::min<int64_t>(0, start + n); i++)
        for (int64_t c = 0; c < stripe.channels; c++)
          store(&g.dcache[(stripe.batch * channels + stripe.first + c) * pad_ + pad_ + i], z_[i - start][c]);
    for (int64_t i = low; i < high; i++) {
      T* dx = output(stripe, g, i);
      const int64_t r = i - start;
      if (conv_.gate == Gate::silu)
        gate_gradient<Gate::silu>(z_[r], slope_[r], gate_[r], stripe.channels, dx, dx + channels);
      else if (stripe.channels == kStripe)
        gate_gradient<Gate::sigmoid>(z_[r], u_[r], gate_[r], kStripe, dx, dx + channels);
      else
        gate_gradient<Gate::sigmoid>(z_[r], u_[r], gate_[r], stripe.channels, dx, dx + channels);
    }
  }

  void write_sums(const Stripe<T>& stripe, C* parts) {
    const auto write = [&](int64_t row, int64_t rows) {
      for (int64_t i = 0; i < rows; i++, parts += conv_.channels)
        for (int64_t c = 0; c < stripe.channels; c++) parts[stripe.first + c] = static_cast<C>(sums_.total(row + i)[c]);
    };
    write(0, 1 + conv_.taps);
    if (!conv_.chunked()) return;
    write(causal_bias_row_, 1 + pad_ + 1);
    write(edge_row_, 2 * conv_.taps);
  }

  const int64_t reach_;
  // Rows of sums_; those of taps are whole tiles.
  const int64_t weight_row_, causal_bias_row_, causal_row_, edge_row_;
  Sums<C> sums_;
  Rows<C> u_, gate_, slope_, q_, r_;
};

template <typename T>
void backward(const GatedDepthwiseConv<T>& conv, const T* grad, int64_t grad_time, int64_t grad_batch, T* dh, T* dcache,
              compute_t<T>* parts, int64_t groups, int64_t begin, int64_t end) {
  if (begin < end) Backward<T>(conv).run({grad, grad_time, grad_batch, dh, dcache}, parts, groups, begin, end);
}

// Computes out[channel][column] = sum over groups of parts[group][row + column][channel], in order, in double.
template <typename T, typename Out>
void add_groups(const GatedDepthwiseConv<T>& conv, const compute_t<T>* parts, int64_t groups, int64_t row,
                int64_t columns, Out* out) {
  if (out == nullptr) return;
  for (int64_t k = 0; k < columns; k++)
    for (int64_t c = 0; c < conv.channels; c++) {
      double sum = 0;
      for (int64_t g = 0; g < groups; g++)
        sum += static_cast<double>(parts[(g * conv.sums() + row + k) * conv.channels + c]);
      store(&out[c * columns + k], static_cast<compute_t<T>>(sum));
    }
}

template <typename T>
void reduce(const GatedDepthwiseConv<T>& conv, const compute_t<T>* parts, int64_t groups, compute_t<T>* dweight,
            compute_t<T>* dbias, compute_t<T>* dcausal_weight, compute_t<T>* dcausal_bias, T* dchunk_scale) {
  const int64_t K = conv.taps, P = conv.past;
  add_groups(conv, parts, groups, 0, 1, dbias);
  add_groups(conv, parts, groups, 1, K, dweight);
  if (!conv.chunked()) return;
  add_groups(conv, parts, groups, 1 + K, 1, dcausal_bias);
  add_groups(conv, parts, groups, 2 + K, P + 1, dcausal_weight);
  add_groups(conv, parts, groups, 3 + K + P, K, dchunk_scale);
  add_groups(conv, parts, groups, 3 + K + P + K, K, dchunk_scale + conv.channels * K);
}

}  // namespace

FASTASR_KERNELS(GatedDepthwiseConvBackward, .run = backward<T>, .reduce = reduce<T>)

}  // namespace fastasr::cpu
