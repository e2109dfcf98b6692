// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/gemm/reduced_gemm.h"
#include "cpu/gemm/skinny_gemm.h"
#include "cpu/simd/kernels.h"
#include "cpu/streaming/zipformer_layer.h"
#include "cpu/support/workers.h"

// One chunk of a streaming Zipformer (Yao et al., 2023; the causal variant), front end and encoder, for several streams
// at once. Everything it reads lies in three blocks of memory: weights, packed into panels in the order in which they
// are read (see skinny_gemm.h); small vectors (biases, position scores' table, convolutions); and each stream's states.
//
// A stream's keys, values and gated convolution inputs lie in rings: `slack` chunks are appended behind the left
// context before it is moved back to the front, so that a chunk copies little. Streams share only the matrix products,
// which compute each row with the same operations whatever the other rows: a stream's bits depend neither on the others
// nor on the number of threads.
namespace fastasr::cpu {

struct ChunkShape {
  int64_t chunk = 0, left = 0;  // frames at 50 Hz, before the stacks' own downsampling
  // the front end: most features, channels of the convolutions, of ConvNeXt's hidden rows
  int64_t bins = 0, maps[3] = {}, expanded = 0;
  WeightFormat weights = WeightFormat::fp32;  // format of the products, see also rounds_inputs
  std::vector<ZipformerSizes> stacks;

  // Reads the sizes of each_size, then those of each stack. If they do not describe an encoder that this step serves,
  // `stacks` stays empty.
  explicit ChunkShape(const std::vector<int64_t>& sizes);
  ChunkShape() = default;

  // Does as ZipformerSizes::each_size does, for the sizes of EncoderSizes in fastasr/models/zipformer/packing.py.
  template <typename F>
  void each_size(const F& f) {
    f("chunk", chunk), f("left", left), f("bins", bins), f("maps1", maps[0]), f("maps2", maps[1]), f("maps3", maps[2]);
    f("expanded", expanded), f("weights", weights);
  }

  FASTASR_MEMBER int64_t input_frames() const { return 2 * chunk + 13; }
  // Returns the bins of the second and third convolution's maps.
  static FASTASR_MEMBER int64_t width2_of(int64_t bins) { return (bins - 1) / 2; }
  static FASTASR_MEMBER int64_t width3_of(int64_t bins) { return (width2_of(bins) - 1) / 2; }
  FASTASR_MEMBER int64_t width2() const { return width2_of(bins); }
  FASTASR_MEMBER int64_t width3() const { return width3_of(bins); }
  int64_t output_dim() const;
  // Says whether products round their inputs as well and run in reduced_gemm.h, which they do where that is faster. If
  // not, skinny_gemm.h widens the weights, and the front end's stay in fp32.
  bool rounds_inputs() const;
};

FASTASR_INLINE constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// A stripe has this many channels: widths within the states are multiples of it.
inline constexpr int64_t kChunkLanes = 16;
inline constexpr int64_t kFrontPast = 3;  // ConvNeXt has this many frames of left padding.

// y = x Wᵀ + bias, by skinny_gemm.h, or by reduced_gemm.h, which rounds x as well. The offsets are bytes into the
// weights and floats into the vectors, where in int8 a scale and a sum follow each other for every output.
struct ChunkProduct {
  int64_t inputs, outputs, weight, bias, scale;
  WeightFormat format;
  bool rounds_inputs;
  int64_t stride() const;  // floats of an output row, whole panels
  FASTASR_MEMBER Panels panels(const char* weights, const float* vectors) const {
    return {weights + weight, format, vectors + scale};
  }
  FASTASR_MEMBER ReducedWeights reduced(const char* weights, const float* vectors) const {
    return {reinterpret_cast<const int32_t*>(weights + weight), vectors + scale,
            reinterpret_cast<const int32_t*>(vectors + sums())};
  }
  FASTASR_MEMBER int64_t sums() const { return scale + (scale - bias); }
};

// rows x columns floats among the vectors, with rows `stride` apart and zeros behind the columns.
struct ChunkTable {
  int64_t at, rows, columns, stride;
};

struct ChunkConvolution {
  ChunkTable causal, causal_bias, chunkwise, chunkwise_bias, scale;  // taps x channels; scale: frames x channels
  int64_t ring;                                                      // in the states: (pad + frames) x channels
};

struct ChunkLayer : ZipformerProducts<ChunkProduct> {
  ChunkTable positions;  // (heads pos) x offsets: linear_pos(pos_emb), transposed
  ChunkConvolution conv[2];
  ChunkTable mid, bypass, norm_bias, norm_scale;
  int64_t keys, hidden, values[2];  // rings in the states
};

// The places of everything. `products` and `tables` have the order of the tensors that packing takes.
struct ChunkPlan {
  struct Stack {
    ZipformerSizes shape;
    int64_t frames, left, capacity, keys, pad;  // per chunk; of the context; of a ring; left + frames; taps / 2
    int64_t channels, hidden;                   // dim and hidden rounded up to stripes
    int64_t stride;                             // floats of a row of activations
    ChunkTable downsample, combine;             // only with factor > 1
    std::vector<ChunkLayer> layers;
  };
  ChunkShape shape;
  int64_t slack = 0;
  ChunkTable conv1, conv1_bias, depthwise, depthwise_bias, front_norm_bias, front_norm_scale, output;
  ChunkProduct conv2, conv3, expand, contract, front_out;
  int64_t front_past = 0;  // in the states: 3 frames of the third convolution
  std::vector<Stack> stacks;
  std::vector<ChunkProduct> products;
  std::vector<ChunkTable> tables;
  int64_t weight_bytes = 0, vector_floats = 0, state_floats = 0;

