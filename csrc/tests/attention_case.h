// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/attention/zipformer_attention_weights.h"
#include "tests/check.h"

// Attention with relative positions and its gradients in long double.
namespace fastasr::test {

using cpu::AttentionProblem;

struct AttentionShape {
  int64_t frames, batch, heads, dim, pos_dim, left, pos_batch, chunk, left_chunks;
  int masks;  // 1: padding, 2: a mask, 4: a mask per sequence
  double penalty;
  // With recordings: the frames of each, one after the other behind two frames that are in none, and the longest one
  // that R has rows for.
  int64_t recording = 0, longest = 0;
  int64_t rows() const { return recording ? 2 * longest - 1 : 2 * frames - 1 + left; }
};

// Holds inputs, and everything the kernels compute, in long double.
template <typename T>
struct AttentionCase {
  using C = compute_t<T>;
  AttentionShape s;
  AttentionProblem a{};
  Random random;
  Buffer<T> x{s.frames * s.batch * s.heads * (2 * s.dim + s.pos_dim), 1, random, 0.5},
      pos{s.pos_batch * s.rows() * s.heads * s.pos_dim, 3, random},
      cached{s.left * s.batch * s.heads * s.dim, 0, random, 0.5},
      grad{s.heads * s.batch * s.frames * (s.left + s.frames), 2, random};
  std::vector<uint8_t> padding, mask;
  std::vector<cpu::Recording> recordings;
  Reals dw;  // the gradient of W; `grad` until it is changed and reference() is called again
  Reals w, dx, dpos, dcached;

  AttentionCase(const AttentionShape& shape, uint64_t seed) : s(shape), random(seed) {
    a.frames = s.frames, a.batch = s.batch, a.heads = s.heads, a.query_dim = s.dim, a.pos_dim = s.pos_dim;
    a.left = s.left, a.pos_batch = s.pos_batch, a.chunk = s.chunk, a.left_chunks = s.left_chunks;
    a.penalty = s.penalty, a.limit = 1.25;
    for (int64_t i = 0; s.recording && i < a.frames; i++) {
      const int64_t begin = i < 2 ? i : 2 + (i - 2) / s.recording * s.recording, end = begin + s.recording;
      recordings.push_back(i < 2 || end > a.frames ? cpu::Recording{i, i} : cpu::Recording{begin, end});
    }
    if (s.recording) a.recordings = recordings.data(), a.rows = s.rows();
    const auto draw = [&](std::vector<uint8_t>& m, int64_t n) {
      m.resize(static_cast<size_t>(n));
      for (auto& v : m) v = random.uniform() < 0.3;
    };
    draw(padding, a.batch * a.keys());
    draw(mask, (s.masks & 4 ? a.batch : 1) * a.frames * a.keys());
    if (a.batch > 1)  // one sequence with a padded tail, one that is all padding
      for (int64_t j = 0; j < a.keys(); j++) padding[j] = j >= a.keys() / 2, padding[(a.batch - 1) * a.keys() + j] = 1;
    a.padding = s.masks & 1 ? padding.data() : nullptr;
    a.mask = s.masks & 6 ? mask.data() : nullptr;
    a.mask_per_sequence = s.masks & 4;
    for (int64_t i = 0; i < grad.size(); i++) dw.push_back(grad(i));
    reference();
  }

  int64_t at_q(int64_t i, int64_t b, int64_t h) const { return (i * a.batch + b) * a.width() + h * a.query_dim; }
  int64_t at_k(int64_t i, int64_t b, int64_t h) const { return at_q(i, b, h) + a.heads * a.query_dim; }
  int64_t at_p(int64_t i, int64_t b, int64_t h) const {
    return (i * a.batch + b) * a.width() + 2 * a.heads * a.query_dim + h * a.pos_dim;
  }
  int64_t at_r(int64_t r, int64_t b, int64_t h) const {
    return (((a.pos_batch == 1 ? 0 : b) * a.offsets() + r) * a.heads + h) * a.pos_dim;
  }
  bool hidden(int64_t b, int64_t i, int64_t j) const {
    const int64_t t = j - a.left;
    if (a.chunk > 0) {
      const int64_t first = a.recordings ? a.recordings[i].begin : 0;
      const int64_t of_key = t >= 0 ? (t - first) / a.chunk : -((-t + a.chunk - 1) / a.chunk);
      const int64_t of_query = (i - first) / a.chunk;
      if (of_key > of_query || (a.left_chunks >= 0 && of_key < of_query - a.left_chunks)) return true;
    }
    if (a.padding && a.padding[b * a.keys() + j]) return true;
    return a.mask && a.mask[((a.mask_per_sequence ? b * a.frames : 0) + i) * a.keys() + j];
  }

  // Says whether query i has no weight on key j, whatever the scores are.
  bool apart(int64_t i, int64_t j) const {
    if (!a.recordings) return false;
    const cpu::Recording& r = a.recordings[i];
    return j < r.begin || j >= r.end || std::abs(j - i) >= s.longest;
  }

