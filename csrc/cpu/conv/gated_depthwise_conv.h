// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// The core of a Conformer's or Zipformer's convolution module, time-major. h (T, B, 2 C) = (x, s), u = x gate(s), with
// sigmoid or SiLU as the gate, and 0 where masked and outside [0, T); P frames of the past: in chunk-causal form K is
// odd and P = K / 2.
//
//   plain          z[t] = bias + sum_k weight[k] u[t + k - P], 0 <= P < K
//   chunk-causal   z[t] = causal_bias + sum_{j <= P} causal_weight[j] u[t + j - P]
//                         + scale[t mod S] (bias + sum_k weight[k] u[t + k - P], frames of t's chunk of S alone)
//                  scale[p] = 1 + L[p] (p < K) + R[p - (S - K)] (p >= S - K),  chunk_scale = (L, R), each (C, K)
//   y = z, SwooshR(z) or SiLU(z). u of the P frames before the first is the cache, or 0.
namespace fastasr::cpu {

enum class GatedActivation : int { identity, swoosh_r, silu };
enum class Gate : int { sigmoid, silu };

template <typename T>
struct GatedDepthwiseConv {
  const T* h;
  int64_t h_time, h_batch;                         // strides; channels are contiguous
  const compute_t<T>*weight, *bias;                // (C, K), (C) or null
  const compute_t<T>*causal_weight, *causal_bias;  // (C, P + 1) or null: plain; (C) or null
  const T* chunk_scale;                            // (2, C, K) or null: plain
  const bool* mask;                                // (B, T) or null; true: padding
  const T* cache;                                  // (B, C, P) or null
  int64_t frames, batch, channels, taps;           // T, B, C, K
  int64_t past;                                    // P
  int64_t chunk;                                   // S, 1 <= S <= max(T, 1)
  GatedActivation activation;
  Gate gate = Gate::sigmoid;
  // Recordings in every sequence, which do not see each other: frames [starts[r], starts[r + 1]). Null: one of all
  // frames. With more than one: no cache; each begins a chunk, and is one of its own length if it is shorter than S.
  int64_t recordings = 1;
  const int64_t* starts = nullptr;

  // Recordings of all sequences, sequence by sequence.
  FASTASR_MEMBER int64_t count() const { return batch * recordings; }
  FASTASR_MEMBER bool chunked() const { return causal_weight != nullptr; }
  // Each channel has these sums: dbias, dweight; in chunk-causal form also dcausal_bias, dcausal_weight, dL, dR.
  FASTASR_MEMBER int64_t sums() const { return chunked() ? 2 + taps + past + 1 + 2 * taps : 1 + taps; }
};

// Work is cut into stripes of kGatedStripe channels.
constexpr int64_t kGatedStripe = 32;

// Backward cuts the recordings into this many groups of neighbours, whatever the number of threads.
constexpr int64_t kGatedGroups = 4;

template <typename T>
struct GatedDepthwiseConvForward {
  // Computes tasks [begin, end) of stripes x count(). y (T, B, C) is contiguous. new_cache (B, C, P), unless null,
  // receives u of the last P frames.
  void (*run)(const GatedDepthwiseConv<T>& conv, T* y, T* new_cache, int64_t begin, int64_t end);
};

template <typename T>
struct GatedDepthwiseConvBackward {
  // Computes tasks [begin, end) of stripes x groups. grad of y has strides; dh (T, B, 2 C) is contiguous; dcache is (B,
  // C, P) or null; parts[group][sum][channel] is overwritten.
  void (*run)(const GatedDepthwiseConv<T>& conv, const T* grad, int64_t grad_time, int64_t grad_batch, T* dh, T* dcache,
              compute_t<T>* parts, int64_t groups, int64_t begin, int64_t end);
  // Adds parts into the gradients (those of absent tensors are null).
  void (*reduce)(const GatedDepthwiseConv<T>& conv, const compute_t<T>* parts, int64_t groups, compute_t<T>* dweight,
                 compute_t<T>* dbias, compute_t<T>* dcausal_weight, compute_t<T>* dcausal_bias, T* dchunk_scale);
};

}  // namespace fastasr::cpu
