// SPDX-License-Identifier: Apache-2.0
#include "cpu/streaming/emformer_step.h"

#include <algorithm>
#include <cstring>

#include "cpu/attention/segment_attention.h"
#include "cpu/math/activation.h"
#include "cpu/rows/residual_norm.h"
#include "cpu/rows/row_statistics.h"

namespace fastasr::cpu {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kLeastRows = 16;        // A worker takes at least this many rows: waking it for fewer costs more.
constexpr int64_t kLeastWeights = 32768;  // It also takes at least this many weights.
constexpr float kMostMemory = 10;         // Memory that does not go through tanh is clamped to ±10.

constexpr int64_t aligned(int64_t floats) { return (floats + kLanes - 1) / kLanes * kLanes; }

void copy(const float* from, float* to, int64_t n) {
  if (n > 0) std::memcpy(to, from, static_cast<size_t>(n) * 4);
}

// Adds `add` to x unless it is null; out = LN(x).
void normalize(float* __restrict x, const float* __restrict add, const float* __restrict weight,
               const float* __restrict bias, double eps, float* __restrict out, int64_t n) {
  if (add) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] += add[i];
  }
  copy(x, out, n);
  const float scale = centre(out, n, eps).scale;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] = out[i] * scale * weight[i] + bias[i];
}

void mean(const float* __restrict x, int64_t stride, int64_t rows, float* __restrict out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] = x[i];
  for (int64_t r = 1; r < rows; r++) {
    const float* __restrict row = x + r * stride;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] += row[i];
  }
  const auto count = static_cast<float>(rows);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] /= count;
}

void clamp(float* __restrict x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float v = x[i] < -kMostMemory ? -kMostMemory : x[i];  // a NaN stays
    x[i] = v > kMostMemory ? kMostMemory : v;
  }
}

// Divides the scratch memory.
struct Room {
  float* x;             // [right context | utterance], later with the attention
  float* asked;         // [memory | h | summary], later LN(z)
  float *query, *both;  // their products
  float *key, *value;   // [memory | right context | left context | utterance]
  float *mixed, *out;   // attention, and its product
  float *inner, *outer;
  float *attention, *norm;  // of each worker
  int64_t attention_size, norm_size, size;

  Room(const EmformerSegment& s, int64_t attention_floats, float* memory) {
    const EmformerLayout& l = s.layout;
    const int64_t dim = l.shape.dim, rows = s.rows(), queries = rows + s.summaries(), past = s.memory * s.streams;
    const int64_t keys = past + rows + s.left * s.streams;
    attention_size = aligned(attention_floats), norm_size = aligned(residual_norm_scratch(dim));
    int64_t at = 0;
    const auto take = [&](int64_t floats) {
      float* const here = memory ? memory + at : nullptr;
      at += aligned(floats);
      return here;
    };
    x = take(rows * dim), asked = take((past + queries) * dim);
    query = take(queries * l.stride(kEmformerQuery)), both = take((past + rows) * l.stride(kEmformerKeyValue));
    key = take(keys * dim), value = take(keys * dim);
    mixed = take(queries * dim), out = take(queries * l.stride(kEmformerOut));
    inner = take(rows * l.stride(kEmformerInner)), outer = take(rows * l.stride(kEmformerOuter));
    attention = take(s.workers.threads * attention_size), norm = take(s.workers.threads * norm_size);
    size = at;
  }
};

// Returns the problem of segment_attention.h, without the places of keys and values.
SegmentAttention<float> attention_of(const EmformerSegment& s) {
  SegmentAttention<float> p{};
  p.lengths = s.lengths, p.history = s.history;
  p.batch = s.streams, p.heads = s.layout.shape.heads, p.width = s.layout.shape.dim / p.heads;
  p.frames = p.segment = s.frames, p.left = p.past_frames = s.left, p.right = s.right;
  p.memory = p.past_memory = s.memory;
  return p;
}

