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
  int64_t tables() const { return pos_heads ? pos_heads : heads; }
  int64_t rows() const { return before < 0 ? frames + keys() - 1 : before + behind + 1; }
  int64_t keys() const { return cached + frames; }
};

// Holds a call with everything the kernels compute, in long double.
template <typename T>
struct Call {
  using C = compute_t<T>;
  Shape s;
  RelAttention r{};
  AttentionProblem& a = r.problem;
  Random random;
  Buffer<T> q{s.batch * s.frames * s.heads * s.dim, 1, random, 0.7},
      k{s.batch * s.keys() * s.heads * s.dim, 3, random, 0.7},
      v{s.batch * s.keys() * s.heads * s.value_dim, 0, random, 0.7}, pos{s.rows() * s.tables() * s.dim, 2, random, 0.7},
      u{s.heads * s.dim, 0, random, 0.7}, w{s.heads * s.dim, 0, random, 0.7},
      grad{s.batch * s.frames * s.heads * s.value_dim, 1, random, 0.7},
      bias{(s.frames + s.keys() - 1) * s.heads, 1, random, 0.7}, gate{s.batch * s.frames * s.heads, 1, random, 0.7},
      key_bias{s.key_bias_batch * s.key_bias_heads * s.keys(), 1, random, 0.7};
  std::vector<uint8_t> padding, mask;
  Reals y, lse, dq, dk, dv, dpos, du, dw, dbias, dgate, dkey_bias;
  bool positions() const { return s.more & 1; }
  bool biases() const { return s.more & 2; }
  bool by_offset() const { return s.more & 4; }
  bool gated() const { return s.more & 8; }
  bool by_key() const { return s.more & 16; }

  Call(const Shape& shape, uint64_t seed) : s(shape), random(seed) {
    a.batch = s.batch, a.frames = s.frames, a.heads = s.heads, a.query_dim = a.pos_dim = s.dim;
    r.pos_heads = positions() ? s.tables() : 0, r.has_offset_bias = by_offset(), r.soft_cap = s.soft_cap, a.chunk = -1,
    a.left_chunks = -1, r.value_dim = s.value_dim;
    a.left = s.cached, r.context = s.context, r.all_frames = s.frames, r.all_keys = s.keys();
    r.span = {s.keys() - 1, s.frames - 1};
    if (s.before >= 0) r.span = {std::min(s.before, s.keys() - 1), std::min(s.behind, s.frames - 1)};
    if (s.before >= 0) r.span.first = s.before - r.span.left;
    if (by_key()) r.key_bias_batch = s.key_bias_batch, r.key_bias_heads = s.key_bias_heads;
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
    reference();
  }

  int64_t row(int64_t b, int64_t i, int64_t h) const { return (b * a.frames + i) * a.heads + h; }
  int64_t key_row(int64_t b, int64_t j, int64_t h) const { return (b * a.keys() + j) * a.heads + h; }
  bool hidden(int64_t b, int64_t i, int64_t j) const {
    for (const int64_t end : s.ends)
      if ((i < end) != (j < end)) return true;
    const int64_t chunk = (i + s.cached) / s.context.chunk * s.context.chunk;
    if (s.context.left >= 0 && j < chunk - s.context.left) return true;
    if (s.context.right >= 0 && j >= chunk + s.context.chunk + s.context.right) return true;
    if (a.padding && a.padding[b * a.keys() + j]) return true;
    return a.mask && a.mask[((a.mask_per_sequence ? b * a.frames : 0) + i) * a.keys() + j];
  }

