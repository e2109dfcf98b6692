// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "cpu/attention/zipformer_attention_weights.h"
#include "tests/check.h"

// Attention with relative positions and its gradients in long double.
namespace fastasr::test {

using cpu::AttentionProblem;

struct AttentionShape {
  int64_t frames, batch, heads, dim, pos_dim, left, pos_batch, chunk, left_chunks;
  int masks;  // 1: padding, 2: a mask, 4: a mask per sequence
  double penalty;
};

// Holds inputs, and everything the kernels compute, in long double.
template <typename T>
struct AttentionCase {
  using C = compute_t<T>;
  AttentionProblem a{};
  Buffer<T> x, pos, cached, grad;
  std::vector<uint8_t> padding, mask;
  std::vector<long double> dw;  // the gradient of W; `grad` until it is changed and reference() is called again
  std::vector<long double> w, dx, dpos, dcached;

  AttentionCase(const AttentionShape& s, uint64_t seed)
      : x(s.frames * s.batch * s.heads * (2 * s.dim + s.pos_dim), 1),
        pos(s.pos_batch * (2 * s.frames - 1 + s.left) * s.heads * s.pos_dim, 3),
        cached(s.left * s.batch * s.heads * s.dim),
        grad(s.heads * s.batch * s.frames * (s.left + s.frames), 2) {
    a.frames = s.frames, a.batch = s.batch, a.heads = s.heads, a.query_dim = s.dim, a.pos_dim = s.pos_dim;
    a.left = s.left, a.pos_batch = s.pos_batch, a.chunk = s.chunk, a.left_chunks = s.left_chunks;
    a.penalty = s.penalty, a.limit = 1.25;
    Random random(seed);
    x.fill(random, 0.5), pos.fill(random), cached.fill(random, 0.5), grad.fill(random);
    const auto draw = [&](std::vector<uint8_t>& m, int64_t n) {
      m.resize(static_cast<size_t>(n));
      for (auto& v : m) v = random.uniform() < 0.3;
    };
    draw(padding, a.batch * a.keys());
    draw(mask, (s.masks & 4 ? a.batch : 1) * a.frames * a.keys());
    if (a.batch > 1)  // one sequence with a padded tail, one that is all padding
      for (int64_t j = 0; j < a.keys(); j++)
        padding[static_cast<size_t>(j)] = j >= a.keys() / 2,
        padding[static_cast<size_t>((a.batch - 1) * a.keys() + j)] = 1;
    a.padding = s.masks & 1 ? padding.data() : nullptr;
    a.mask = s.masks & 6 ? mask.data() : nullptr;
    a.mask_per_sequence = s.masks & 4;
    for (int64_t i = 0; i < grad.size(); i++) dw.push_back(value(grad[i]));
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
      const int64_t of_key = t >= 0 ? t / a.chunk : -((-t + a.chunk - 1) / a.chunk), of_query = i / a.chunk;
      if (of_key > of_query || (a.left_chunks >= 0 && of_key < of_query - a.left_chunks)) return true;
    }
    if (a.padding && a.padding[b * a.keys() + j]) return true;
    return a.mask && a.mask[((a.mask_per_sequence ? b * a.frames : 0) + i) * a.keys() + j];
  }

  void reference() {
    const int64_t keys = a.keys();
    w.assign(static_cast<size_t>(grad.size()), 0), dx.assign(static_cast<size_t>(x.size()), 0);
    dpos.assign(static_cast<size_t>(pos.size()), 0), dcached.assign(static_cast<size_t>(cached.size()), 0);
    std::vector<long double> raw(static_cast<size_t>(keys)), s(raw);
    for (int64_t h = 0; h < a.heads; h++)
      for (int64_t b = 0; b < a.batch; b++)
        for (int64_t i = 0; i < a.frames; i++) {
          const auto key = [&](int64_t j, int64_t d) {
            return static_cast<long double>(j < a.left
                                                ? value(cached[((j * a.batch + b) * a.heads + h) * a.query_dim + d])
                                                : value(x[at_k(j - a.left, b, h) + d]));
          };
          long double top = -INFINITY, sum = 0, delta = 0;
          for (int64_t j = 0; j < keys; j++) {
            long double v = 0;
            for (int64_t d = 0; d < a.query_dim; d++) v += value(x[at_q(i, b, h) + d]) * key(j, d);
            if (a.pos_batch)
              for (int64_t d = 0; d < a.pos_dim; d++)
                v += static_cast<long double>(value(x[at_p(i, b, h) + d])) *
                     value(pos[at_r(a.frames - 1 - i + j, b, h) + d]);
            raw[static_cast<size_t>(j)] = v;
            s[static_cast<size_t>(j)] = hidden(b, i, j) ? -1000 : v;
            top = std::max(top, s[static_cast<size_t>(j)]);
          }
          for (auto& v : s) sum += v = std::exp(v - top);
          const size_t row = static_cast<size_t>((((h * a.batch + b) * a.frames) + i) * keys);
          for (size_t j = 0; j < s.size(); j++) {
            w[row + j] = s[j] / sum;
            delta += w[row + j] * dw[row + j];
          }
          for (int64_t j = 0; j < keys; j++) {
            const size_t at = row + static_cast<size_t>(j);
            long double ds = hidden(b, i, j) ? 0 : w[at] * (dw[at] - delta);
            const long double v = raw[static_cast<size_t>(j)];
            if (std::fabs(v) > a.limit) ds += v > 0 ? a.penalty : -a.penalty;
            for (int64_t d = 0; d < a.query_dim; d++) {
              dx[static_cast<size_t>(at_q(i, b, h) + d)] += ds * key(j, d);
              long double& dk = j < a.left
                                    ? dcached[static_cast<size_t>(((j * a.batch + b) * a.heads + h) * a.query_dim + d)]
                                    : dx[static_cast<size_t>(at_k(j - a.left, b, h) + d)];
              dk += ds * value(x[at_q(i, b, h) + d]);
            }
            if (!a.pos_batch) continue;
            for (int64_t d = 0; d < a.pos_dim; d++) {
              const int64_t r = at_r(a.frames - 1 - i + j, b, h) + d;
              dx[static_cast<size_t>(at_p(i, b, h) + d)] += ds * value(pos[r]);
              dpos[static_cast<size_t>(r)] += ds * value(x[at_p(i, b, h) + d]);
            }
          }
        }
  }
};

template <typename T>
bool near(T got, long double expected, double unit) {
  return std::fabs(value(got) - static_cast<double>(expected)) <=
         unit * (1 + std::fabs(static_cast<double>(expected))) +
             std::fabs(static_cast<double>(expected)) * 2 * Type<T>::half_ulp;
}

}  // namespace fastasr::test
