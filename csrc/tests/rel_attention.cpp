// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/rel_attention.h"

#include <algorithm>

#include "tests/check.h"

namespace fastasr::test {
namespace {

using cpu::AttentionProblem;
using cpu::RelAttention;

struct Shape {
  int64_t batch, frames, heads, dim, value_dim;
  int masks;  // 1: padding, 2: a mask, 4: a mask per sequence
};

// Holds a call with everything the kernels compute, in long double.
template <typename T>
struct Call {
  using C = compute_t<T>;
  using Numbers = std::vector<long double>;
  RelAttention r{};
  AttentionProblem& a = r.problem;
  Buffer<T> q, k, v, pos, u, w, grad;
  std::vector<uint8_t> padding, mask;
  Numbers y, lse, dq, dk, dv, dpos, du, dw;

  Call(const Shape& s, uint64_t seed)
      : q(s.batch * s.frames * s.heads * s.dim, 1),
        k(q.size(), 3),
        v(s.batch * s.frames * s.heads * s.value_dim),
        pos((2 * s.frames - 1) * s.heads * s.dim, 2),
        u(s.heads * s.dim),
        w(s.heads * s.dim),
        grad(v.size(), 1) {
    a.batch = s.batch, a.frames = s.frames, a.heads = s.heads, a.query_dim = a.pos_dim = s.dim;
    a.pos_batch = 1, a.chunk = -1, a.left_chunks = -1, r.value_dim = s.value_dim;
    Random random(seed);
    for (Buffer<T>* t : {&q, &k, &v, &pos, &u, &w, &grad}) t->fill(random, 0.7);
    const auto draw = [&](std::vector<uint8_t>& m, int64_t n) {
      m.resize(static_cast<size_t>(n));
      for (auto& x : m) x = random.uniform() < 0.3;
    };
    draw(padding, s.batch * s.frames);
    draw(mask, (s.masks & 4 ? s.batch : 1) * s.frames * s.frames);
    for (int64_t j = 0; j < s.frames; j++) {  // one sequence of padding alone, one with a padded tail; an empty query
      if (s.batch > 1) padding[static_cast<size_t>((s.batch - 1) * s.frames + j)] = 1;
      padding[static_cast<size_t>(j)] = j >= s.frames - s.frames / 3;
      mask[static_cast<size_t>(s.frames / 2 * s.frames + j)] = 1;
    }
    a.padding = s.masks & 1 ? padding.data() : nullptr;
    a.mask = s.masks & 6 ? mask.data() : nullptr;
    a.mask_per_sequence = s.masks & 4;
    reference();
  }

  int64_t row(int64_t b, int64_t i, int64_t h) const { return (b * a.frames + i) * a.heads + h; }
  bool hidden(int64_t b, int64_t i, int64_t j) const {
    if (a.padding && a.padding[b * a.frames + j]) return true;
    return a.mask && a.mask[((a.mask_per_sequence ? b * a.frames : 0) + i) * a.frames + j];
  }

