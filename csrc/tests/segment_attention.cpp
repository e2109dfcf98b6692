// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/segment_attention.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

struct Shape {
  int64_t batch, heads, width, frames, segment, left, right, memory, past_frames, past_memory;
  bool ragged, history, dropped;
};

template <typename T>
struct Call {
  using C = compute_t<T>;
  Shape s;
  Rounding rounding;
  cpu::SegmentAttention<T> p = sizes();
  int64_t channels = s.heads * s.width, queries = p.queries() * s.batch * channels,
          keys = p.keys() * s.batch * channels;
  Random random{static_cast<uint64_t>(s.frames * 131 + s.segment * 17 + s.memory), rounding};
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

  Call(const Shape& shape, Rounding rounding_) : s(shape), rounding(rounding_) {
    for (int64_t i = 0; i < dropout.size(); i++) dropout[i] = random.uniform() < 0.3 ? C(0) : C(1.5);
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

  auto outputs() { return std::tie(y, dquery, dkey, dvalue); }
};

const Shape kShapes[] = {
    {1, 1, 1, 1, 1, 0, 0, 0, 0, 0, false, false, false},   {2, 2, 5, 11, 4, 3, 2, 0, 0, 0, true, false, true},
    {1, 2, 33, 14, 3, 4, 1, 2, 0, 0, false, false, true},  {2, 1, 8, 9, 3, 0, 0, 1, 0, 0, true, false, false},
    {1, 1, 32, 50, 40, 7, 2, 1, 0, 0, false, false, true}, {2, 1, 8, 6, 4, 5, 2, 3, 5, 3, true, true, false},
};

}  // namespace

TEST_CASE("segment_attention") {
  for_each_type([&]<typename T>() {
    for (const Shape& shape : kShapes) {
      INFO(Type<T>::name, " ", shape.frames, " frames");
      Call<T> call(shape, rounded<T>);
      Call<double> exact(shape, rounded<T>);
      call.run(), exact.run();
      expect_like<T>(call.outputs(), exact.outputs(), 30);
    }
  });
}

}  // namespace fastasr::test
