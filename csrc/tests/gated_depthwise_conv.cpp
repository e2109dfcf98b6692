// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/gated_depthwise_conv.h"

#include <algorithm>

#include "tests/check.h"

namespace fastasr::test {
namespace {

struct Shape {
  int64_t frames, batch, channels, taps, chunk;  // chunk 0: plain
  cpu::GatedActivation activation;
  bool mask, cache, biases;
  int64_t delay = 0;
  cpu::Gate gate = cpu::Gate::sigmoid;
  std::vector<int64_t> starts = {};  // of recordings in every sequence, and the end of the last; empty: one

  int64_t recordings() const { return std::max<int64_t>(1, static_cast<int64_t>(starts.size()) - 1); }
};

// Adds the product of two sums to a third, with the sizes of its errors.
void add_product(Sum& sum, const Sum& a, const Sum& b) {
  sum.add(a.value * b.value, a.size * std::fabs(b.value) + std::fabs(a.value) * b.size + std::fabs(a.value * b.value));
}
void add(Sum& sum, const Sum& term) { sum.add(term.value, term.size); }
Sum exactly(long double v) { return {v, std::fabs(v)}; }

template <typename T>
struct Case {
  using C = compute_t<T>;
  Shape s;
  bool chunked = s.chunk > 0;
  int64_t P = s.taps / 2 + s.delay, groups = std::min(s.batch * s.recordings(), cpu::kGatedGroups),
          n = s.frames * s.batch * s.channels;
  int64_t chunk = chunked ? std::min(s.chunk, s.frames) : s.frames;
  Random random{static_cast<uint64_t>(s.frames * 1000 + s.channels * 10 + s.taps)};
  Buffer<T> h{2 * n, 3, random, 1.5}, grad{n, 1, random}, y{n, 5}, dh{2 * n, 2};
  Buffer<T> weight{s.channels * s.taps, 1, random, 0.4}, bias{s.channels, 0, random, 0.4},
      causal{s.channels * (P + 1), 0, random, 0.4}, causal_bias{s.channels, 0, random, 0.4},
      scale{2 * s.channels * s.taps, 0, random, 0.4}, cache{s.batch * s.channels * P, 0, random, 0.4};
  Buffer<T> dweight{weight.size()}, dbias{s.channels}, dcausal{causal.size()}, dcausal_bias{s.channels},
      dscale{scale.size()}, new_cache{cache.size()}, dcache{cache.size()};
  Buffer<bool> mask{s.batch * s.frames};

  // Runs tasks in pieces of `step`.
  void run(int64_t step) {
    for (int64_t i = 0; i < mask.size(); i++) mask[i] = i % s.frames > s.frames - 2 * (i / s.frames) - 1;
    const auto given = [](bool there, auto& b) { return there ? b.data() : nullptr; };
    const bool both = chunked && s.biases, cached = s.cache;
    const cpu::GatedDepthwiseConv<T> conv{h,
                                          s.batch * 2 * s.channels,
                                          2 * s.channels,
                                          weight,
                                          given(s.biases, bias),
                                          given(chunked, causal),
                                          given(both, causal_bias),
                                          given(chunked, scale),
                                          given(s.mask, mask),
                                          given(cached, cache),
                                          s.frames,
                                          s.batch,
                                          s.channels,
                                          s.taps,
                                          P,
                                          chunk,
                                          s.activation,
                                          s.gate,
                                          s.recordings(),
                                          given(!s.starts.empty(), s.starts)};
    std::vector<C> parts(static_cast<size_t>(groups * conv.sums() * s.channels));
    const auto& backward = cpu::kernels<cpu::GatedDepthwiseConvBackward<T>>();
    const int64_t stripes = (s.channels + cpu::kGatedStripe - 1) / cpu::kGatedStripe;
    in_pieces(stripes * conv.count(), step, [&](int64_t begin, int64_t end) {
      cpu::kernels<cpu::GatedDepthwiseConvForward<T>>().run(conv, y, new_cache, begin, end);
    });
    in_pieces(stripes * groups, step, [&](int64_t begin, int64_t end) {
      backward.run(conv, grad, s.batch * s.channels, s.channels, dh, given(cached, dcache), parts.data(), groups, begin,
                   end);
    });
    backward.reduce(conv, parts.data(), groups, dweight, given(s.biases, dbias), given(chunked, dcausal),
                    given(both, dcausal_bias), given(chunked, dscale));
  }
};

// Computes one channel of one sequence by the formulas, in long double.
template <typename T>
struct Reference {
  Case<T>& k;
  int64_t b, c, L = k.s.frames, S = k.chunk, P = k.P, K = k.s.taps;
  std::vector<Sum> u = std::vector<Sum>(size_t(L + P)), z = std::vector<Sum>(size_t(L)), e = z, q = z, r = z, du = u;
  Reals gate = Reals(size_t(L)), gate_slope = gate, slope_size = gate;

