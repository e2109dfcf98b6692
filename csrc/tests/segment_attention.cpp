// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/segment_attention.h"

#include <algorithm>

#include "tests/check.h"

namespace fastasr::test {
namespace {

struct Shape {
  int64_t batch, heads, width, frames, segment, left, right, memory, past_frames, past_memory;
  bool ragged, history, dropped;
};

// Holds one call: inputs, outputs, and the formula in double.
template <typename T>
struct Call {
  using C = compute_t<T>;
  Shape s;
  cpu::SegmentAttention<T> p = sizes();
  int64_t channels = s.heads * s.width, queries = p.queries() * s.batch * channels,
          keys = p.keys() * s.batch * channels;
  Random random{static_cast<uint64_t>(s.frames * 131 + s.segment * 17 + s.memory)};
  Buffer<T> query{queries, 0, random}, both{2 * keys, 0, random},  // keys and values as halves of one projection
      grad{queries, 0, random}, y{queries}, dquery{queries}, dkey{keys}, dvalue{keys};
  Buffer<C> dropout{p.units() * p.queries() * p.lanes()};
  std::vector<int64_t> lengths, history{s.past_frames - 1, s.past_memory - 1};

  cpu::SegmentAttention<T> sizes() const {
    cpu::SegmentAttention<T> of{};
    of.batch = s.batch, of.heads = s.heads, of.width = s.width, of.frames = s.frames, of.segment = s.segment;
    of.left = s.left, of.right = s.right, of.memory = s.memory;
    of.past_frames = s.past_frames, of.past_memory = s.past_memory;
    return of;
  }

  explicit Call(const Shape& shape) : s(shape) {
    for (int64_t i = 0; i < dropout.size(); i++) dropout[i] = random.uniform() < 0.3 ? C(0) : C(1 / 0.7);
    for (int64_t b = 0; b < s.batch; b++) lengths.push_back(s.frames - 5 * b);
    p.query = {query, s.batch * channels, channels};
    p.key = {both, s.batch * 2 * channels, 2 * channels};
    p.value = {both + channels, s.batch * 2 * channels, 2 * channels};
    p.lengths = s.ragged ? lengths.data() : nullptr;
    p.history = s.history ? history.data() : nullptr;
    p.dropout = s.dropped ? dropout.data() : nullptr;
  }

  void run() {
    const auto& kernel = cpu::kernels<cpu::SegmentAttentionKernels<T>>();
    Buffer<C> forward(cpu::segment_attention_scratch(p, false)), backward(cpu::segment_attention_scratch(p, true));
    for (int64_t unit = 0; unit < p.units(); unit++) {
      kernel.forward(p, unit, y, forward);
      kernel.backward(p, {grad, p.batch * channels, channels}, unit, dquery, dkey, dvalue, backward);
    }
  }

  // Returns the place of key row k in the window of query row q, or -1 where it is not seen.
  int64_t lane(int64_t b, int64_t q, int64_t k) const {
    const int64_t n = p.segments(), blocks = n * p.right;
    const bool summary = q >= blocks + p.frames;
    const int64_t s = q < blocks ? q / p.right : summary ? q - blocks - p.frames : (q - blocks) / p.segment;
    if (k < p.remembered()) {
      const int64_t at = k - (p.past_memory + s - p.memory);
      const bool there = !p.history || k >= p.past_memory - history[1];
      return !summary && there && at >= 0 && at < p.memory ? at : -1;
    }
    k -= p.remembered();
    if (k < blocks) return k / p.right == s ? p.memory + k % p.right : -1;
    const int64_t t = k - blocks - p.past_frames, at = t - (s * p.segment - p.left);
    const int64_t limit = p.lengths ? std::min(std::max<int64_t>(0, lengths[b]), p.frames) : p.frames;
    const bool there = t < limit && (!p.history || t >= -history[0]);
    return there && at >= 0 && at < p.left + p.segment ? p.memory + p.right + at : -1;
  }

  std::vector<double> expected() {
    std::vector<double> out(static_cast<size_t>(y.size()), 0.0);
    for (int64_t unit = 0; unit < p.units(); unit++) {
      const int64_t b = unit / p.heads, first = unit % p.heads * p.width;
      for (int64_t q = 0; q < p.queries(); q++) {
        double sum = 0;
        std::vector<double> e(static_cast<size_t>(p.keys()), 0.0);
        for (int64_t k = 0; k < p.keys(); k++) {
          if (lane(b, q, k) < 0) continue;
          double s = 0;
          for (int64_t c = first; c < first + p.width; c++)
            s += test::value(*(p.query.at(q, b) + c)) * test::value(*(p.key.at(k, b) + c));
          sum += e[k] = std::exp(s / std::sqrt(double(p.width)));
        }
        for (int64_t k = 0; k < p.keys(); k++) {
          const int64_t at = lane(b, q, k);
          if (at < 0) continue;
          double w = e[k] / sum;
          if (p.dropout) w *= p.dropout[(unit * p.queries() + q) * p.lanes() + at];
          for (int64_t c = first; c < first + p.width; c++)
            out[(q * p.batch + b) * channels + c] += w * test::value(*(p.value.at(k, b) + c));
        }
      }
    }
    return out;
  }
};

const Shape kShapes[] = {
    {1, 1, 1, 1, 1, 0, 0, 0, 0, 0, false, false, false},   {2, 2, 5, 11, 4, 3, 2, 0, 0, 0, true, false, true},
    {1, 2, 33, 14, 3, 4, 1, 2, 0, 0, false, false, true},  {2, 1, 8, 9, 3, 0, 0, 1, 0, 0, true, false, false},
    {1, 1, 32, 50, 40, 7, 2, 1, 0, 0, false, false, true}, {2, 1, 8, 6, 4, 5, 2, 3, 5, 3, true, true, false},
};

template <typename T>
void values() {
  for (const Shape& shape : kShapes) {
    INFO(Type<T>::name, " ", shape.frames, " frames");
    Call<T> call(shape);
    call.run();
    const auto want = call.expected();
    for (int64_t i = 0; i < call.y.size(); i++) EXPECT(call.y, i, want[i], 200);
  }
}

// Compares gradients in double with differences of the formula, at elements all over each argument.
void gradients() {
  for (const Shape& shape : kShapes) {
    INFO(shape.frames, " frames");
    Call<double> call(shape);
    call.run();
    const auto probe = [&](double* at, double got, const char* name) {
      expect_slope(name, at, got, call.grad, [&] { return call.expected(); });
    };
    const int64_t n = call.channels, queries = call.queries / n, keys = call.keys / n;
    for (int64_t r = 0; r < queries; r += std::max<int64_t>(1, queries / 6))
      probe(call.query + r * n + r % n, call.dquery[r * n + r % n], "query");
    for (int64_t r = 0; r < keys; r += std::max<int64_t>(1, keys / 6)) {
      probe(call.both + r * 2 * n + r % n, call.dkey[r * n + r % n], "key");
      probe(call.both + (r * 2 + 1) * n + r % n, call.dvalue[r * n + r % n], "value");
    }
  }
}

}  // namespace

TEST_CASE("segment_attention") {
  for_each_type([&]<typename T>() { values<T>(); });
  gradients();
}

}  // namespace fastasr::test