  void reference() {
    const int64_t n = a.frames, keys = a.keys(), d = a.query_dim, e = r.value_dim;
    const long double scale = 1 / std::sqrt(static_cast<long double>(d));
    const auto zeros = [](Reals& t, int64_t count) { t.assign(static_cast<size_t>(count), 0); };
    zeros(y, grad.size()), zeros(lse, a.batch * a.heads * n), zeros(dq, q.size()), zeros(dk, k.size());
    zeros(dv, v.size()), zeros(dpos, pos.size()), zeros(du, u.size()), zeros(dw, w.size());
    zeros(dbias, bias.size()), zeros(dgate, gate.size()), zeros(dkey_bias, key_bias.size());
    Reals p(static_cast<size_t>(keys)), dp(p), slope(p);
    for (int64_t b = 0; b < a.batch; b++)
      for (int64_t h = 0; h < a.heads; h++)
        for (int64_t i = 0; i < n; i++) {
          const int64_t qi = row(b, i, h) * d, hd = h * d;
          const auto offset = [&](int64_t j) { return (n - 1 + j - i) * a.heads + h; };
          const auto position = [&](int64_t j) {
            const int64_t distance = j - i - s.cached;
            const int64_t row = s.before < 0 ? n - 1 + j - i : std::clamp(distance, -s.before, s.behind) + s.before;
            return (row * s.tables() + (s.tables() == 1 ? 0 : h)) * d;
          };
          const int64_t shared = (s.key_bias_batch > 1 ? b : 0) * s.key_bias_heads + (s.key_bias_heads > 1 ? h : 0);
          const long double factor = gated() ? gate(row(b, i, h)) : 1;
          const auto with_bias = [&](Buffer<T>& t, int64_t c) { return q(qi + c) + (biases() ? t(hd + c) : 0); };
          long double sum = 0, delta = 0;
          for (int64_t j = 0; j < keys; j++) {
            long double score = 0;
            for (int64_t c = 0; c < d; c++)
              score += with_bias(u, c) * k(key_row(b, j, h) * d + c) +
                       (positions() ? with_bias(w, c) * pos(position(j) + c) : 0);
            const long double more =
                (by_offset() ? factor * bias(offset(j)) : 0) + (by_key() ? key_bias(shared * keys + j) : 0);
            const long double cap = s.soft_cap, t = std::tanh((score * scale + more) / (cap > 0 ? cap : 1));
            slope[j] = cap > 0 ? 1 - t * t : 1;
            sum += p[j] = hidden(b, i, j) ? 0 : std::exp(cap > 0 ? cap * t : score * scale + more);
          }
          lse[(b * a.heads + h) * n + i] = sum == 0 ? INFINITY : std::log(sum);
          if (sum == 0) continue;
          const cpu::DropoutRow words = dropout_row(r.dropout, (b * a.heads + h) * n + i);
          for (int64_t j = 0; j < keys; j++) {
            const bool kept = dropout_bits(words, static_cast<uint32_t>(j)) >= r.dropout.threshold;
            const long double m = kept ? r.dropout.scale : 0;
            p[j] /= sum, dp[j] = 0;
            for (int64_t c = 0; c < e; c++) {
              const int64_t out = row(b, i, h) * e + c, in = key_row(b, j, h) * e + c;
              y[out] += p[j] * m * v(in);
              dv[in] += p[j] * m * grad(out);
              dp[j] += grad(out) * v(in) * m;
            }
            delta += p[j] * dp[j];
          }
          for (int64_t j = 0; j < keys; j++) {
            const long double ds = p[j] * (dp[j] - delta) * slope[j] * scale;
            dkey_bias[shared * keys + j] += ds / scale;
            dbias[offset(j)] += factor * ds / scale, dgate[row(b, i, h)] += bias(offset(j)) * ds / scale;
            for (int64_t c = 0; c < d; c++) {
              const int64_t kj = key_row(b, j, h) * d + c, rj = position(j) + c;
              const long double content = ds * k(kj), by_position = positions() ? ds * pos(rj) : 0;
              dq[qi + c] += content + by_position;
              du[hd + c] += content, dw[hd + c] += by_position;
              dk[kj] += ds * with_bias(u, c);
              dpos[rj] += ds * with_bias(w, c);
            }
          }
        }
  }
};