  void run() {
    for (int64_t p = 0; p < P; p++)
      if (k.s.cache) u[p] = exactly(k.cache((b * k.s.channels + c) * P + p));
    for (int64_t t = 0; t < L; t++) {
      const long double x = k.h(at(t));
      const long double s = k.h(at(t) + k.s.channels), g = logistic(s);
      const bool silu = k.s.gate == cpu::Gate::silu;
      gate[t] = silu ? s * g : g, gate_slope[t] = silu ? g * (1 + s * (1 - g)) : g * (1 - g);
      slope_size[t] = silu ? g * (1 + std::fabs(s) * (1 - g)) : g;
      if (!padded(t)) u[t + P] = {x * gate[t], 4 * std::fabs(x * gate[t])};
    }
    for (int64_t t = 0; t < L; t++) {
      if (k.s.biases) add(e[t], exactly(k.bias(c)));
      for (int64_t j = 0; j < K; j++)
        if (seen(t, t + j - P)) add_product(e[t], weight(j), u[t + j]);
      if (k.chunked) {
        if (k.s.biases) add(z[t], exactly(k.causal_bias(c)));
        for (int64_t j = 0; j <= P; j++)
          if (remembered(t, t + j - P)) add_product(z[t], causal(j), u[t + j]);
        add_product(z[t], e[t], scale(t));
      } else {
        z[t] = e[t];
      }
      const long double g = k.grad((t * k.s.batch + b) * k.s.channels + c);
      const bool linear = k.s.activation == cpu::GatedActivation::identity;
      q[t] = {g * slope(z[t].value), std::fabs(g) * (4 + (linear ? 0 : 2 * z[t].size))};
      add_product(r[t], q[t], k.chunked ? scale(t) : Sum{1, 0});
    }
    for (int64_t t = 0; t < L; t++) {
      for (int64_t j = 0; j < K; j++)
        if (seen(t, t + j - P)) add_product(du[t + j], weight(j), r[t]);
      for (int64_t j = 0; k.chunked && j <= P; j++)
        if (remembered(t, t + j - P)) add_product(du[t + j], causal(j), q[t]);
    }
  }

