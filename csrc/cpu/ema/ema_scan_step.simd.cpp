// SPDX-License-Identifier: Apache-2.0
#include "cpu/ema/ema_scan.h"

#include <algorithm>
#include <cmath>

// One time step, as decoding takes it: states are read and written where they lie, (B, D, N), and nothing is packed.
namespace fastasr::cpu {
namespace {

// Computes h = q h + b x and y = sum over n of c h, for channels of one row of the batch. N > 0 is known when compiled.
template <int N, typename C>
__attribute__((noinline)) void channels_of(const C* __restrict x, const C* __restrict q, const C* __restrict b,
                                           const C* __restrict c, const C* __restrict before, C* __restrict after,
                                           C* __restrict y, int64_t channels, int64_t states) {
  if constexpr (N > 0) {
#pragma omp simd
    for (int64_t j = 0; j < channels; j++) {
      C sum = 0;
      for (int n = 0; n < N; n++) {
        const int64_t i = j * N + n;
        const C h = ema_decayed(before[i], q[i]) + b[i] * x[j];
        after[i] = h;
        sum += c[i] * h;
      }
      y[j] = sum;
    }
  } else {
    for (int64_t j = 0; j < channels; j++) {
      C sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t n = 0; n < states; n++) {
        const int64_t i = j * states + n;
        const C h = ema_decayed(before[i], q[i]) + b[i] * x[j];
        after[i] = h;
        sum += c[i] * h;
      }
      y[j] = sum;
    }
  }
}

// Computes coefficients of a few channels at a time, which every row of the batch then uses.
constexpr int64_t kValues = 1024;

template <typename T>
void run(const EmaShape& shape, const EmaParameters<compute_t<T>>& p, const T* x, EmaStrides xs, T* y, EmaStrides ys,
         compute_t<T>* final_state) {
  using C = compute_t<T>;
  const EmaTile<C>& tile = kernels<EmaTile<C>>();
  const EmaCopies<C>& copies = kernels<EmaTensor<T>>().copies;
  const auto step = shape.states == 4 ? channels_of<4, C> : shape.states == 1 ? channels_of<1, C> : channels_of<0, C>;
  alignas(64) C q[kValues], b[kValues], c[kValues], before[kValues], after[kValues];
  alignas(64) C plain[kValues], masked[kValues], out[kValues];
  const int64_t states = shape.states, most = kValues / states;
  const double scale = 1.0 / std::sqrt(static_cast<double>(states));
  for (int64_t first = 0; first < shape.channels; first += most) {
    const int64_t channels = std::min(most, shape.channels - first), at = first * states, n = channels * states;
    tile.coefficients(p.damping + at, p.decay + at, p.expansion + at, p.projection + at, scale, q, b, c, n);
    if (!p.state) std::fill(before, before + n, C(0));
    for (int64_t row = 0; row < shape.batch; row++) {
      const int64_t state = row * shape.channels * states + at;
      for (int64_t j = 0; j < channels; j += kEmaLanes) {
        const int64_t m = std::min(kEmaLanes, channels - j);
        copies.load(x, row * xs.batch + (first + j) * xs.channel, xs.time, xs.channel, nullptr, 0, 1, m, m, plain + j);
      }
      const C* in = plain;
      if (p.mask && p.mask[row]) std::fill(masked, masked + channels, C(0)), in = masked;
      const C* h = p.state ? p.state + state : before;
      C* h_out = final_state ? final_state + state : after;
      step(in, q, b, c, h, h_out, out, channels, states);
      for (int64_t j = 0; j < channels; j += kEmaLanes) {
        const int64_t m = std::min(kEmaLanes, channels - j);
        tile.activate(out + j, plain + j, p.residual ? p.residual + first + j : nullptr, shape.activation, 1, m);
        copies.store(out + j, y, row * ys.batch + (first + j) * ys.channel, ys.time, ys.channel, 1, m);
      }
    }
  }
}

}  // namespace

FASTASR_KERNELS(EmaStep, .run = run<T>)

}  // namespace fastasr::cpu