class Step {
 public:
  explicit Step(const EmformerSegment& segment)
      : s_(segment),
        l_(segment.layout),
        attention_(attention_of(segment)),
        dim_(l_.shape.dim),
        rows_(s_.rows()),
        past_(s_.memory * s_.streams),
        queries_(rows_ + s_.summaries()),
        room_(s_, segment_attention_scratch(attention_, false), s_.scratch) {
    const int64_t query = l_.stride(kEmformerQuery), row = s_.streams * dim_;
    attention_.query = {room_.query, s_.streams * query, query};
    attention_.key = {room_.key, row, dim_}, attention_.value = {room_.value, row, dim_};
  }

  void run() const {
    input();
    projections();
    attention();
    product(kEmformerOut, room_.mixed, dim_, queries_, room_.out);
    memories();
    s_.workers.split(rows_, kLeastRows, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        normalize(room_.x + r * dim_, room_.out + r * l_.stride(kEmformerOut), weight(kEmformerForward),
                  bias(kEmformerForward), l_.shape.eps[kEmformerForward], room_.asked + r * dim_, dim_);
    });
    product(kEmformerInner, room_.asked, dim_, rows_, room_.inner, true);
    product(kEmformerOuter, room_.inner, l_.stride(kEmformerInner), rows_, room_.outer);
    output();
  }

 private:
  const float* weight(EmformerNorm n) const { return s_.arena + l_.norm_weight[n]; }
  const float* bias(EmformerNorm n) const { return s_.arena + l_.norm_bias[n]; }

  // Computes panels of a product for these rows; `activated` applies the activation.
  void panels(EmformerProduct p, const float* x, int64_t x_stride, int64_t rows, float* y, bool activated,
              int64_t begin, int64_t end) const {
    const int64_t stride = l_.stride(p);
    const Panels weights{s_.arena + l_.weight[p]};
    for (int64_t panel = begin; panel < end; panel++) {
      skinny_gemm(x, x_stride, rows, l_.inputs[p], weights, s_.arena + l_.bias[p], y, stride, panel, panel + 1);
      if (!activated) continue;
      for (int64_t r = 0; r < rows; r++)
        activate(static_cast<int>(l_.shape.activation), y + r * stride + panel * kPanelColumns, kPanelColumns);
    }
  }

  void product(EmformerProduct p, const float* x, int64_t x_stride, int64_t rows, float* y,
               bool activated = false) const {
    s_.workers.split(panel_count(l_.outputs[p]), least_panels(l_.inputs[p]),
                     [&](int64_t begin, int64_t end) { panels(p, x, x_stride, rows, y, activated, begin, end); });
  }
  static int64_t least_panels(int64_t inputs) { return std::max<int64_t>(1, kLeastWeights / (kPanelColumns * inputs)); }

  // Runs f(worker, begin, end) over parts of [0, n), each of `least` at least.
  template <typename F>
  void each_worker(int64_t n, int64_t least, const F& f) const {
    const int64_t parts = std::clamp<int64_t>(n / least, 1, s_.workers.threads);
    s_.workers.split(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) f(i, n * i / parts, n * (i + 1) / parts);
    });
  }

  // x, and [memory | h | summary].
  void input() const {
    const int64_t streams = s_.streams;
    float* const h = room_.asked + past_ * dim_;
    copy(s_.old_memory, room_.asked, past_ * dim_);
    s_.workers.split(rows_, kLeastRows, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        const int64_t t = r / streams, b = r % streams;
        float* const x = room_.x + r * dim_;
        copy(t < s_.right ? s_.right_context.at(t, b) : s_.utterance.at(t - s_.right, b), x, dim_);
        normalize(x, nullptr, weight(kEmformerInput), bias(kEmformerInput), l_.shape.eps[kEmformerInput], h + r * dim_,
                  dim_);
      }
    });
    for (int64_t b = 0; b < s_.summaries(); b++)
      mean(h + (s_.right * streams + b) * dim_, streams * dim_, s_.frames, h + (rows_ + b) * dim_, dim_);
  }

  void projections() const {
    const int64_t first = panel_count(l_.outputs[kEmformerKeyValue]);
    s_.workers.split(first + panel_count(l_.outputs[kEmformerQuery]), least_panels(dim_),
                     [&](int64_t begin, int64_t end) {
                       panels(kEmformerKeyValue, room_.asked, dim_, past_ + rows_, room_.both, false,
                              std::min(begin, first), std::min(end, first));
                       panels(kEmformerQuery, room_.asked + past_ * dim_, dim_, queries_, room_.query, false,
                              std::max(begin, first) - first, std::max(end, first) - first);
                     });
  }

  void attention() const {
    each_worker(attention_.units(), 1, [&](int64_t worker, int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; unit++) {
        const int64_t at = unit / attention_.heads * dim_ + unit % attention_.heads * attention_.width;
        const int64_t projected = unit / attention_.heads * l_.stride(kEmformerKeyValue) + at % dim_;
        keys(projected, at, s_.old_key, room_.key, s_.new_key);
        keys(projected + dim_, at, s_.old_value, room_.value, s_.new_value);
        kernels<SegmentAttentionKernels<float>>().forward(attention_, unit, room_.mixed,
                                                          room_.attention + worker * room_.attention_size);
      }
    });
  }

  // Places one head's keys or values of one stream: those of the left context go between the projected ones, and the
  // left context of the next segment is picked. `at` is where they begin in a row of all streams.
  void keys(int64_t projected, int64_t at, const float* left, float* keys, float* next) const {
    const int64_t row = s_.streams * dim_, projected_row = s_.streams * l_.stride(kEmformerKeyValue);
    const int64_t front = s_.memory + s_.right, width = attention_.width;
    const float* const from = room_.both + projected;
    for (int64_t t = 0; t < front; t++) copy(from + t * projected_row, keys + at + t * row, width);
    float* const context = keys + at + front * row;
    for (int64_t t = 0; t < s_.left; t++) copy(left + at + t * row, context + t * row, width);
    for (int64_t t = 0; t < s_.frames; t++)
      copy(from + (front + t) * projected_row, context + (s_.left + t) * row, width);
    for (int64_t t = 0; t < s_.left; t++) copy(context + s_.kept[t] * row, next + at + t * row, width);
  }

  void memories() const {
    if (!s_.memory) return;
    const int64_t row = s_.streams * dim_, kept = (s_.memory - 1) * row;
    copy(s_.old_memory + row, s_.new_memory, kept);
    for (int64_t b = 0; b < s_.streams; b++) {
      copy(s_.mems.at(0, b), s_.new_memory + kept + b * dim_, dim_);
      float* const to = s_.next_mems + b * dim_;
      copy(room_.out + (rows_ + b) * l_.stride(kEmformerOut), to, dim_);
      if (l_.shape.tanh_memory)
        activate(static_cast<int>(Activation::tanh), to, dim_);
      else
        clamp(to, dim_);
    }
  }

  void output() const {
    ResidualNorm<float> p{};
    p.x = {room_.x, dim_}, p.update = {room_.outer, l_.stride(kEmformerOuter)};
    p.weight = weight(kEmformerOutput), p.bias = bias(kEmformerOutput);
    p.eps = l_.shape.eps[kEmformerOutput], p.channels = dim_;
    each_worker(rows_, kLeastRows, [&](int64_t worker, int64_t begin, int64_t end) {
      kernels<ResidualNormKernels<float>>().forward(p, begin, end, s_.y, nullptr,
                                                    room_.norm + worker * room_.norm_size);
    });
  }

  const EmformerSegment& s_;
  const EmformerLayout& l_;
  SegmentAttention<float> attention_;
  const int64_t dim_, rows_, past_, queries_;
  const Room room_;
};

int64_t scratch_floats(const EmformerSegment& segment) {
  return Room(segment, segment_attention_scratch(attention_of(segment), false), nullptr).size;
}

void step(const EmformerSegment& segment) { Step(segment).run(); }

}  // namespace

FASTASR_KERNELS_FLOAT(EmformerKernels, .scratch_floats = scratch_floats, .step = step)

}  // namespace fastasr::cpu