template <typename T>
void values(const Shape& shape, uint64_t seed) {
  using C = compute_t<T>;
  INFO(Type<T>::name, " T=", shape.frames, " d=", shape.dim);
  Call<T> c(shape, seed);
  const RelAttention& r = c.r;
  const AttentionProblem& a = r.problem;
  const int64_t pairs = a.heads * a.batch, parts = a.batch;
  const auto& kernel = cpu::kernels<cpu::RelAttentionKernels<T>>();
  const auto given = [](bool there, T* x) { return there ? x : nullptr; };
  const auto biases_of = [&](T* u, T* w) {
    return std::pair{given(c.biases(), u), given(c.biases() && c.positions(), w)};
  };
  const auto [bias_u, bias_v] = biases_of(c.u, c.w);
  const cpu::RelAttentionOperands<T> t{c.q,
                                       c.k,
                                       c.v,
                                       given(c.positions(), c.pos),
                                       bias_u,
                                       bias_v,
                                       given(c.by_offset(), c.bias),
                                       given(c.gated(), c.gate),
                                       given(c.by_key(), c.key_bias)};
  Buffer<C> kt(r.keys_transposed_size()), packed(r.values_size()), rt(r.tables() * r.positions_transposed_size()),
      rows(r.tables() * r.positions_size()), sums(pairs * r.positions_size()), forward(r.forward_scratch()),
      backward(r.backward_scratch()), lse(pairs * a.frames, 1);
  Buffer<double> biases(pairs * r.biases_size()), offsets(pairs * r.offsets_size()), by_key(pairs * r.key_sums_size());
  Buffer<T> y(c.grad.size(), 1), dq(c.q.size(), 1), dk(c.k.size(), 1), dv(c.v.size(), 1), dpos(c.pos.size(), 1),
      du(c.u.size(), 1), dw(c.w.size(), 1), dbias(c.bias.size(), 1), dgate(c.gate.size(), 1),
      dkey_bias(c.key_bias.size(), 1);
  dpos.set(0);  // the rows that no key has
  sums.set(0), biases.set(0), offsets.set(0), by_key.set(0);
  const auto [du_out, dw_out] = biases_of(du, dw);
  const cpu::RelAttentionGradients<T> gradients{dq,
                                                dk,
                                                dv,
                                                given(c.positions(), dpos),
                                                du_out,
                                                dw_out,
                                                given(c.by_offset(), dbias),
                                                given(c.gated(), dgate),
                                                given(c.by_key(), dkey_bias)};
  for (int64_t h = 0; h < r.tables(); h++)
    kernel.pack_positions(r, t, h, rt + h * r.positions_transposed_size(), rows + h * r.positions_size());
  for (int64_t pair = 0; pair < pairs; pair++) {
    const int64_t table = r.table_of(pair / a.batch);
    const C* positions = rt + table * r.positions_transposed_size();
    int64_t begin = 0;
    for (const int64_t end : shape.ends.empty() ? std::vector{a.frames} : shape.ends) {
      const RelAttention part = r.part(pair % a.batch, begin, end - begin);
      const int64_t h = pair / a.batch, frames = part.problem.frames;
      kernel.pack_keys(part, t, h, kt, packed);
      for (int64_t i = 0; i < frames; i += cpu::kRelAttentionQueries)
        kernel.forward(part, t, kt, packed, positions, h, i, std::min(i + cpu::kRelAttentionQueries, frames), y, lse,
                       forward);
      kernel.backward(part, c.grad, t, positions, rows + table * r.positions_size(), h, gradients,
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
  if (c.by_key()) kernel.store_key_bias(r, by_key, dkey_bias);
  const auto same = [](const char* name, auto& got, const Reals& expected, double errors) {
    using R = std::decay_t<decltype(got[0])>;
    for (int64_t i = 0; i < got.size(); i++)
      expect_within(name, got[i], i, expected[i], error_bound<R>(expected[i], errors * (1 + std::fabs(expected[i]))));
  };
  same("y", y, c.y, 128), same("lse", lse, c.lse, 64);
  same("dq", dq, c.dq, 256), same("dk", dk, c.dk, 256), same("dv", dv, c.dv, 256);
  if (c.positions()) same("dpos", dpos, c.dpos, 256);
  if (du_out) same("dbias_u", du, c.du, 512);
  if (dw_out) same("dbias_v", dw, c.dw, 512);
  if (c.by_offset()) same("doffset_bias", dbias, c.dbias, 256);
  if (c.gated()) same("doffset_gate", dgate, c.dgate, 256);
  if (c.by_key()) same("dkey_bias", dkey_bias, c.dkey_bias, 256);

  if constexpr (std::is_same_v<T, float>) {
    if (!r.has_few_queries()) return;
    Buffer<T> few(c.grad.size(), 1), scratch(r.few_queries_scratch());
    lse.set(0);
    for (int64_t pair = 0; pair < pairs; pair++)
      rel_attention_few_queries(r.part(pair % a.batch, 0, a.frames), t, pair / a.batch, few, lse, scratch);
    same("y of few queries", few, c.y, 128), same("lse of few queries", lse, c.lse, 64);
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