  void reference() {
    const int64_t keys = a.keys();
    w.assign(size_t(grad.size()), 0), dx.assign(size_t(x.size()), 0);
    dpos.assign(size_t(pos.size()), 0), dcached.assign(size_t(cached.size()), 0);
    Reals raw(static_cast<size_t>(keys)), scores(raw);
    for (int64_t h = 0; h < a.heads; h++)
      for (int64_t b = 0; b < a.batch; b++)
        for (int64_t i = 0; i < a.frames; i++) {
          const auto at_cached = [&](int64_t j) { return ((j * a.batch + b) * a.heads + h) * a.query_dim; };
          const auto key = [&](int64_t j, int64_t d) {
            return j < a.left ? cached(at_cached(j) + d) : x(at_k(j - a.left, b, h) + d);
          };
          long double top = -INFINITY, sum = 0, delta = 0;
          for (int64_t j = 0; j < keys; j++) {
            long double& v = raw[j] = 0;
            scores[j] = -INFINITY;
            if (apart(i, j)) continue;
            for (int64_t d = 0; d < a.query_dim; d++) v += x(at_q(i, b, h) + d) * key(j, d);
            for (int64_t d = 0; a.pos_batch && d < a.pos_dim; d++)
              v += x(at_p(i, b, h) + d) * pos(at_r(a.center() - i + j, b, h) + d);
            scores[j] = hidden(b, i, j) ? -1000 : v;
            top = std::max(top, scores[j]);
          }
          for (auto& v : scores) sum += v = top == -INFINITY ? 0 : std::exp(v - top);
          if (sum == 0) continue;
          const int64_t row = ((h * a.batch + b) * a.frames + i) * keys;
          for (int64_t j = 0; j < keys; j++) delta += (w[row + j] = scores[j] / sum) * dw[row + j];
          for (int64_t j = 0; j < keys; j++) {
            if (apart(i, j)) continue;
            long double ds = hidden(b, i, j) ? 0 : w[row + j] * (dw[row + j] - delta);
            if (std::fabs(raw[j]) > a.limit) ds += raw[j] > 0 ? a.penalty : -a.penalty;
            for (int64_t d = 0; d < a.query_dim; d++) {
              dx[at_q(i, b, h) + d] += ds * key(j, d);
              (j < a.left ? dcached[at_cached(j) + d] : dx[at_k(j - a.left, b, h) + d]) += ds * x(at_q(i, b, h) + d);
            }
            for (int64_t d = 0; a.pos_batch && d < a.pos_dim; d++) {
              const int64_t r = at_r(a.center() - i + j, b, h) + d;
              dx[at_p(i, b, h) + d] += ds * pos(r);
              dpos[r] += ds * x(at_p(i, b, h) + d);
            }
          }
        }
  }
};

// Returns the error that is allowed where the kernel's is `unit`, relative or absolute.
template <typename T>
long double near_bound(long double expected, double unit) {
  return unit * (1 + std::fabs(expected)) + std::fabs(expected) * 2 * Type<T>::half_ulp;
}
template <typename T>
void expect_near(const char* name, Buffer<T>& got, const Reals& expected, double unit) {
  for (int64_t i = 0; i < got.size(); i++)
    expect_within(name, got[i], i, expected[i], near_bound<T>(expected[i], unit));
}

// Holds the packed operands of a case and the parts of the gradients of keys and positions.
template <typename T>
struct Workspace {
  using C = compute_t<T>;
  AttentionCase<T>& c;
  const AttentionProblem& a = c.a;
  int64_t pairs = a.heads * a.batch, part = cpu::kAttentionStep * 2, parts = (a.frames + part - 1) / part;
  Buffer<C> kt{pairs * a.keys_transposed_size()}, rows{pairs * a.key_rows_size()},
      rt{a.heads * a.pos_batch * a.positions_size()}, dk{pairs * parts * a.key_rows_size()},
      drt{pairs * parts * a.positions_size()};
  Buffer<T> dx{c.x.size(), 1}, dpos{c.pos.size(), 1}, dcached{c.cached.size(), 1};
  std::vector<cpu::KeyRange> ranges = std::vector<cpu::KeyRange>(static_cast<size_t>(a.batch));
  const cpu::AttentionWeightsKernels<T>& kernel = cpu::kernels<cpu::AttentionWeightsKernels<T>>();

  explicit Workspace(AttentionCase<T>& of) : c(of) {
    attention_key_ranges(a, ranges.data());
    for (int64_t pair = 0; pair < pairs; pair++) kernel.pack_keys(a, c.x, c.cached, pair, kt_of(pair), rows_of(pair));
    for (int64_t k = 0; k < a.heads * a.pos_batch; k++)
      kernel.pack_positions(a, c.pos, k / a.pos_batch, k % a.pos_batch, rt + k * a.positions_size());
  }
  C* kt_of(int64_t pair) { return kt + pair * a.keys_transposed_size(); }
  C* rows_of(int64_t pair) { return rows + pair * a.key_rows_size(); }
  C* dk_of(int64_t pair, int64_t k) { return dk + (pair * parts + k) * a.key_rows_size(); }
  C* drt_of(int64_t pair, int64_t k) { return drt + (pair * parts + k) * a.positions_size(); }
  const C* positions_of(int64_t pair) {
    if (!a.pos_batch) return nullptr;
    return rt + (pair / a.batch * a.pos_batch + (a.pos_batch == 1 ? 0 : pair % a.batch)) * a.positions_size();
  }
  void store_keys(int64_t pair) { kernel.store_keys(a, dk_of(pair, 0), parts, pair, dx, dcached); }
  void store_positions(int64_t heads) {
    for (int64_t k = 0; k < heads * a.pos_batch; k++)
      kernel.store_positions(a, drt, parts, k / a.pos_batch, k % a.pos_batch, dpos);
  }
  void compare(double unit) {
    expect_near("dx", dx, c.dx, unit);
    expect_near("dcached_key", dcached, c.dcached, unit);
    if (a.pos_batch) expect_near("dpos", dpos, c.dpos, unit);
  }
};

}  // namespace fastasr::test