  explicit ChunkPlan(const ChunkShape& shape);
  // Returns the plan of one layer alone, whose rings have room for one chunk of `frames`.
  ChunkPlan(const ZipformerSizes& layer, int64_t frames, int64_t left);
  int64_t scratch_floats(int64_t streams) const;
};

// Packs w (outputs, inputs) and bias (outputs, or null: zeros), contiguous, of products[index]. A null weights or
// vectors is left alone; int8 weights need both, because their scales lie among the vectors.
void chunk_pack_product(const ChunkPlan& plan, int64_t index, const float* w, const float* bias, char* weights,
                        float* vectors);
void chunk_pack_table(const ChunkTable& table, const float* values, float* vectors);

// A stream has these besides its floats.
struct ChunkCounters {
  int64_t processed;  // frames at 50 Hz
  int64_t at;         // chunks behind the rings' front
};

struct ChunkStep {
  const ChunkPlan& plan;
  const char* weights;
  const float* vectors;
  float* states = nullptr;  // plan.state_floats per slot
  ChunkCounters* counters = nullptr;
  const int64_t* slots = nullptr;  // slots of the streams of this step, all different
  int64_t streams = 0, bins = 0;   // features of a frame: at most the plan's, and as wide after the convolutions
  float* scratch = nullptr;        // plan.scratch_floats(streams)
  Workers workers;
  const uint8_t* masked = nullptr;  // (streams, keys) of a layer alone, nonzero: masked; or null
};

struct ChunkKernels {
  // Maps features (streams, input_frames, bins), contiguous, to out (streams, chunk / 2, output_dim).
  void (*step)(const ChunkStep& step, const float* features, float* out);
  // Runs one layer, x (streams frames, stride) in place. It does not change the counters.
  void (*layer)(const ChunkStep& step, const ChunkPlan::Stack& stack, const ChunkLayer& layer, float* x);
};

// Before the layers of a chunk this makes room in the rings; after them it counts the chunk.
void chunk_begin(const ChunkStep& step);
void chunk_end(const ChunkStep& step);

// Copies the states of one stream to upstream's tensors, or from them: the six of each layer for one stream (see
// kLayerStates), then the front end's (maps[2], 3, width3).
void chunk_export(const ChunkPlan& plan, const float* state, const ChunkCounters& counters, float* const* tensors);
void chunk_import(const ChunkPlan& plan, const float* const* tensors, float* state, ChunkCounters* counters);

// One chunk through one layer, with the states as upstream's tensors. Copying them into the layout above and back takes
// a hundredth of the time of reading the layer's weights.

// The six states of a layer, contiguous: key (left, streams, heads query), hidden (streams, left, hidden), two values
// (left, streams, heads value), two convolutions (streams, dim, pad).
constexpr int64_t kLayerStates = 6;
int64_t layer_state_floats(const ChunkPlan::Stack& stack, int64_t index, int64_t streams);

int64_t layer_scratch_floats(const ChunkPlan& plan, int64_t streams);

// Maps x (frames, streams, dim), contiguous, to y of the same shape, and writes the states after it. `step` has the
// plan of one layer and layer_scratch_floats(plan, streams) of scratch memory; its states, counters and slots are
// unused.
void layer_step(ChunkStep step, const float* x, const float* const* states, float* y, float* const* after);

}  // namespace fastasr::cpu
