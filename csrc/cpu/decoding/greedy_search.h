// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/gemm/skinny_gemm.h"
#include "cpu/simd/kernels.h"
#include "cpu/support/sequence.h"
#include "cpu/support/workers.h"

// Greedy search of a transducer (RNN-T or TDT) over a batch, in one call. For a sequence at frame t with prediction g:
//
//   logits = head act(f_t + g)        token = argmax over tokens        duration = argmax over the durations, if any
//   blank: t advances by the duration, at least by 1; without durations by 1. g stays.
//   a label: t advances by the duration; without durations it stays. g = the predictor's output after this label.
//
// The first of several largest logits wins, and a NaN counts as the largest, as for torch.argmax. The predictor is
// embedding -> LSTM layers -> linear (-> LayerNorm), or without state embedding -> convolution over the last tokens,
// ReLU -> linear. Sequences advance on their own (label looping, Xu et al., 2024): one product over the head serves all
// that seek a label, and several of their next frames with the same g; one step of the predictor serves those that
// found one. The result for a sequence depends neither on the others nor on the number of threads.
//
// A step is bound by reading the weights, which are packed once in the order in which it reads them, in a WeightFormat.
namespace fastasr::cpu {

struct GreedyShape {
  int64_t tokens, durations;  // outputs of the head: tokens, blank included, then durations (0: none)
  int64_t joint, embedding;   // channels of f and g; of an embedding
  int64_t layers, hidden;     // LSTM layers (0: a predictor without state) and their units
  int64_t context, group;     // without state: tokens it sees, and the convolution's inputs per group (0: none)
  int64_t activation;         // the joint network's, see activation.h
  bool norm;                  // whether a LayerNorm follows the predictor's linear layer
  bool gate_norm;             // whether LSTM layers normalise gates and cells, as layer_norm_lstm.h
  double eps, gate_eps;       // epsilons of these norms
  WeightFormat format;

  FASTASR_MEMBER bool stateless() const { return layers == 0; }
  FASTASR_MEMBER int64_t products() const { return layers + 2; }
};

constexpr int64_t kMostLayers = 8;
constexpr int64_t kGateUnits = kPanelColumns / 4;  // units of a panel, each with its gates i, f, g, o

// The products in the order of the arena: LSTM layers with [x | h] as input, the predictor's linear layer, the head.
struct GreedyLayout {
  GreedyShape shape;
  struct Product {
    int64_t inputs, outputs;      // outputs of whole units for LSTM layers
    int64_t weight, scale, bias;  // bytes into the arena
  } product[kMostLayers + 2];
  int64_t convolution, norm_weight, norm_bias;  // bytes into the arena
  int64_t gate_norm[kMostLayers];               // the same: weight and bias of the gates' norm, then of the cells'
  int64_t bytes;
  int64_t state_floats;    // floats per sequence: h and c of each layer, g
  int64_t counter_fields;  // fields per sequence, see GreedyCounter; the tokens follow

  explicit GreedyLayout(const GreedyShape& shape);
  FASTASR_MEMBER const Product& projector() const { return product[shape.layers]; }
  FASTASR_MEMBER const Product& head() const { return product[shape.layers + 1]; }
  FASTASR_MEMBER int64_t stride(const Product& p) const { return panel_count(p.outputs) * kPanelColumns; }
};

// The integers of a sequence: its frame, labels since it last moved, whether the predictor has yet to read the last
// token, and the steps after which it reached its end (0 before). The predictor's last tokens follow, the newest last;
// a negative one embeds as zeros.
enum GreedyCounter { kGreedyFrame, kGreedySymbols, kGreedyPending, kGreedyEnd, kGreedyTokens };

// w_ih (4 hidden, inputs) and w_hh (4 hidden, hidden) with torch's order of gates, and the sum of both biases.
void greedy_pack_lstm(const GreedyLayout& layout, int64_t layer, const float* w_ih, const float* w_hh,
                      const float* bias_ih, const float* bias_hh, char* arena);
// The predictor's linear layer (`head` false) or the head: weight (outputs, inputs) and bias (outputs) or null.
void greedy_pack_linear(const GreedyLayout& layout, bool head, const float* weight, const float* bias, char* arena);
// convolution (embedding, group, context); both parameters of the norm.
void greedy_pack_vectors(const GreedyLayout& layout, const float* convolution, const float* norm_weight,
                         const float* norm_bias, char* arena);

// gate_weight, gate_bias (4 hidden), cell_weight, cell_bias (hidden).
void greedy_pack_gate_norm(const GreedyLayout& layout, int64_t layer, const float* const parameters[4], char* arena);

struct GreedyBatch {
  const GreedyLayout& layout;
  const char* arena;
  const float* embedding;         // (tokens, embedding)
  Sequence<const float> encoded;  // (frames, sequences, joint)
  int64_t batch, frames;
  const int64_t* lengths;    // frames of each sequence that are valid
  const int64_t* durations;  // values of the durations
  int64_t blank, skipped;    // `skipped` counts as blank; -1: none
  int64_t most_symbols;      // labels on one frame before the sequence is moved by 1; 0: any
  float penalty;             // subtracted from blank's logit
  // If true, all sequences take as many steps as the longest, on frames behind their end and then on the last of all
  // frames. If false, each ends at its own length.
  bool together;
  float* state;       // (batch, state_floats)
  int64_t* counters;  // (batch, counter_fields)
  // Steps: tokens with blanks, frames moved, log-probabilities of the tokens or null, (batch, most_steps), where a
  // sequence stops too; how many steps there are, (batch,). Behind them are zeros up to the largest number of steps.
  int64_t most_steps;
  int64_t *tokens, *moves;
  float* scores;
  int64_t* steps;
  float* scratch;  // scratch_floats floats
  Workers workers;
};

struct GreedyKernels {
  int64_t (*scratch_floats)(const GreedyBatch& batch);
  void (*run)(const GreedyBatch& batch);
};

}  // namespace fastasr::cpu
