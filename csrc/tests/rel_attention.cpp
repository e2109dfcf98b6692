// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/rel_attention.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

using cpu::AttentionProblem;
using cpu::RelAttention;

struct Shape {
  int64_t batch, frames, heads, dim, value_dim;
  int masks;  // 1: padding, 2: a mask, 4: a mask per sequence
  double dropout = 0;
  int64_t cached = 0;
  cpu::Context context{};
  int more = 3;  // 1: positions, 2: biases, 4: a bias by offset, 8: its gate, 16: a bias by key
  double soft_cap = 0;
  int64_t key_bias_batch = 1, key_bias_heads = 1;
  int64_t pos_heads = 0;             // 0: heads
  int64_t before = -1, behind = -1;  // the span of positions; negative: all
  std::vector<int64_t> ends = {};    // of the recordings in every sequence; empty: one
  bool positions() const { return more & 1; }
  bool biases() const { return more & 2; }
  int64_t tables() const { return pos_heads ? pos_heads : heads; }
  int64_t rows() const { return before < 0 ? frames + keys() - 1 : before + behind + 1; }
  int64_t keys() const { return cached + frames; }
  // Returns the elements of an operand, 0 where the call has none.
  int64_t pos_size() const { return positions() ? rows() * tables() * dim : 0; }
  int64_t bias_size() const { return biases() ? heads * dim : 0; }
  int64_t offset_bias_size() const { return more & 4 ? (frames + keys() - 1) * heads : 0; }
  int64_t gate_size() const { return more & 8 ? batch * frames * heads : 0; }
  int64_t key_bias_size() const { return more & 16 ? key_bias_batch * key_bias_heads * keys() : 0; }
};

template <typename T>
T* given(Buffer<T>& operand) {
  return operand.size() ? operand.data() : nullptr;
}

template <typename T>
struct Call {
  using C = compute_t<T>;
  Shape s;
  Random random;
  RelAttention r{};
  AttentionProblem& a = r.problem;
  Buffer<T> q{s.batch * s.frames * s.heads * s.dim, 1, random, 0.7},
      k{s.batch * s.keys() * s.heads * s.dim, 3, random, 0.7},
      v{s.batch * s.keys() * s.heads * s.value_dim, 0, random, 0.7}, pos{s.pos_size(), 2, random, 0.7},
      u{s.bias_size(), 0, random, 0.7}, w{s.positions() ? s.bias_size() : 0, 0, random, 0.7},
      grad{s.batch * s.frames * s.heads * s.value_dim, 1, random, 0.7}, bias{s.offset_bias_size(), 1, random, 0.7},
      gate{s.gate_size(), 1, random, 0.7}, key_bias{s.key_bias_size(), 1, random, 0.7};
  std::vector<uint8_t> padding, mask;
  Buffer<T> y{grad.size(), 1}, dq{q.size(), 1}, dk{k.size(), 1}, dv{v.size(), 1}, dpos{pos.size(), 1}, du{u.size(), 1},
      dw{w.size(), 1}, dbias{bias.size(), 1}, dgate{gate.size(), 1}, dkey_bias{key_bias.size(), 1};
  Buffer<C> lse{s.heads * s.batch * s.frames, 1};
  const cpu::RelAttentionOperands<T> operands{q,        k,           v,           given(pos),     given(u),
                                              given(w), given(bias), given(gate), given(key_bias)};

