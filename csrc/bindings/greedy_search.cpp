// SPDX-License-Identifier: Apache-2.0
#include "cpu/decoding/greedy_search.h"

#include "bindings/packed_weights.h"
#include "bindings/scratch.h"
#include "cpu/math/activation.h"

namespace fastasr::bindings::greedy_search {
namespace {

using cpu::GreedyLayout;

// numbers: tokens, durations, joint, embedding, layers, hidden, context, group, activation, norm, gate_norm, format;
// eps of both norms.
GreedyLayout layout_of(const std::vector<int64_t>& n, const std::vector<double>& eps) {
  bool fits = n.size() == 12 && eps.size() == 2;
  for (size_t i = 0; fits && i < n.size(); i++) fits = n[i] >= 0 && n[i] < (int64_t{1} << 31);
  fits = fits && n[0] && n[2] && n[3] && n[4] <= cpu::kMostLayers && (n[4] ? n[5] > 0 : n[6] > 0) &&
         (!n[7] || n[3] % n[7] == 0) && n[8] < cpu::kActivations && n[9] <= 1 && n[10] <= 1 && n[11] <= 3;
  check(fits, "greedy_search", "the numbers describe no transducer");
  return GreedyLayout({n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9] == 1, n[10] == 1, eps[0], eps[1],
                       static_cast<cpu::WeightFormat>(n[11])});
}

// lstm: w_ih, w_hh and both biases of each layer; linear: weight and bias of the predictor's linear layer and of the
// head; vectors: the convolution's, then weight and bias of the norm, then for each layer weight and bias of the gates'
// norm and of the cells' norm, where they exist.
Tensor greedy_pack(std::vector<int64_t> numbers, std::vector<double> eps, std::vector<Tensor> lstm,
                   std::vector<Tensor> linear, std::vector<Tensor> vectors) {
  const GreedyLayout l = layout_of(numbers, eps);
  const cpu::GreedyShape& s = l.shape;
  const size_t convolutions = s.group ? 1 : 0, norms = convolutions + (s.norm ? 2 : 0);
  check(static_cast<int64_t>(lstm.size()) == 4 * s.layers && linear.size() == 4 &&
            vectors.size() == norms + (s.gate_norm ? lstm.size() : 0),
        "greedy_pack", "the parameters are not those of the numbers");
  for (size_t i = 0; i < lstm.size(); i++) {
    const int64_t inputs = l.product[i / 4].inputs - s.hidden;
    check_floats(lstm[i], 4 * s.hidden * (i % 4 == 0 ? inputs : i % 4 == 1 ? s.hidden : 1), "a parameter of the LSTM");
  }
  for (size_t i = 0; i < 4; i++) {
    const GreedyLayout::Product& p = i < 2 ? l.projector() : l.head();
    check_floats(linear[i], p.outputs * (i % 2 ? 1 : p.inputs), "a parameter of a linear layer");
  }
  if (s.group) check_floats(vectors[0], s.embedding * s.group * s.context, "the convolution");
  for (size_t i = convolutions; i < norms; i++) check_floats(vectors[i], s.joint, "a parameter of the norm");
  for (size_t i = norms; i < vectors.size(); i++)
    check_floats(vectors[i], ((i - norms) % 4 < 2 ? 4 : 1) * s.hidden, "a parameter of the LSTM's norms");

  const Tensor packed = on_huge_pages(linear[0], l.bytes / 4);
  auto* const arena = reinterpret_cast<char*>(mutable_data<float>(packed));
  for (int64_t i = 0; i < s.layers; i++) {
    const Tensor* const p = lstm.data() + 4 * i;
    cpu::greedy_pack_lstm(l, i, data<float>(p[0]), data<float>(p[1]), data<float>(p[2]), data<float>(p[3]), arena);
    if (!s.gate_norm) continue;
    const Tensor* const v = vectors.data() + norms + 4 * static_cast<size_t>(i);
    const float* const parameters[4] = {data<float>(v[0]), data<float>(v[1]), data<float>(v[2]), data<float>(v[3])};
    cpu::greedy_pack_gate_norm(l, i, parameters, arena);
  }
  cpu::greedy_pack_linear(l, false, data<float>(linear[0]), data<float>(linear[1]), arena);
  cpu::greedy_pack_linear(l, true, data<float>(linear[2]), data<float>(linear[3]), arena);
  cpu::greedy_pack_vectors(l, s.group ? data<float>(vectors[0]) : nullptr,
                           s.norm ? data<float>(vectors[convolutions]) : nullptr,
                           s.norm ? data<float>(vectors[convolutions + 1]) : nullptr, arena);
  return packed;
}

bool is_integers(const Tensor& t, std::initializer_list<int64_t> sizes) {
  return t.is_cpu() && is_dense(t, ScalarType::Long, sizes);
}

// encoded (batch, frames, joint) with dense channels, lengths (batch,), state (batch, floats) and counters (batch,
// fields), which are updated; rules: blank, skipped, most_symbols, together, most_steps. Returns tokens, moves and
// scores (batch, most_steps), of which a sequence has the first steps (batch,), and these; no scores unless asked for.
std::vector<Tensor> greedy_search(std::vector<int64_t> numbers, std::vector<double> eps, const Tensor& packed,
                                  const Tensor& embedding, const Tensor& encoded, const Tensor& lengths,
                                  std::vector<int64_t> durations, std::vector<int64_t> rules, double penalty,
                                  Tensor state, Tensor counters, bool scored, int64_t threads) {
  const GreedyLayout l = layout_of(numbers, eps);
  const cpu::GreedyShape& s = l.shape;
  check_floats(packed, l.bytes / 4, "packed");
  check_floats(embedding, s.tokens * s.embedding, "embedding");
  check(encoded.dim() == 3 && encoded.is_cpu() && dtype_of(encoded) == ScalarType::Float &&
            encoded.size(2) == s.joint && (s.joint == 1 || encoded.stride(2) == 1),
        "greedy_search", "encoded is not (batch, frames, ", s.joint, ") with dense channels");
  const int64_t batch = encoded.size(0), frames = encoded.size(1);
  check(is_integers(lengths, {batch}) && is_integers(counters, {batch, l.counter_fields}), "greedy_search",
        "lengths or counters");
  check_floats(state, batch * l.state_floats, "state");
  check(rules.size() == 5 && rules[0] >= 0 && rules[0] < s.tokens && rules[2] >= 0 && rules[4] >= 0 && threads > 0 &&
            static_cast<int64_t>(durations.size()) == s.durations && (!rules[3] || frames > 0),
        "greedy_search", "rules or durations");
  for (const int64_t d : durations) check(d >= 0, "greedy_search", "a duration is negative");
  for (int64_t n = 0; n < batch; n++) {
    check(data<int64_t>(lengths)[n] >= 0 && data<int64_t>(lengths)[n] <= frames, "greedy_search", "lengths");
    const int64_t* const c = data<int64_t>(counters) + n * l.counter_fields;
    bool fits = c[cpu::kGreedyFrame] >= 0;
    for (int64_t i = cpu::kGreedyTokens; i < l.counter_fields; i++) fits = fits && c[i] < s.tokens;
    check(fits, "greedy_search", "counters");
  }
  std::vector<Tensor> out;
  for (int i = 0; i < 2; i++) out.push_back(new_contiguous(lengths, {batch, rules[4]}));
  out.push_back(new_contiguous(encoded, {batch, scored ? rules[4] : 0}));
  out.push_back(new_contiguous(lengths, {batch}));
  cpu::GreedyBatch b{.layout = l};
  b.arena = reinterpret_cast<const char*>(data<float>(packed)), b.embedding = data<float>(embedding);
  b.encoded = {data<float>(encoded), encoded.stride(1), encoded.stride(0)}, b.batch = batch, b.frames = frames;
  b.lengths = data<int64_t>(lengths), b.durations = durations.data();
  b.blank = rules[0], b.skipped = rules[1], b.most_symbols = rules[2], b.together = rules[3] != 0;
  b.penalty = static_cast<float>(penalty), b.state = mutable_data<float>(state);
  b.counters = mutable_data<int64_t>(counters), b.most_steps = rules[4], b.tokens = mutable_data<int64_t>(out[0]);
  b.moves = mutable_data<int64_t>(out[1]), b.scores = scored ? mutable_data<float>(out[2]) : nullptr;
  b.steps = mutable_data<int64_t>(out[3]), b.workers = {threads, run_parts};
  const auto& kernel = cpu::kernels<cpu::GreedyKernels>();
  const Scratch<float> scratch(kernel.scratch_floats(b));
  b.scratch = scratch.data();
  kernel.run(b);
  return out;
}

}  // namespace

FASTASR_UNDECLARED("fastasr/models/transducer/label_looping.py calls it under no_grad, with tensors that it made",
                   FASTASR_TYPED(greedy_pack), FASTASR_TYPED(greedy_search))

}  // namespace fastasr::bindings::greedy_search
