// SPDX-License-Identifier: Apache-2.0
#include "cpu/decoding/greedy_search.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/math/activation.h"
#include "cpu/rows/row_statistics.h"

namespace fastasr::cpu {
namespace {

constexpr int64_t kMostRows = 32;         // A product takes at most this many rows: more logits leave the cache.
constexpr int64_t kLeastWeights = 32768;  // A worker reads at least this many: waking it for fewer costs more.
constexpr int64_t kAlign = 16;            // floats of a cache line

constexpr int64_t aligned(int64_t floats) { return (floats + kAlign - 1) / kAlign * kAlign; }

// A row of a joint product: a frame of a sequence, and what was found.
struct Joined {
  int64_t sequence, frame, token, duration;
  float score;
};

// Divides the scratch memory.
struct Room {
  float* x[2];  // inputs of a product: those of one LSTM layer are written while the last one's are read
  float* y;     // outputs
  int64_t x_stride, size;

  Room(const GreedyLayout& l, float* memory) {
    int64_t outputs = 0;
    x_stride = 0;
    for (int64_t i = 0; i < l.shape.products(); i++) {
      x_stride = std::max(x_stride, aligned(l.product[i].inputs));
      outputs = std::max(outputs, l.stride(l.product[i]));
    }
    x[0] = memory;
    x[1] = memory + kMostRows * x_stride;
    y = memory + 2 * kMostRows * x_stride;
    size = kMostRows * (2 * x_stride + outputs);
  }
};

// Returns the place of the largest of n numbers, the first of several; a NaN counts as the largest.
int64_t largest(const float* x, int64_t n) {
  float most = -std::numeric_limits<float>::infinity();
  int nan = 0;
#pragma omp simd reduction(max : most) reduction(| : nan)
  for (int64_t i = 0; i < n; i++) {
    most = x[i] > most ? x[i] : most;
    nan |= x[i] != x[i];
  }
  int64_t i = 0;
  while (i < n - 1 && !(nan ? x[i] != x[i] : x[i] == most)) i++;
  return i;
}

// Returns log softmax(x)[best] for the largest of n numbers.
float log_probability(const float* x, int64_t n, int64_t best) {
  constexpr int64_t kChain = 512;
  const float most = x[best];
  double total = 0;
  for (int64_t from = 0; from < n; from += kChain) {
    const int64_t to = std::min(n, from + kChain);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = from; i < to; i++) sum += exp_or_zero(x[i] - most);
    total += static_cast<double>(sum);
  }
  return static_cast<float>(-std::log(total));
}

// Updates c and h of the `count` units of a panel from their gates.
void cell(const float* __restrict gates, float* c, float* h, float* next_x, int64_t count) {
  float new_c[kGateUnits], new_h[kGateUnits], old[kGateUnits] = {};
  std::memcpy(old, c, static_cast<size_t>(count) * 4);
#pragma omp simd
  for (int64_t i = 0; i < kGateUnits; i++) {
    new_c[i] = sigmoid(gates[kGateUnits + i]) * old[i] + sigmoid(gates[i]) * tanh(gates[2 * kGateUnits + i]);
    new_h[i] = sigmoid(gates[3 * kGateUnits + i]) * tanh(new_c[i]);
  }
  std::memcpy(c, new_c, static_cast<size_t>(count) * 4);
  std::memcpy(h, new_h, static_cast<size_t>(count) * 4);
  std::memcpy(next_x, new_h, static_cast<size_t>(count) * 4);
}

class Search {
 public:
  explicit Search(const GreedyBatch& b) : b_(b), l_(b.layout), s_(l_.shape), room_(l_, b.scratch) {}