  Call(const Shape& shape, uint64_t seed, Rounding rounding) : s(shape), random(seed, rounding) {
    a.batch = s.batch, a.frames = s.frames, a.heads = s.heads, a.query_dim = a.pos_dim = s.dim;
    r.pos_heads = s.positions() ? s.tables() : 0, r.has_offset_bias = bias.size() > 0, r.soft_cap = s.soft_cap;
    a.chunk = -1, a.left_chunks = -1, r.value_dim = s.value_dim;
    a.left = s.cached, r.context = s.context, r.all_frames = s.frames, r.all_keys = s.keys();
    r.span = {s.keys() - 1, s.frames - 1};
    if (s.before >= 0) r.span = {std::min(s.before, s.keys() - 1), std::min(s.behind, s.frames - 1)};
    if (s.before >= 0) r.span.first = s.before - r.span.left;
    if (key_bias.size()) r.key_bias_batch = s.key_bias_batch, r.key_bias_heads = s.key_bias_heads;
    r.dropout = {seed * 0x123456789abcdef, static_cast<int32_t>(s.dropout * 0x1p31), 1 / (1 - s.dropout)};
    const auto draw = [&](std::vector<uint8_t>& m, int64_t n) {
      m.resize(static_cast<size_t>(n));
      for (auto& x : m) x = random.uniform() < 0.3;
    };
    const int64_t keys = s.keys();
    draw(padding, s.batch * keys);
    draw(mask, (s.masks & 4 ? s.batch : 1) * s.frames * keys);
    for (int64_t j = 0; j < keys; j++) {  // one sequence of padding alone, one with a padded tail; an empty query
      if (s.batch > 1) padding[(s.batch - 1) * keys + j] = 1;
      padding[j] = j >= keys - keys / 3;
      mask[s.frames / 2 * keys + j] = 1;
    }
    a.padding = s.masks & 1 ? padding.data() : nullptr;
    a.mask = s.masks & 6 ? mask.data() : nullptr;
    a.mask_per_sequence = s.masks & 4;
  }

  void run() {
    const int64_t pairs = a.heads * a.batch, parts = a.batch;
    const auto& kernel = cpu::kernels<cpu::RelAttentionKernels<T>>();
    Buffer<C> kt(r.keys_transposed_size()), packed(r.values_size()), rt(r.tables() * r.positions_transposed_size()),
        rows(r.tables() * r.positions_size()), sums(pairs * r.positions_size()), forward(r.forward_scratch()),
        backward(r.backward_scratch());
    Buffer<double> biases(pairs * r.biases_size()), offsets(pairs * r.offsets_size()),
        by_key(pairs * r.key_sums_size());
    dpos.set(0);  // the rows that no key has
    sums.set(0), biases.set(0), offsets.set(0), by_key.set(0);
    const cpu::RelAttentionGradients<T> gradients{dq,        dk,           dv,           given(dpos),     given(du),
                                                  given(dw), given(dbias), given(dgate), given(dkey_bias)};
    for (int64_t h = 0; h < r.tables(); h++)
      kernel.pack_positions(r, operands, h, rt + h * r.positions_transposed_size(), rows + h * r.positions_size());
    for (int64_t pair = 0; pair < pairs; pair++) {
      const int64_t h = pair / a.batch, table = r.table_of(h);
      const C* positions = rt + table * r.positions_transposed_size();
      int64_t begin = 0;
      for (const int64_t end : s.ends.empty() ? std::vector{a.frames} : s.ends) {
        const RelAttention part = r.part(pair % a.batch, begin, end - begin);
        kernel.pack_keys(part, operands, h, kt, packed);
        in_pieces(end - begin, cpu::kRelAttentionQueries, [&](int64_t first, int64_t last) {
          kernel.forward(part, operands, kt, packed, positions, h, first, last, y, lse, forward);
        });
        kernel.backward(part, grad, operands, positions, rows + table * r.positions_size(), h, gradients,
                        {sums + pair * r.positions_size(), biases + pair * r.biases_size(),
                         offsets + pair * r.offsets_size(), by_key + pair * r.key_sums_size()},
                        backward);
        begin = end;
      }
    }
    for (int64_t h = 0; h < a.heads; h++)
      kernel.store_sums(r,
                        {sums + h * parts * r.positions_size(), biases + h * parts * r.biases_size(),
                         offsets + h * parts * r.offsets_size(), nullptr},
                        parts, h, gradients);
    if (key_bias.size()) kernel.store_key_bias(r, by_key, dkey_bias);
  }
  auto outputs() { return std::tie(y, lse, dq, dk, dv, dpos, du, dw, dbias, dgate, dkey_bias); }
};

template <typename T>
void values(const Shape& shape, uint64_t seed) {
  INFO(Type<T>::name, " T=", shape.frames, " d=", shape.dim);
  Call<T> call(shape, seed, rounded<T>);
  Call<double> exact(shape, seed, rounded<T>);
  call.run(), exact.run();
  expect_like<T>(call.outputs(), exact.outputs(), 200);
  if constexpr (std::is_same_v<T, float>) {
    if (!call.r.has_few_queries()) return;
    Buffer<float> y(call.y.size(), 1), lse(call.lse.size(), 1), scratch(call.r.few_queries_scratch());
    for (int64_t pair = 0; pair < shape.heads * shape.batch; pair++)
      rel_attention_few_queries(call.r.part(pair % shape.batch, 0, shape.frames), call.operands, pair / shape.batch, y,
                                lse, scratch);
    expect_like<T>(std::tie(y, lse), std::tie(exact.y, exact.lse), 200);
  }
}

}  // namespace