  int64_t at(int64_t t) const { return (t * k.s.batch + b) * 2 * k.s.channels + c; }
  bool padded(int64_t t) const { return k.s.mask && k.mask[b * L + t]; }
  // The recording of frame t, its chunks and the frame's place in its chunk.
  int64_t begin(int64_t t) const {
    const auto next = std::ranges::upper_bound(k.s.starts, t);
    return next == k.s.starts.begin() ? 0 : next[-1];
  }
  int64_t end(int64_t t) const {
    const auto next = std::ranges::upper_bound(k.s.starts, t);
    return next == k.s.starts.end() ? L : *next;
  }
  int64_t chunk(int64_t t) const { return std::min(S, end(t) - begin(t)); }
  int64_t position(int64_t t) const { return (t - begin(t)) % chunk(t); }
  bool within(int64_t t, int64_t other) const {
    const int64_t first = t - position(t);
    return other >= first && other < std::min(first + chunk(t), end(t));
  }
  // The causal convolution sees the cache too.
  bool remembered(int64_t t, int64_t other) const { return k.s.starts.empty() || other >= begin(t); }
  // Plain form: the convolution sees the cache too.
  bool seen(int64_t t, int64_t other) const { return within(t, other) || (!k.chunked && other < 0); }
  long double slope(long double z_) const {
    if (k.s.activation == cpu::GatedActivation::identity) return 1;
    if (k.s.activation == cpu::GatedActivation::swoosh_r) return logistic(z_ - 1) - 0.08L;
    return logistic(z_) * (1 + z_ * (1 - logistic(z_)));
  }
  Sum weight(int64_t j) { return exactly(k.weight(c * K + j)); }
  Sum causal(int64_t j) { return exactly(k.causal(c * (P + 1) + j)); }
  Sum scale(int64_t t) {
    const int64_t p = position(t), missing = chunk(t) - K;
    Sum sum{1, 1};
    if (p < K) add(sum, exactly(k.scale(c * K + p)));
    if (p >= missing) add(sum, exactly(k.scale((k.s.channels + c) * K + p - missing)));
    return sum;
  }
};

template <typename T>
void values(const Shape& s) {
  INFO(Type<T>::name, " T=", s.frames, " B=", s.batch, " C=", s.channels, " K=", s.taps, " chunk=", s.chunk);
  Case<T> k{s}, other{s};
  k.run(3), other.run(1);
#define EXPECT_SUM(out, i, sum) EXPECT(out, i, (sum).value, 4 * (sum).size)
  const int64_t K = s.taps, P = k.P;
  for (int64_t c = 0; c < s.channels; c++) {
    Sum db, dcb;
    std::vector<Sum> dw(static_cast<size_t>(K)), dv(static_cast<size_t>(P + 1)), dl(dw), dr(dw);
    for (int64_t b = 0; b < s.batch; b++) {
      Reference<T> ref{k, b, c};
      ref.run();
      for (int64_t t = 0; t < s.frames; t++) {
        const long double z = ref.z[t].value;
        long double y = s.activation == cpu::GatedActivation::silu ? z * logistic(z) : z;
        if (s.activation == cpu::GatedActivation::swoosh_r) y = std::log1p(std::exp(z - 1)) - 0.08L * z - 0.313261687L;
        EXPECT(k.y, (t * s.batch + b) * s.channels + c, y, 4 * (ref.z[t].size + std::fabs(y) + 1));
        const Sum& du = ref.du[t + P];
        const long double g = ref.gate[t], x = k.h(ref.at(t)), keep = ref.padded(t) ? 0 : 1;
        EXPECT(k.dh, ref.at(t), keep * du.value * g, 4 * du.size * std::fabs(g));
        EXPECT(k.dh, ref.at(t) + s.channels, keep * du.value * x * ref.gate_slope[t],
               8 * du.size * std::fabs(x) * ref.slope_size[t]);
        const Sum &q = ref.q[t], &r = ref.r[t];
        add(db, s.chunk ? r : q), add(dcb, q);
        for (int64_t j = 0; j < K; j++)
          if (ref.seen(t, t + j - P)) add_product(dw[j], r, ref.u[t + j]);
        for (int64_t j = 0; s.chunk && j <= P; j++)
          if (ref.remembered(t, t + j - P)) add_product(dv[j], q, ref.u[t + j]);
        const int64_t p = ref.position(t), missing = ref.chunk(t) - K;
        if (p < K) add_product(dl[p], q, ref.e[t]);
        if (p >= missing) add_product(dr[p - missing], q, ref.e[t]);
      }
      for (int64_t p = 0; p < P && s.starts.empty(); p++) {
        const int64_t i = (b * s.channels + c) * P + p;
        EXPECT_SUM(k.new_cache, i, ref.u[s.frames + p]);
        if (s.cache) EXPECT_SUM(k.dcache, i, ref.du[p]);
      }
    }
    if (s.biases) EXPECT_SUM(k.dbias, c, db);
    for (int64_t j = 0; j < K; j++) EXPECT_SUM(k.dweight, c * K + j, dw[j]);
    if (!s.chunk) continue;
    if (s.biases) EXPECT_SUM(k.dcausal_bias, c, dcb);
    for (int64_t j = 0; j <= P; j++) EXPECT_SUM(k.dcausal, c * (P + 1) + j, dv[j]);
    for (int64_t j = 0; j < K; j++) {
      EXPECT_SUM(k.dscale, c * K + j, dl[j]);
      EXPECT_SUM(k.dscale, (s.channels + c) * K + j, dr[j]);
    }
  }
#undef EXPECT_SUM
  CHECK(k.y.equals(other.y) && k.dh.equals(other.dh) && k.dweight.equals(other.dweight), "the pieces of work show");
}

}  // namespace

TEST_CASE("gated_depthwise_conv") {
  using enum cpu::GatedActivation;
  for_each_type([]<typename T>() {
    for (const int64_t channels : {1, 7, 16, 33, 64})
      for (const int64_t taps : {1, 5, 15}) values<T>({70, 3, channels, taps, 0, swoosh_r, true, false, true});
    for (const int64_t batch : {1, 3})
      for (const auto activation : {identity, swoosh_r})
        values<T>(
            {133, batch, 33, 9, 0, activation, batch == 3, false, true, 0, cpu::Gate::sigmoid, {0, 1, 4, 70, 133}});
    values<T>({70, 1, 17, 4, 0, silu, false, false, false, -1, cpu::Gate::silu, {0, 64, 70}});
    for (const int64_t chunk : {1, 2, 5, 8, 40, 64, 65, 100, 200})
      values<T>({133, 2, 18, 15, chunk, swoosh_r, true, true, true});
    for (const int64_t chunk : {1, 6, 40, 200})
      values<T>(
          {133, 2, 18, 9, chunk, swoosh_r, true, false, true, 0, cpu::Gate::sigmoid, {0, 1, 4, 30, 60, 130, 133}});
    for (const int64_t frames : {1, 3, 63, 64, 65}) {
      values<T>({frames, 2, 17, 31, 0, identity, false, false, false});
      values<T>({frames, 2, 17, 31, 16, identity, true, true, false});
      values<T>({frames, 6, 9, 7, frames, swoosh_r, false, false, true});
      values<T>({frames, 2, 17, 9, 0, silu, true, true, true, 4});
      values<T>({frames, 2, 33, 4, 0, silu, true, true, true, -1});
      values<T>({frames, 2, 33, 3, 0, silu, true, true, true, 1, cpu::Gate::silu});
      values<T>({frames, 2, 17, 5, 8, swoosh_r, true, true, true, 0, cpu::Gate::silu});
    }
  });
}

}  // namespace fastasr::test
