// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// One decoding step of a stack of MEGA blocks (Ma et al., 2023, in ESPnet's form), for `rows` hypotheses. Per block,
// with silu(a) = a sigmoid(a), x the block's input (D), h the state of its moving average (D, N):
//
//   v = silu(V x)                                        value (v), appended to the history
//   h' = p beta x + q h;  e = silu(sum_n s gamma_n h'_n + omega x)
//   [u | z | r | hx] = M e                               D, k, v, D columns
//   query = (silu(z) w_0 + b_0) / sqrt(k);  key = silu(z) w_1 + b_1, appended to the history
//   a = sum_j softmax_j(query . key_j + bias_{j - T}) v_j * silu(r)
//   x = LayerNorm(x + sigmoid(u) (silu(hx + H a) - x))
//   x = LayerNorm(x + O silu(I x))                       feed-forward
//
// and a last LayerNorm. All weights lie in one arena in the order in which they are read: a step is one pass over it.
namespace fastasr::cpu {

// The widths: D is block_size, N the orders of the moving average, k and v the widths of keys and values, and `inner`
// is the feed-forward's.
struct MegaShape {
  int64_t size, orders, key, value, inner, blocks;
};

// The parts of a block besides its products: vectors, `count` floats each in the arena.
enum MegaVector {
  kMegaInput,       // p beta (D, N)
  kMegaDecay,       // q (D, N)
  kMegaProjection,  // s gamma (D, N)
  kMegaResidual,    // omega (D)
  kMegaQueryScale,  // w_0 / sqrt(k)
  kMegaQueryBias,   // b_0 / sqrt(k)
  kMegaKeyScale,    // w_1
  kMegaKeyBias,     // b_1
  kMegaNormScale,   // norm of the gated residual
  kMegaNormBias,
  kMegaNormEps,
  kMegaOuterNormScale,  // norm of the feed-forward
  kMegaOuterNormBias,
  kMegaOuterNormEps,
  kMegaVectors
};

// The products in the order in which a step calls them. M is packed as four, so that each begins with a panel.
enum MegaProduct { kMegaV, kMegaU, kMegaZ, kMegaR, kMegaHx, kMegaH, kMegaI, kMegaO, kMegaProducts };

struct MegaLayout {
  MegaShape shape;
  int64_t vector[kMegaVectors], vector_size[kMegaVectors];                       // offsets within a block; sizes
  int64_t weight[kMegaProducts], bias[kMegaProducts];                            // offsets within a block
  int64_t inputs[kMegaProducts], outputs[kMegaProducts], stride[kMegaProducts];  // K, N, floats of a padded output row
  int64_t block;                                                                 // floats of a block
  int64_t final_scale, final_bias, final_eps, total;

  explicit MegaLayout(const MegaShape& shape);
};

// The parameters of a block as its modules hold them, contiguous. A null bias counts as zeros, a null LayerNorm weight
// as ones.
struct MegaParameters {
  const float *damping, *decay, *expansion, *projection, *residual;  // (D, N) four times, (D)
  const float *v_weight, *v_bias, *mx_weight, *mx_bias, *h_weight, *h_bias;
  const float *qk_weight, *qk_bias;  // (2, k)
  const float *norm_weight, *norm_bias;
  const float *inner_weight, *inner_bias, *outer_weight, *outer_bias;
  const float *outer_norm_weight, *outer_norm_bias;
  float norm_eps, outer_norm_eps;
};

void mega_pack_block(const MegaLayout& layout, const MegaParameters& parameters, float* block);
void mega_pack_final(const MegaLayout& layout, const float* weight, const float* bias, float eps, float* arena);

// The products that may run side by side: their panels have consecutive numbers, in any split over threads.
struct Product {
  const float* x;
  int64_t x_stride, inputs;
  const float *packed, *bias;
  float* y;
  int64_t y_stride, panels;
  bool silu;
};
struct MegaKernels {
  void (*products)(const Product* products, int64_t count, int64_t rows, int64_t begin, int64_t end);
  // state may be null (zeros) and may be next. x, y: rows of `stride` floats; states (rows, D, N).
  void (*average)(const MegaLayout& layout, const float* block, const float* x, const float* state, float* next,
                  float* y, int64_t stride, int64_t rows);
  // z is silu(z) already; the query is written, and the key goes to the history.
  void (*query_key)(const MegaLayout& layout, const float* block, const float* z, float* query, float* key);
  // Attends for one hypothesis: keys and values of `length` rows, `bias` of `length` entries, `gate` silu(r), room for
  // `length` scores. out must not be gate.
  void (*attention)(const MegaLayout& layout, const float* query, const float* keys, int64_t key_stride,
                    const float* values, int64_t value_stride, int64_t length, const float* bias, const float* gate,
                    float* scores, float* out);
  // Computes x = LayerNorm(x + sigmoid(u) (silu(hx + h) - x)).
  void (*gated_norm)(float* x, const float* u, const float* hx, const float* h, const float* scale, const float* bias,
                     float eps, int64_t channels);
  // Computes out = LayerNorm(x + y); y may be null, out may be x.
  void (*norm)(const float* x, const float* y, const float* scale, const float* bias, float eps, float* out,
               int64_t channels);
};

}  // namespace fastasr::cpu