TEST_CASE("rel_attention") {
  const Shape shapes[] = {
      {1, 1, 1, 1, 1, 0},
      {2, 7, 2, 8, 8, 1},
      {3, 33, 1, 64, 64, 3},
      {2, 40, 3, 5, 19, 2},
      {2, 66, 1, 33, 48, 5},
      {1, 100, 2, 16, 3, 4},
      {1, 560, 1, 4, 4, 1},
      {2, 37, 3, 8, 8, 1, 0.25},
      {1, 560, 1, 5, 19, 2, 0.5},
      {2, 45, 1, 8, 8, 0, 0, 0, {7, 2}},
      {1, 300, 1, 8, 8, 1, 0, 0, {20, 0, 10}},
      {2, 3, 2, 8, 8, 1, 0, 70, {70, 0, 2}},
      {2, 1, 3, 19, 5, 0, 0, 16},
      {1, 15, 2, 33, 48, 6, 0, 90, {60, 1, 4}},
      {1, 90, 1, 5, 19, 2, 0.25, 550, {40, -1, 3}},
      {2, 40, 3, 8, 8, 1, 0, 0, {}, 0},
      {2, 40, 2, 8, 19, 3, 0, 0, {}, 4},
      {2, 33, 3, 5, 8, 5, 0.25, 0, {20, 3}, 14},
      {1, 560, 2, 8, 8, 1, 0, 30, {}, 15},
      {2, 3, 2, 8, 8, 0, 0, 70, {}, 1},
      {2, 40, 3, 8, 19, 3, 0, 0, {12, 0}, 3, 1.5},
      {1, 90, 2, 8, 8, 1, 0.25, 7, {}, 15, 0.7},
      {1, 3, 2, 8, 8, 0, 0, 70, {}, 3, 50},
      {2, 40, 3, 8, 19, 3, 0, 0, {}, 19, 0, 2, 3},
      {3, 45, 2, 5, 8, 5, 0.25, 7, {20, 3}, 16, 0, 1, 2},
      {1, 560, 2, 8, 8, 1, 0, 0, {}, 31, 1.5},
      {2, 3, 2, 8, 8, 0, 0, 70, {}, 17, 0, 2, 1},
      {2, 40, 3, 8, 19, 3, 0, 0, {}, 3, 0, 1, 1, 1},
      {2, 40, 3, 8, 19, 3, 0, 0, {}, 3, 0, 1, 1, 0, 5, 3},
      {2, 130, 2, 5, 8, 1, 0.25, 7, {}, 1, 0, 1, 1, 1, 40, 0},
      {1, 700, 2, 8, 8, 1, 0, 0, {}, 3, 0, 1, 1, 1, 64, 8},
      {1, 150, 2, 8, 8, 2, 0, 30, {20, 5, 10}, 15, 1.5, 1, 1, 1, 9, 200},
      {1, 33, 1, 64, 64, 0, 0, 0, {}, 3, 0, 1, 1, 1, 0, 0},
      {2, 3, 2, 8, 8, 0, 0, 70, {}, 3, 0, 1, 1, 0, 11, 1},
      {1, 140, 2, 8, 19, 0, 0, 0, {}, 3, 0, 1, 1, 0, 69, 69, {70, 71, 103, 140}},
      {2, 90, 2, 5, 8, 5, 0.25, 0, {20, 3}, 31, 1.5, 2, 2, 1, 9, 3, {50, 51, 90}},
      {2, 37, 1, 8, 8, 2, 0, 0, {}, 31, 0, 1, 1, 0, -1, -1, {3, 37}},
  };
  uint64_t seed = 1;
  for (const Shape& shape : shapes) {
    for_each_type([&]<typename T>() { values<T>(shape, seed); });
    seed++;
  }
}

}  // namespace fastasr::test
