// SPDX-License-Identifier: Apache-2.0
#include "cpu/rel_position_attention_weights.h"

#include <algorithm>
#include <thread>

#include "cpu/attention_rows.h"
#include "cpu/buffer_pool.h"
#include "tests/check.h"

namespace fastasr::test {
namespace {

using cpu::AttentionProblem;

struct Shape {
  int64_t frames, batch, heads, dim, pos_dim, left, pos_batch, chunk, left_chunks;
  int masks;  // 1: padding, 2: a mask, 4: a mask per sequence
  double penalty;
};

// Inputs, and everything the kernels compute, in long double.
template <typename T>
struct Case {
  using C = compute_t<T>;
  AttentionProblem a{};
  Buffer<T> x, pos, cached, grad;
  std::vector<uint8_t> padding, mask;
  std::vector<long double> w, dx, dpos, dcached;

  Case(const Shape& s, uint64_t seed)
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
            delta += w[row + j] * value(grad[static_cast<int64_t>(row + j)]);
          }
          for (int64_t j = 0; j < keys; j++) {
            const size_t at = row + static_cast<size_t>(j);
            long double ds = hidden(b, i, j) ? 0 : w[at] * (value(grad[static_cast<int64_t>(at)]) - delta);
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

template <typename T>
void values(const Shape& shape, uint64_t seed) {
  using C = compute_t<T>;
  Case<T> c(shape, seed);
  const AttentionProblem& a = c.a;
  const int64_t pairs = a.heads * a.batch, stride = a.keys() + 3;
  std::vector<cpu::KeyRange> ranges(static_cast<size_t>(a.batch));
  attention_key_ranges(a, ranges.data());
  Buffer<C> kt(pairs * a.keys_transposed_size()), rows(pairs * a.key_rows_size()),
      rt(a.heads * a.pos_batch * a.positions_size()), forward_scratch(a.forward_scratch()),
      backward_scratch(a.backward_scratch());
  const int64_t part = cpu::kAttentionStep * 2, parts = (a.frames + part - 1) / part;
  Buffer<C> dk(pairs * parts * a.key_rows_size()), drt(pairs * parts * a.positions_size());
  Buffer<T> w(pairs * a.frames * stride, 1), dx(c.x.size(), 1), dpos(c.pos.size(), 1), dcached(c.cached.size(), 1);
  for (int64_t hb = 0; hb < pairs; hb++)
    cpu::attention_pack_keys(a, c.x.data(), c.cached.data(), hb, kt.data() + hb * a.keys_transposed_size(),
                             rows.data() + hb * a.key_rows_size());
  for (int64_t k = 0; k < a.heads * a.pos_batch; k++)
    cpu::attention_pack_positions(a, c.pos.data(), k / a.pos_batch, k % a.pos_batch,
                                  rt.data() + k * a.positions_size());
  for (int64_t hb = 0; hb < pairs; hb++) {
    const C* positions =
        a.pos_batch
            ? rt.data() + (hb / a.batch * a.pos_batch + (a.pos_batch == 1 ? 0 : hb % a.batch)) * a.positions_size()
            : nullptr;
    T* weights = w.data() + hb * a.frames * stride;
    cpu::attention_weights_forward(a, ranges.data(), c.x.data(), kt.data() + hb * a.keys_transposed_size(), positions,
                                   hb, 0, a.frames, weights, stride, forward_scratch.data());
    for (int64_t k = 0; k < parts; k++)
      cpu::attention_weights_backward(
          a, ranges.data(), c.x.data(), weights, stride, c.grad.data() + hb * a.frames * a.keys(), a.keys(),
          kt.data() + hb * a.keys_transposed_size(), rows.data() + hb * a.key_rows_size(), positions, hb, k * part,
          std::min(a.frames, (k + 1) * part), dx.data(), dk.data() + (hb * parts + k) * a.key_rows_size(),
          drt.data() + (hb * parts + k) * a.positions_size(), backward_scratch.data());
    cpu::attention_store_keys(a, dk.data() + hb * parts * a.key_rows_size(), parts, hb, dx.data(), dcached.data());
  }
  for (int64_t k = 0; k < a.heads * a.pos_batch; k++)
    cpu::attention_store_positions(a, drt.data(), parts, k / a.pos_batch, k % a.pos_batch, dpos.data());
  CHECK(kt.intact() && rows.intact() && rt.intact() && forward_scratch.intact() && backward_scratch.intact() &&
            dk.intact() && drt.intact() && w.intact() && dx.intact() && dpos.intact() && dcached.intact(),
        "%s wrote outside, T=%ld left=%ld", Type<T>::name, long(a.frames), long(a.left));
  // W is rounded to T before its gradient is formed from it
  const double unit = 64 * Type<C>::half_ulp, rounded = unit + 2 * Type<T>::half_ulp * (sizeof(T) == 2 ? 1 : 0);
  for (int64_t i = 0; i < pairs * a.frames; i++)
    for (int64_t j = 0; j < a.keys(); j++)
      CHECK(near(w[i * stride + j], c.w[static_cast<size_t>(i * a.keys() + j)], unit),
            "%s W, row %ld key %ld: %g, expected %Lg", Type<T>::name, long(i), long(j), value(w[i * stride + j]),
            c.w[static_cast<size_t>(i * a.keys() + j)]);
  const auto same = [&](Buffer<T>& got, const std::vector<long double>& expected, const char* name) {
    for (int64_t i = 0; i < got.size(); i++)
      CHECK(near(got[i], expected[static_cast<size_t>(i)], 4 * rounded),
            "%s %s, T=%ld left=%ld chunk=%ld, %ld: %g, expected %Lg", Type<T>::name, name, long(a.frames), long(a.left),
            long(a.chunk), long(i), value(got[i]), expected[static_cast<size_t>(i)]);
  };
  same(dx, c.dx, "dx");
  same(dcached, c.dcached, "dcached_key");
  if (a.pos_batch) same(dpos, c.dpos, "dpos");
}

void exponential() {
  for (const float x : {0.0f, -0.5f, -20.0f, -87.0f}) {
    alignas(64) float s[32];
    for (int j = 0; j < 32; j++) s[j] = x * static_cast<float>(j) / 31;
    const long double last = std::exp(static_cast<long double>(s[31]));
    cpu::row_exponentials(s, 32, 0.0f);
    CHECK(std::fabs(s[31] - last) <= 2e-6L * last, "e^%g: %g", x, s[31]);
  }
  alignas(64) float s[32];
  for (int j = 0; j < 32; j++) s[j] = j < 16 ? -87.4f : j < 31 ? -3e38f : -INFINITY;
  const float sum = cpu::row_exponentials(s, 32, 0.0f);
  CHECK(sum == 0, "not zero: %g", sum);  // whether a weight is zero is asked by constant attention
}

void pool() {
  constexpr size_t kSize = size_t{3} << 20;
  cpu::free_idle_buffers();
  void* first = cpu::acquire_buffer(kSize);
  CHECK(reinterpret_cast<uintptr_t>(first) % 64 == 0, "alignment");
  cpu::release_buffer(first);
  CHECK(cpu::idle_buffer_bytes() == kSize, "%zu idle", cpu::idle_buffer_bytes());
  CHECK(cpu::acquire_buffer(kSize * 3 / 4) == first, "a buffer that fits is taken again");
  void* other = cpu::acquire_buffer(kSize);
  CHECK(other != first, "a buffer has one owner");
  cpu::release_buffer(first), cpu::release_buffer(other);
  void* small = cpu::acquire_buffer(kSize / 4);
  CHECK(small != first && small != other, "a buffer is at most twice too large");
  cpu::release_buffer(small);
  cpu::release_buffer(cpu::acquire_buffer(0));
  cpu::release_buffer(nullptr);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; t++)
    threads.emplace_back([] {
      for (int i = 0; i < 50; i++) {
        auto* p = static_cast<char*>(cpu::acquire_buffer((size_t{1} << 20) + static_cast<size_t>(i) * 1000));
        p[0] = p[i] = 1;
        cpu::release_buffer(p);
      }
    });
  for (std::thread& thread : threads) thread.join();
  cpu::free_idle_buffers();
  CHECK(cpu::idle_buffer_bytes() == 0, "freed");
}

}  // namespace

void rel_position_attention_weights() {
  const Shape shapes[] = {
      {1, 1, 1, 1, 1, 0, 1, 0, -1, 0, 0},    {7, 2, 2, 8, 4, 0, 1, 0, -1, 1, 0},
      {33, 3, 1, 32, 4, 0, 3, 0, -1, 3, 0},  {40, 2, 2, 5, 3, 0, 1, 8, 1, 0, 0},
      {21, 2, 1, 33, 5, 13, 2, 5, 2, 1, 0},  {19, 1, 1, 4, 2, 70, 1, 4, 0, 4, 0},
      {50, 2, 1, 16, 0, 0, 0, 16, -1, 5, 0}, {37, 2, 1, 9, 4, 5, 1, 7, 1, 3, 0.01},
  };
  uint64_t seed = 1;
  for (const Shape& shape : shapes) {
    for_each_type([&]<typename T>() { values<T>(shape, seed); });
    seed++;
  }
  exponential();
  pool();
}

}  // namespace fastasr::test