  void run() {
    for (int64_t n = 0; n < b_.batch; n++) b_.steps[n] = 0;
    for (;;) {
      const int64_t goal = b_.together ? longest() : 0;
      int64_t pending = 0, seeking = 0;
      for (int64_t n = 0; n < b_.batch; n++)
        if (live(n, goal)) (counters(n)[kGreedyPending] ? pending : seeking)++;
      if (!pending && !seeking) break;
      // The predictor's weights are read once for all that wait for it, so it waits for half of them.
      if (pending >= seeking)
        predict(goal);
      else
        join(goal, seeking);
    }
    const int64_t longest = b_.batch ? *std::max_element(b_.steps, b_.steps + b_.batch) : 0;
    for (int64_t n = 0; n < b_.batch; n++) {
      const int64_t begin = n * b_.most_steps + b_.steps[n], end = n * b_.most_steps + longest;
      std::fill(b_.tokens + begin, b_.tokens + end, int64_t{0});
      std::fill(b_.moves + begin, b_.moves + end, int64_t{0});
      if (b_.scores) std::fill(b_.scores + begin, b_.scores + end, 0.0f);
    }
  }

 private:
  float* state(int64_t n) const { return b_.state + n * l_.state_floats; }
  float* prediction(int64_t n) const { return state(n) + 2 * s_.layers * s_.hidden; }
  int64_t* counters(int64_t n) const { return b_.counters + n * l_.counter_fields; }

