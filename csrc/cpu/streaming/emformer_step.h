// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/gemm/skinny_gemm.h"
#include "cpu/simd/kernels.h"
#include "cpu/support/sequence.h"
#include "cpu/support/workers.h"

// One segment of a stream through one layer of an Emformer (Shi et al., 2021; torchaudio's form), for a few streams:
//
//   x = [right context | utterance]   h = LN(x)   summary = mean over the utterance's h (with memory)
//   q = Q [h | summary]               [k | v] = KV [memory | h]
//   a = O attention(q, [memory | right context | left context | utterance])        segment_attention.h
//   m = tanh(a of the summary), or clamped to ±10
//   z = x + a of x                    y = LN(z + W2 act(W1 LN(z)))
//
// A step changes the states so: memory moves up by one row, and the layer's own input memory becomes its last; keys and
// values keep the rows of [left context | utterance] that `kept` names. All weights lie in one arena in the order in
// which they are read. A stream's bits depend neither on the other streams nor on the number of threads.
namespace fastasr::cpu {

struct EmformerShape {
  int64_t dim, heads, inner;
  int64_t activation;  // see activation.h
  bool tanh_memory;
  double eps[3];  // epsilons of the norms
};

enum EmformerProduct { kEmformerKeyValue, kEmformerQuery, kEmformerOut, kEmformerInner, kEmformerOuter };
constexpr int kEmformerProducts = 5;
enum EmformerNorm { kEmformerInput, kEmformerForward, kEmformerOutput };
constexpr int kEmformerNorms = 3;

struct EmformerLayout {
  EmformerShape shape;
  int64_t inputs[kEmformerProducts], outputs[kEmformerProducts];
  int64_t weight[kEmformerProducts], bias[kEmformerProducts];      // floats into the arena
  int64_t norm_weight[kEmformerNorms], norm_bias[kEmformerNorms];  // the same
  int64_t total;                                                   // floats of the arena

  explicit EmformerLayout(const EmformerShape& shape);
  FASTASR_MEMBER int64_t stride(EmformerProduct p) const {
    return panel_count(outputs[p]) * kPanelColumns;
  }  // of an output row
};

// w (outputs, inputs) and bias (outputs), contiguous; weight and bias (dim) of a norm.
void emformer_pack_product(const EmformerLayout& layout, EmformerProduct product, const float* w, const float* bias,
                           float* arena);
void emformer_pack_norm(const EmformerLayout& layout, EmformerNorm norm, const float* weight, const float* bias,
                        float* arena);

struct EmformerSegment {
  const EmformerLayout& layout;
  const float* arena;
  int64_t streams, frames, right, left, memory;
  // (frames, streams, dim), (right, streams, dim); (1, streams, dim), the input memory, not read without memory
  Sequence<const float> utterance, right_context, mems;
  const float *old_memory, *old_key, *old_value;  // (memory or left, streams, dim), contiguous
  const int64_t* lengths;                         // (streams,), or null
  const int64_t* history;                         // rows of left context and of memory that are there
  const int64_t* kept;                            // (left,), each within [0, left + frames)
  float* y;                                       // (right + frames, streams, dim)
  float* next_mems;                               // (1, streams, dim)
  float *new_memory, *new_key, *new_value;        // like the old ones, in other memory
  float* scratch;                                 // scratch_floats floats
  Workers workers;

  FASTASR_MEMBER int64_t rows() const { return (right + frames) * streams; }
  FASTASR_MEMBER int64_t summaries() const { return memory ? streams : 0; }
};

struct EmformerKernels {
  int64_t (*scratch_floats)(const EmformerSegment& segment);
  void (*step)(const EmformerSegment& segment);
};

}  // namespace fastasr::cpu
