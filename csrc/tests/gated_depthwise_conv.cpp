// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/gated_depthwise_conv.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

struct Shape {
  int64_t frames, batch, channels, taps, chunk;  // chunk 0: plain
  bool swoosh, mask, cache, biases;
};

// Holds a sum and the sum of its terms' sizes, against which its rounding errors are measured.
struct Sum {
  long double value = 0, size = 0;
  void add(const Sum& a, const Sum& b) {
    value += a.value * b.value;
    size += a.size * std::fabs(b.value) + std::fabs(a.value) * b.size + std::fabs(a.value * b.value);
  }
  void add(const Sum& a) { value += a.value, size += a.size; }
};
Sum exactly(double v) { return {v, std::fabs(v)}; }

template <typename T>
struct Case {
  using C = compute_t<T>;
  Shape s;
  int64_t P, groups;
  Buffer<T> h, weight, bias, causal, causal_bias, scale, cache, grad, y, new_cache, dh, dcache;
  Buffer<T> dweight, dbias, dcausal, dcausal_bias, dscale;
  std::unique_ptr<bool[]> mask;
  std::vector<C> parts;
  cpu::GatedDepthwiseConv<T> conv;

  explicit Case(const Shape& shape)
      : s(shape),
        P(s.taps / 2),
        groups(std::min(s.batch, cpu::kGatedGroups)),
        h(s.frames * s.batch * 2 * s.channels, 3),
        weight(s.channels * s.taps, 1),
        bias(s.channels),
        causal(s.channels * (P + 1)),
        causal_bias(s.channels),
        scale(2 * s.channels * s.taps),
        cache(s.batch * s.channels * P),
        grad(s.frames * s.batch * s.channels, 1),
        y(grad.size(), 5),
        new_cache(cache.size()),
        dh(h.size(), 2),
        dcache(cache.size()),
        dweight(weight.size()),
        dbias(s.channels),
        dcausal(causal.size()),
        dcausal_bias(s.channels),
        dscale(scale.size()),
        mask(new bool[static_cast<size_t>(s.batch * s.frames + 1)]) {
    Random random(static_cast<uint64_t>(s.frames * 1000 + s.channels * 10 + s.taps));
    h.fill(random, 1.5);
    grad.fill(random);
    for (Buffer<T>* b : {&weight, &bias, &causal, &causal_bias, &scale, &cache}) b->fill(random, 0.4);
    for (int64_t i = 0; i < s.batch * s.frames; i++) mask[i] = i % s.frames > s.frames - 2 * (i / s.frames) - 1;
    const bool chunked = s.chunk > 0;
    conv = {h.data(),
            s.batch * 2 * s.channels,
            2 * s.channels,
            weight.data(),
            s.biases ? bias.data() : nullptr,
            chunked ? causal.data() : nullptr,
            chunked && s.biases ? causal_bias.data() : nullptr,
            chunked ? scale.data() : nullptr,
            s.mask ? mask.get() : nullptr,
            chunked && s.cache ? cache.data() : nullptr,
            s.frames,
            s.batch,
            s.channels,
            s.taps,
            chunked ? std::min(s.chunk, s.frames) : s.frames,
            s.swoosh};
    parts.resize(static_cast<size_t>(groups * conv.sums() * s.channels));
  }

  int64_t stripes() const { return (s.channels + cpu::kGatedStripe - 1) / cpu::kGatedStripe; }

  // Runs tasks in pieces of `step`, as threads take them.
  void run(int64_t step) {
    const auto& backward = cpu::kernels<cpu::GatedDepthwiseConvBackward<T>>();
    T* keep = s.chunk ? new_cache.data() : nullptr;
    for (int64_t i = 0; i < stripes() * s.batch; i += step)
      cpu::kernels<cpu::GatedDepthwiseConvForward<T>>().run(conv, y.data(), keep, i,
                                                            std::min(i + step, stripes() * s.batch));
    for (int64_t i = 0; i < stripes() * groups; i += step)
      backward.run(conv, grad.data(), s.batch * s.channels, s.channels, dh.data(), conv.cache ? dcache.data() : nullptr,
                   parts.data(), groups, i, std::min(i + step, stripes() * groups));
    const bool chunked = s.chunk > 0;
    backward.reduce(conv, parts.data(), groups, dweight.data(), s.biases ? dbias.data() : nullptr,
                    chunked ? dcausal.data() : nullptr, chunked && s.biases ? dcausal_bias.data() : nullptr,
                    chunked ? dscale.data() : nullptr);
  }
};