  void reference() {
    const int64_t n = a.frames, d = a.query_dim, e = r.value_dim;
    const long double scale = 1 / std::sqrt(static_cast<long double>(d));
    const auto zeros = [](auto& t, int64_t count) { t.assign(static_cast<size_t>(count), 0); };
    zeros(y, v.size()), zeros(lse, a.batch * a.heads * n), zeros(dq, q.size()), zeros(dk, q.size());
    zeros(dv, v.size()), zeros(dpos, pos.size()), zeros(du, u.size()), zeros(dw, w.size());
    const auto at = [](Buffer<T>& t, int64_t i) { return static_cast<long double>(test::value(t[i])); };
    Numbers p(static_cast<size_t>(n)), dp(p);
    for (int64_t b = 0; b < a.batch; b++)
      for (int64_t h = 0; h < a.heads; h++)
        for (int64_t i = 0; i < n; i++) {
          const int64_t qi = row(b, i, h) * d, hd = h * d;
          const auto offset = [&](int64_t j) { return ((n - 1 + j - i) * a.heads + h) * d; };
          long double sum = 0, delta = 0;
          for (int64_t j = 0; j < n; j++) {
            long double s = 0;
            for (int64_t c = 0; c < d; c++)
              s += (at(q, qi + c) + at(u, hd + c)) * at(k, row(b, j, h) * d + c) +
                   (at(q, qi + c) + at(w, hd + c)) * at(pos, offset(j) + c);
            sum += p[static_cast<size_t>(j)] = hidden(b, i, j) ? 0 : std::exp(s * scale);
          }
          lse[static_cast<size_t>((b * a.heads + h) * n + i)] = sum == 0 ? INFINITY : std::log(sum);
          if (sum == 0) continue;
          for (int64_t j = 0; j < n; j++) {
            long double& weight = p[static_cast<size_t>(j)];
            long double& g = dp[static_cast<size_t>(j)];
            weight /= sum, g = 0;
            for (int64_t c = 0; c < e; c++) {
              const size_t out = static_cast<size_t>(row(b, i, h) * e + c);
              const size_t in = static_cast<size_t>(row(b, j, h) * e + c);
              const long double dy = at(grad, static_cast<int64_t>(out));
              y[out] += weight * at(v, static_cast<int64_t>(in));
              dv[in] += weight * dy;
              g += dy * at(v, static_cast<int64_t>(in));
            }
            delta += weight * g;
          }
          for (int64_t j = 0; j < n; j++) {
            const long double ds = p[static_cast<size_t>(j)] * (dp[static_cast<size_t>(j)] - delta) * scale;
            for (int64_t c = 0; c < d; c++) {
              const int64_t kj = row(b, j, h) * d + c, rj = offset(j) + c;
              const long double content = ds * at(k, kj), position = ds * at(pos, rj);
              dq[static_cast<size_t>(qi + c)] += content + position;
              du[static_cast<size_t>(hd + c)] += content, dw[static_cast<size_t>(hd + c)] += position;
              dk[static_cast<size_t>(kj)] += ds * (at(q, qi + c) + at(u, hd + c));
              dpos[static_cast<size_t>(rj)] += ds * (at(q, qi + c) + at(w, hd + c));
            }
          }
        }
  }
};

template <typename T>
void values(const Shape& shape, uint64_t seed) {
  using C = compute_t<T>;
  Call<T> c(shape, seed);
  const RelAttention& r = c.r;
  const AttentionProblem& a = r.problem;
  const int64_t pairs = a.heads * a.batch, parts = a.batch;
  std::vector<cpu::KeyRange> ranges(static_cast<size_t>(a.batch));
  attention_key_ranges(a, ranges.data());
  const auto& kernel = cpu::kernels<cpu::RelAttentionKernels<T>>();
  const cpu::RelAttentionOperands<T> t{c.q.data(), c.k.data(), c.v.data(), c.pos.data(), c.u.data(), c.w.data()};
  Buffer<C> kt(r.keys_transposed_size()), packed(r.values_size()), rt(a.heads * r.positions_transposed_size()),
      rows(a.heads * r.positions_size()), sums(pairs * r.positions_size()), forward(r.forward_scratch()),
      backward(r.backward_scratch()), lse(pairs * a.frames, 1);
  Buffer<double> biases(pairs * 2 * a.query_dim);
  Buffer<T> y(c.v.size(), 1), dq(c.q.size(), 1), dk(c.q.size(), 1), dv(c.v.size(), 1), dpos(c.pos.size(), 1),
      du(c.u.size(), 1), dw(c.w.size(), 1);
  for (int64_t i = 0; i < sums.size(); i++) sums[i] = 0;
  for (int64_t i = 0; i < biases.size(); i++) biases[i] = 0;
  for (int64_t h = 0; h < a.heads; h++)
    kernel.pack_positions(r, t, h, rt.data() + h * r.positions_transposed_size(), rows.data() + h * r.positions_size());
  for (int64_t hb = 0; hb < pairs; hb++) {
    const C* positions = rt.data() + hb / a.batch * r.positions_transposed_size();
    kernel.pack_keys(r, t, hb, kt.data(), packed.data());
    for (int64_t i = 0; i < a.frames; i += cpu::kRelAttentionQueries)
      kernel.forward(r, ranges.data(), t, kt.data(), packed.data(), positions, hb, i,
                     std::min(i + cpu::kRelAttentionQueries, a.frames), y.data(), lse.data(), forward.data());
    kernel.backward(r, ranges.data(), c.grad.data(), t, positions, rows.data() + hb / a.batch * r.positions_size(), hb,
                    dq.data(), dk.data(), dv.data(),
                    {sums.data() + hb * r.positions_size(), biases.data() + hb * 2 * a.query_dim}, backward.data());
  }
  for (int64_t h = 0; h < a.heads; h++)
    kernel.store_sums(r, {sums.data() + h * parts * r.positions_size(), biases.data() + h * parts * 2 * a.query_dim},
                      parts, h, dpos.data(), du.data(), dw.data());
  CHECK(kt.intact() && packed.intact() && rt.intact() && rows.intact() && sums.intact() && forward.intact() &&
            backward.intact() && lse.intact() && biases.intact() && y.intact() && dq.intact() && dk.intact() &&
            dv.intact() && dpos.intact() && du.intact() && dw.intact(),
        "%s wrote outside, T=%ld", Type<T>::name, long(a.frames));
  const auto same = [&](auto& got, const auto& expected, const char* name, double errors) {
    for (int64_t i = 0; i < got.size(); i++) {
      const long double want = expected[static_cast<size_t>(i)];
      const bool ok = std::isinf(want) ? test::value(got[i]) == static_cast<double>(want)
                                       : close(got[i], want, errors * (1 + std::fabs(want)));
      CHECK(ok, "%s %s, T=%ld d=%ld, %ld: %g, expected %Lg", Type<T>::name, name, long(a.frames), long(a.query_dim),
            long(i), test::value(got[i]), want);
    }
  };
  same(y, c.y, "y", 128), same(lse, c.lse, "lse", 64);
  same(dq, c.dq, "dq", 256), same(dk, c.dk, "dk", 256), same(dv, c.dv, "dv", 256);
  same(dpos, c.dpos, "dpos", 256), same(du, c.du, "dbias_u", 512), same(dw, c.dw, "dbias_v", 512);
}

}  // namespace

TEST_CASE("rel_attention") {
  const Shape shapes[] = {
      {1, 1, 1, 1, 1, 0},    {2, 7, 2, 8, 8, 1},    {3, 33, 1, 64, 64, 3}, {2, 40, 3, 5, 19, 2},
      {2, 66, 1, 33, 48, 5}, {1, 100, 2, 16, 3, 4}, {1, 560, 1, 4, 4, 1},
  };
  uint64_t seed = 1;
  for (const Shape& shape : shapes) {
    for_each_type([&]<typename T>() { values<T>(shape, seed); });
    seed++;
  }
}

}  // namespace fastasr::test
