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
  cpu::SegmentAttention<T> p{};
  int64_t channels;
  std::vector<int64_t> lengths, history;
  Buffer<T> query, both, grad, y, dquery, dkey, dvalue;  // both: keys and values as halves of one projection
  Buffer<C> dropout;

  static cpu::SegmentAttention<T> sizes(const Shape& s) {
    cpu::SegmentAttention<T> p{};
    p.batch = s.batch, p.heads = s.heads, p.width = s.width, p.frames = s.frames, p.segment = s.segment;
    p.left = s.left, p.right = s.right, p.memory = s.memory;
    p.past_frames = s.past_frames, p.past_memory = s.past_memory;
    return p;
  }

  explicit Call(const Shape& s)
      : p(sizes(s)),
        channels(s.heads * s.width),
        query(p.queries() * s.batch * channels),
        both(p.keys() * s.batch * 2 * channels),
        grad(query.size()),
        y(query.size()),
        dquery(query.size()),
        dkey(p.keys() * s.batch * channels),
        dvalue(dkey.size()),
        dropout(p.units() * p.queries() * p.lanes()) {
    Random random(static_cast<uint64_t>(s.frames * 131 + s.segment * 17 + s.memory));
    query.fill(random), both.fill(random), grad.fill(random);
    for (int64_t i = 0; i < dropout.size(); i++) dropout[i] = random.uniform() < 0.3 ? C(0) : C(1 / 0.7);
    for (int64_t b = 0; b < s.batch; b++) lengths.push_back(s.frames - 5 * b);
    history = {s.past_frames - 1, s.past_memory - 1};
    p.query = {query.data(), s.batch * channels, channels};
    p.key = {both.data(), s.batch * 2 * channels, 2 * channels};
    p.value = {both.data() + channels, s.batch * 2 * channels, 2 * channels};
    p.lengths = s.ragged ? lengths.data() : nullptr;
    p.history = s.history ? history.data() : nullptr;
    p.dropout = s.dropped ? dropout.data() : nullptr;
  }

  void run() {
    const auto& kernel = cpu::kernels<cpu::SegmentAttentionKernels<T>>();
    Buffer<C> forward(cpu::segment_attention_scratch(p, false)), backward(cpu::segment_attention_scratch(p, true));
    const cpu::Sequence<const T> g{grad.data(), p.batch * channels, channels};
    for (int64_t unit = 0; unit < p.units(); unit++) {
      kernel.forward(p, unit, y.data(), forward.data());
      kernel.backward(p, g, unit, dquery.data(), dkey.data(), dvalue.data(), backward.data());
    }
    CHECK(forward.intact() && backward.intact(), "wrote outside the scratch memory");
    for (Buffer<T>* t : {&y, &dquery, &dkey, &dvalue}) CHECK(t->intact(), "wrote outside an output");
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
    const int64_t limit =
        p.lengths ? std::min(std::max<int64_t>(0, lengths[static_cast<size_t>(b)]), p.frames) : p.frames;
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
          sum += e[static_cast<size_t>(k)] = std::exp(s / std::sqrt(double(p.width)));
        }
        for (int64_t k = 0; k < p.keys(); k++) {
          const int64_t at = lane(b, q, k);
          if (at < 0) continue;
          double w = e[static_cast<size_t>(k)] / sum;
          if (p.dropout) w *= p.dropout[(unit * p.queries() + q) * p.lanes() + at];
          for (int64_t c = first; c < first + p.width; c++)
            out[static_cast<size_t>((q * p.batch + b) * channels + c)] += w * test::value(*(p.value.at(k, b) + c));
        }
      }
    }
    return out;
  }

  double loss() {
    const auto out = expected();
    double sum = 0;
    for (size_t i = 0; i < out.size(); i++) sum += out[i] * test::value(grad[static_cast<int64_t>(i)]);
    return sum;
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
    Call<T> call(shape);
    call.run();
    const auto want = call.expected();
    for (size_t i = 0; i < want.size(); i++)
      CHECK(close(call.y[static_cast<int64_t>(i)], want[i], 200), "%s, %ld frames: expected %.8g, got %.8g",
            Type<T>::name, long(shape.frames), want[i], value(call.y[static_cast<int64_t>(i)]));
  }
}

// Compares gradients in double with differences of the formula, at elements all over each argument.
void gradients() {
  for (const Shape& shape : kShapes) {
    Call<double> call(shape);
    call.run();
    const auto& p = call.p;
    const auto probe = [&](double* at, double got, const char* name) {
      const double want = slope(at, [&] { return call.loss(); });
      CHECK(std::fabs(want - got) <= 2e-8 * (10 + std::fabs(want)), "%s, %ld frames: expected %.9g, got %.9g", name,
            long(shape.frames), want, got);
    };
    const int64_t n = call.channels, queries = p.queries() * p.batch, keys = p.keys() * p.batch;
    for (int64_t r = 0; r < queries; r += std::max<int64_t>(1, queries / 6))
      probe(call.query.data() + r * n + r % n, call.dquery[r * n + r % n], "query");
    for (int64_t r = 0; r < keys; r += std::max<int64_t>(1, keys / 6)) {
      probe(call.both.data() + r * 2 * n + r % n, call.dkey[r * n + r % n], "key");
      probe(call.both.data() + (r * 2 + 1) * n + r % n, call.dvalue[r * n + r % n], "value");
    }
  }
}

}  // namespace

TEST_CASE("segment_attention") {
  for_each_type([&]<typename T>() { values<T>(); });
  gradients();
}

}  // namespace fastasr::test