// Computes one channel of one sequence by the formulas, in long double.
template <typename T>
struct Reference {
  Case<T>& k;
  const int64_t b, c, T_, S, P, K;
  std::vector<Sum> u, z, e, q, r, du;
  std::vector<long double> gate;

  Reference(Case<T>& k_, int64_t b_, int64_t c_)
      : k(k_), b(b_), c(c_), T_(k.s.frames), S(k.conv.chunk), P(k.P), K(k.s.taps) {
    const bool chunked = k.s.chunk > 0;
    u.resize(size_t(T_ + P)), du.resize(size_t(T_ + P)), gate.resize(size_t(T_));
    for (auto* v : {&z, &e, &q, &r}) v->resize(size_t(T_));
    for (int64_t t = -P; t < 0; t++)
      if (k.conv.cache) U(t) = exactly(value(k.cache[(b * k.s.channels + c) * P + P + t]));
    for (int64_t t = 0; t < T_; t++) {
      const double x = value(k.h[at(t)]), s = value(k.h[at(t) + k.s.channels]);
      gate[size_t(t)] = 1 / (1 + std::exp(-static_cast<long double>(s)));
      if (!padded(t)) U(t) = {x * gate[size_t(t)], 4 * std::fabs(x * gate[size_t(t)])};
    }
    for (int64_t t = 0; t < T_; t++) {
      Sum& sum = z[size_t(t)];
      Sum& inner = e[size_t(t)];
      if (k.s.biases) inner.add(exactly(value(k.bias[c])));
      for (int64_t j = 0; j < K; j++)
        if (within(t, t + j - P)) inner.add(weight(j), U(t + j - P));
      if (chunked) {
        if (k.s.biases) sum.add(exactly(value(k.causal_bias[c])));
        for (int64_t j = 0; j <= P; j++) sum.add(causal(j), U(t + j - P));
        sum.add(inner, scale(t));
      } else {
        sum = inner;
      }
      const long double v = sum.value, g = value(k.grad[(t * k.s.batch + b) * k.s.channels + c]);
      const long double d = k.s.swoosh ? 1 / (1 + std::exp(1 - v)) - 0.08L : 1;
      q[size_t(t)] = {g * d, std::fabs(g) * (4 + (k.s.swoosh ? sum.size : 0))};
      r[size_t(t)].add(q[size_t(t)], chunked ? scale(t) : Sum{1, 0});
    }
    for (int64_t t = 0; t < T_; t++) {
      for (int64_t j = 0; j < K; j++)
        if (within(t, t + j - P)) du[size_t(t + j)].add(weight(j), r[size_t(t)]);
      if (chunked)
        for (int64_t j = 0; j <= P; j++) du[size_t(t + j)].add(causal(j), q[size_t(t)]);
    }
  }

  int64_t at(int64_t t) const { return (t * k.s.batch + b) * 2 * k.s.channels + c; }
  bool padded(int64_t t) const { return k.s.mask && k.mask[b * T_ + t]; }
  Sum& U(int64_t t) { return u[size_t(t + P)]; }
  bool within(int64_t t, int64_t other) const { return other >= 0 && other < T_ && other / S == t / S; }
  Sum weight(int64_t j) { return exactly(value(k.weight[c * K + j])); }
  Sum causal(int64_t j) { return exactly(value(k.causal[c * (P + 1) + j])); }
  Sum scale(int64_t t) {
    const int64_t p = t % S;
    Sum sum{1, 1};
    if (p < K) sum.add(exactly(value(k.scale[c * K + p])));
    if (p >= S - K) sum.add(exactly(value(k.scale[(k.s.channels + c) * K + p - S + K])));
    return sum;
  }
};