  // Returns a number of steps that the batch surely takes; in the end it is the number.
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t n = 0; n < b_.batch; n++) {
      const int64_t end = counters(n)[kGreedyEnd];
      most = std::max(most, end ? end : std::min(b_.steps[n] + 1, b_.most_steps));
    }
    return most;
  }

  bool live(int64_t n, int64_t goal) const {
    if (b_.steps[n] >= b_.most_steps) return false;
    if (b_.together) return !counters(n)[kGreedyEnd] || b_.steps[n] < goal;
    return counters(n)[kGreedyFrame] < b_.lengths[n];
  }

  const float* vector(int64_t at) const { return reinterpret_cast<const float*>(b_.arena + at); }

  // Runs f(begin, end) over the panels of a product.
  template <typename F>
  void split_panels(const GreedyLayout::Product& p, const F& f) const {
    b_.workers.split(panel_count(p.outputs), kLeastWeights / (kPanelColumns * p.inputs) + 1, f);
  }

  // Computes panels [begin, end) of y = W x + bias.
  void panels(const GreedyLayout::Product& p, const float* x, int64_t rows, int64_t begin, int64_t end) const {
    skinny_gemm(x, room_.x_stride, rows, p.inputs, {b_.arena + p.weight, s_.format, vector(p.scale)}, vector(p.bias),
                room_.y, l_.stride(p), begin, end);
  }

  void predict(int64_t goal) {
    int64_t rows[kMostRows], count = 0;
    for (int64_t n = 0; n < b_.batch; n++) {
      if (live(n, goal) && counters(n)[kGreedyPending]) rows[count++] = n, counters(n)[kGreedyPending] = 0;
      if (count == kMostRows || (n == b_.batch - 1 && count)) predict_rows(rows, count), count = 0;
    }
  }

  void predict_rows(const int64_t* rows, int64_t count) const {
    float* x = room_.x[0];
    if (s_.stateless()) {
      for (int64_t i = 0; i < count; i++) convolve(counters(rows[i]) + kGreedyTokens, x + i * room_.x_stride);
    } else {
      for (int64_t i = 0; i < count; i++) embed(counters(rows[i])[kGreedyTokens], x + i * room_.x_stride);
      for (int64_t layer = 0; layer < s_.layers; layer++) x = lstm(layer, rows, count);
    }
    const GreedyLayout::Product& p = l_.projector();
    split_panels(p, [&](int64_t begin, int64_t end) { panels(p, x, count, begin, end); });
    for (int64_t i = 0; i < count; i++) {
      const float* const y = room_.y + i * l_.stride(p);
      std::memcpy(prediction(rows[i]), y, static_cast<size_t>(s_.joint) * 4);
      if (s_.norm) normalize(prediction(rows[i]), s_.joint, vector(l_.norm_weight), vector(l_.norm_bias), s_.eps);
    }
  }

  void embed(int64_t token, float* x) const {
    const auto size = static_cast<size_t>(s_.embedding) * 4;
    if (token < 0)
      std::memset(x, 0, size);
    else
      std::memcpy(x, b_.embedding + token * s_.embedding, size);
  }

  // Computes x = relu(convolution of the embeddings of these tokens); without one, x is the last one's.
  void convolve(const int64_t* tokens, float* x) const {
    if (!s_.group) return embed(tokens[s_.context - 1], x);
    const float* w = vector(l_.convolution);
    for (int64_t channel = 0; channel < s_.embedding; channel++) {
      const int64_t first = channel / s_.group * s_.group;
      float sum = 0;
      for (int64_t g = 0; g < s_.group; g++)
        for (int64_t j = 0; j < s_.context; j++, w++)
          if (tokens[j] >= 0) sum += *w * b_.embedding[tokens[j] * s_.embedding + first + g];
      x[channel] = activate<Activation::relu>(sum);
    }
  }

  // Runs a layer on the inputs in its half of the room. Returns the inputs of the product after it.
  float* lstm(int64_t layer, const int64_t* rows, int64_t count) const {
    const GreedyLayout::Product& p = l_.product[layer];
    float *const x = room_.x[layer % 2], *const next = room_.x[(layer + 1) % 2];
    const int64_t inputs = p.inputs - s_.hidden, at = 2 * layer * s_.hidden;
    for (int64_t i = 0; i < count; i++)
      std::memcpy(x + i * room_.x_stride + inputs, state(rows[i]) + at, static_cast<size_t>(s_.hidden) * 4);
    if (s_.gate_norm) return normalized_lstm(layer, rows, count, x, next);
    split_panels(p, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; panel++) {
        panels(p, x, count, panel, panel + 1);
        const int64_t unit = panel * kGateUnits, units = std::min(kGateUnits, s_.hidden - unit);
        for (int64_t i = 0; i < count; i++) {
          float* const h = state(rows[i]) + at + unit;
          cell(room_.y + i * l_.stride(p) + panel * kPanelColumns, h + s_.hidden, h, next + i * room_.x_stride + unit,
               units);
        }
      }
    });
    return next;
  }

  // Does the same for layers that normalise gates and cells.
  float* normalized_lstm(int64_t layer, const int64_t* rows, int64_t count, const float* x, float* next) const {
    const GreedyLayout::Product& p = l_.product[layer];
    const int64_t hidden = s_.hidden, at = 2 * layer * hidden;
    const float *const gate_weight = vector(l_.gate_norm[layer]), *const gate_bias = gate_weight + 4 * hidden,
                       *const cell_weight = gate_bias + 4 * hidden, *const cell_bias = cell_weight + hidden;
    split_panels(p, [&](int64_t begin, int64_t end) { panels(p, x, count, begin, end); });
    for (int64_t i = 0; i < count; i++) {
      float* __restrict gates = room_.y + i * l_.stride(p);
      float* __restrict h = state(rows[i]) + at, * __restrict c = h + hidden;
      normalize(gates, 4 * hidden, gate_weight, gate_bias, s_.gate_eps);
#pragma omp simd
      for (int64_t j = 0; j < hidden; j++)
        c[j] = sigmoid(gates[hidden + j]) * c[j] + sigmoid(gates[j]) * tanh(gates[2 * hidden + j]);
      normalize(c, hidden, cell_weight, cell_bias, s_.gate_eps);
#pragma omp simd
      for (int64_t j = 0; j < hidden; j++) h[j] = sigmoid(gates[3 * hidden + j]) * tanh(c[j]);
      std::memcpy(next + i * room_.x_stride, h, static_cast<size_t>(hidden) * 4);
    }
    return next;
  }

  static void normalize(float* __restrict x, int64_t n, const float* __restrict weight, const float* __restrict bias,
                        double eps) {
    const float scale = centre(x, n, eps).scale;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] = x[i] * scale * weight[i] + bias[i];
  }

  // The frames of a sequence that a product serves at once, one for each byte of a weight: reading the weights takes as
  // long as multiplying them with that many rows. A run of blanks is read off these frames.
  int64_t frames_at_once(int64_t seeking) const { return std::max<int64_t>(1, weight_bytes(s_.format) / seeking); }

  void join(int64_t goal, int64_t seeking) {
    const int64_t ahead = frames_at_once(seeking);
    Joined found[kMostRows];
    int64_t count = 0;
    const auto flush = [&] {
      if (count) join_rows(found, count);
      for (int64_t i = 0; i < count;) {
        const int64_t n = found[i].sequence;
        int64_t last = i;
        while (last < count && found[last].sequence == n) last++;
        follow(found + i, last - i, goal);
        i = last;
      }
      count = 0;
    };
    for (int64_t n = 0; n < b_.batch; n++) {
      if (!live(n, goal) || counters(n)[kGreedyPending]) continue;
      if (count + ahead > kMostRows) flush();
      const int64_t first = frame(n), end = b_.together ? b_.frames : b_.lengths[n];
      for (int64_t t = first; t < std::min(first + ahead, end); t++) found[count++] = {n, t, 0, 0, 0};
    }
    flush();
  }

  // Returns the frame that a sequence reads.
  int64_t frame(int64_t n) const { return std::min(counters(n)[kGreedyFrame], b_.frames - 1); }

  void join_rows(Joined* found, int64_t count) const {
    float* const x = room_.x[0];
    for (int64_t i = 0; i < count; i++) {
      float* __restrict row = x + i * room_.x_stride;
      const float* __restrict f = b_.encoded.at(found[i].frame, found[i].sequence);
      const float* __restrict g = prediction(found[i].sequence);
#pragma omp simd
      for (int64_t j = 0; j < s_.joint; j++) row[j] = f[j] + g[j];
      activate(static_cast<int>(s_.activation), row, s_.joint);
    }
    const GreedyLayout::Product& p = l_.head();
    split_panels(p, [&](int64_t begin, int64_t end) { panels(p, x, count, begin, end); });
    b_.workers.split(count, kLeastWeights / (4 * p.outputs) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        float* const logits = room_.y + i * l_.stride(p);
        logits[b_.blank] -= b_.penalty;
        found[i].token = largest(logits, s_.tokens);
        if (s_.durations) found[i].duration = largest(logits + s_.tokens, s_.durations);
        if (b_.scores) found[i].score = log_probability(logits, s_.tokens, found[i].token);
      }
    });
  }

  // Takes the steps of a sequence for which the product has the frame.
  void follow(const Joined* found, int64_t count, int64_t goal) const {
    const int64_t n = found->sequence, first = found->frame;
    while (live(n, goal) && !counters(n)[kGreedyPending] && frame(n) - first < count) take(found[frame(n) - first]);
  }

  void take(const Joined& f) const {
    const int64_t n = f.sequence, at = n * b_.most_steps + b_.steps[n]++;
    int64_t* const c = counters(n);
    const bool blank = f.token == b_.blank || f.token == b_.skipped;
    int64_t moved = s_.durations ? b_.durations[f.duration] : 0;
    if (blank) moved = std::max<int64_t>(1, moved);
    c[kGreedySymbols] = blank || moved ? 0 : c[kGreedySymbols] + 1;
    if (b_.most_symbols && c[kGreedySymbols] >= b_.most_symbols) moved = 1, c[kGreedySymbols] = 0;
    c[kGreedyFrame] += moved;
    if (!c[kGreedyEnd] && c[kGreedyFrame] >= b_.lengths[n]) c[kGreedyEnd] = b_.steps[n];
    b_.tokens[at] = f.token, b_.moves[at] = moved;
    if (b_.scores) b_.scores[at] = f.score;
    if (blank) return;
    const int64_t kept = l_.counter_fields - kGreedyTokens - 1;
    std::copy_n(c + kGreedyTokens + 1, kept, c + kGreedyTokens);
    c[kGreedyTokens + kept] = f.token;
    c[kGreedyPending] = 1;
  }

  const GreedyBatch& b_;
  const GreedyLayout& l_;
  const GreedyShape& s_;
  const Room room_;
};

int64_t scratch_floats(const GreedyBatch& b) { return Room(b.layout, nullptr).size; }

void run(const GreedyBatch& b) { Search(b).run(); }

}  // namespace

FASTASR_KERNELS_FLOAT(GreedyKernels, .scratch_floats = scratch_floats, .run = run)

}  // namespace fastasr::cpu