template <typename T>
void values(const Shape& s) {
  Case<T> k(s);
  k.run(3);
  const auto check = [&](const char* name, T got, const Sum& expected, int64_t i) {
    CHECK(close(got, expected.value, 4 * expected.size),
          "%s %s[%ld], T=%ld B=%ld C=%ld K=%ld chunk=%ld: expected %.9Lg, got %.9g", Type<T>::name, name, long(i),
          long(s.frames), long(s.batch), long(s.channels), long(s.taps), long(s.chunk), expected.value, value(got));
  };
  const int64_t K = s.taps, P = k.P;
  for (int64_t c = 0; c < s.channels; c++) {
    Sum db, dcb;
    std::vector<Sum> dw(static_cast<size_t>(K)), dv(static_cast<size_t>(P + 1)), dl(dw), dr(dw);
    for (int64_t b = 0; b < s.batch; b++) {
      Reference<T> ref(k, b, c);
      for (int64_t t = 0; t < s.frames; t++) {
        const long double z = ref.z[size_t(t)].value;
        const long double y = s.swoosh ? std::log1p(std::exp(z - 1)) - 0.08L * z - 0.313261687L : z;
        check("y", k.y[(t * s.batch + b) * s.channels + c], {y, ref.z[size_t(t)].size + std::fabs(y) + 1}, t);
        const Sum& du = ref.du[size_t(t + P)];
        const long double g = ref.gate[size_t(t)], x = value(k.h[ref.at(t)]), keep = ref.padded(t) ? 0 : 1;
        check("dx", k.dh[ref.at(t)], {keep * du.value * g, du.size * g}, t);
        check("ds", k.dh[ref.at(t) + s.channels], {keep * du.value * x * g * (1 - g), du.size * std::fabs(x * g) * 2},
              t);
        const Sum &q = ref.q[size_t(t)], &r = ref.r[size_t(t)];
        db.add(s.chunk ? r : q), dcb.add(q);
        for (int64_t j = 0; j < K; j++)
          if (ref.within(t, t + j - P)) dw[size_t(j)].add(r, ref.U(t + j - P));
        for (int64_t j = 0; j <= P; j++) dv[size_t(j)].add(q, ref.U(t + j - P));
        const int64_t p = t % ref.S;
        if (p < K) dl[size_t(p)].add(q, ref.e[size_t(t)]);
        if (p >= ref.S - K) dr[size_t(p - ref.S + K)].add(q, ref.e[size_t(t)]);
      }
      for (int64_t p = 0; s.chunk && p < P; p++) {
        const int64_t i = (b * s.channels + c) * P + p;
        check("new cache", k.new_cache[i], ref.u[size_t(s.frames + p)], i);
        if (s.cache) check("dcache", k.dcache[i], ref.du[size_t(p)], i);
      }
    }
    if (s.biases) check("dbias", k.dbias[c], db, c);
    for (int64_t j = 0; j < K; j++) check("dweight", k.dweight[c * K + j], dw[size_t(j)], c * K + j);
    if (!s.chunk) continue;
    if (s.biases) check("dcausal_bias", k.dcausal_bias[c], dcb, c);
    for (int64_t j = 0; j <= P; j++) check("dcausal_weight", k.dcausal[c * (P + 1) + j], dv[size_t(j)], c);
    for (int64_t j = 0; j < K; j++) {
      check("dL", k.dscale[c * K + j], dl[size_t(j)], c * K + j);
      check("dR", k.dscale[(s.channels + c) * K + j], dr[size_t(j)], c * K + j);
    }
  }
  for (Buffer<T>* out : {&k.y, &k.new_cache, &k.dh, &k.dcache, &k.dweight, &k.dbias, &k.dcausal, &k.dscale})
    CHECK(out->intact(), "%s wrote outside, T=%ld C=%ld", Type<T>::name, long(s.frames), long(s.channels));

  Case<T> other(s);
  other.run(1);
  CHECK(k.y.equals(other.y) && k.dh.equals(other.dh) && k.dweight.equals(other.dweight),
        "%s: the pieces that work is cut into show in the result", Type<T>::name);
}

}  // namespace

TEST_CASE("gated_depthwise_conv") {
  for_each_type([]<typename T>() {
    for (const int64_t channels : {1, 7, 16, 33, 64})
      for (const int64_t taps : {1, 5, 15}) values<T>({70, 3, channels, taps, 0, true, true, false, true});
    for (const int64_t chunk : {1, 2, 5, 8, 40, 64, 65, 100, 200})
      values<T>({133, 2, 18, 15, chunk, true, true, true, true});
    for (const int64_t frames : {1, 3, 63, 64, 65}) {
      values<T>({frames, 2, 17, 31, 0, false, false, false, false});
      values<T>({frames, 2, 17, 31, 16, false, true, true, false});
      values<T>({frames, 6, 9, 7, frames, true, false, false, true});
    }
  });
}

}  // namespace fastasr::test
