// SPDX-License-Identifier: Apache-2.0
#include "cpu/streaming/mega_step.h"

#include <atomic>

#include "cpu/gemm/skinny_gemm.h"
#include "cpu/support/history.h"
#include "tests/check.h"

namespace fastasr::test {
namespace {

using cpu::HistoryView;
using cpu::MegaLayout;

// Returns the error that is allowed beside terms of `size`.
long double room(long double expected, long double size, long double ulps) {
  return ulps * 0x1p-24L * (size + std::fabs(expected)) + 1e-30L;
}

// In the layout nothing overlaps, everything is inside, and panels begin on cache lines.
void layout(const cpu::MegaShape& shape) {
  const MegaLayout l(shape);
  std::vector<int> used(static_cast<size_t>(l.total));
  const auto take = [&](int64_t at, int64_t size) {
    CHECK(at % 16 == 0 && at >= 0 && at + size <= l.total, "a part lies outside or across lines");
    for (int64_t i = at; i < at + size; i++) CHECK(used[i]++ == 0, "parts overlap");
  };
  for (int64_t b = 0; b < shape.blocks; b++) {
    for (int i = 0; i < cpu::kMegaVectors; i++) take(b * l.block + l.vector[i], l.vector_size[i]);
    for (int i = 0; i < cpu::kMegaProducts; i++) {
      take(b * l.block + l.bias[i], l.stride[i]);
      take(b * l.block + l.weight[i], cpu::packed_size(l.outputs[i], l.inputs[i]));
    }
  }
  take(l.final_scale, shape.size);
  take(l.final_bias, shape.size);
  take(l.final_eps, 1);
}

struct Block {
  MegaLayout l;
  Random random{5};
  std::vector<std::vector<float>> p;
  Buffer<float> block;
  explicit Block(const cpu::MegaShape& s) : l(s), block(l.block) {
    const int64_t n = s.size * s.orders, mx = 2 * s.size + s.key + s.value;
    for (const int64_t size : {n,         n,
                               n,         n,
                               s.size,    s.value * s.size,
                               s.value,   mx * s.size,
                               mx,        s.size * s.value,
                               s.size,    2 * s.key,
                               2 * s.key, s.size,
                               s.size,    s.inner * s.size,
                               s.inner,   s.size * s.inner,
                               s.size,    s.size,
                               s.size}) {
      p.emplace_back(static_cast<size_t>(size));
      for (float& v : p.back()) v = static_cast<float>(random.normal());
    }
    cpu::mega_pack_block(l, {p[0].data(),  p[1].data(),  p[2].data(),  p[3].data(),  p[4].data(),  p[5].data(),
                             p[6].data(),  p[7].data(),  p[8].data(),  p[9].data(),  p[10].data(), p[11].data(),
                             p[12].data(), p[13].data(), p[14].data(), p[15].data(), p[16].data(), p[17].data(),
                             p[18].data(), p[19].data(), p[20].data(), 1e-5f,        1e-12f},
                         block);
  }
};

void average(const cpu::MegaShape& shape) {
  Block b(shape);
  constexpr int64_t kRows = 3;
  const int64_t d = shape.size, n = shape.orders, stride = d + 5;
  Buffer<float> x(kRows * stride, 1, b.random), state(kRows * d * n, 1, b.random), next(kRows * d * n, 3),
      y(kRows * stride, 2);
  for (const bool empty : {false, true}) {
    cpu::kernels<cpu::MegaKernels>().average(b.l, b.block, x, empty ? nullptr : state.data(), next, y, stride, kRows);
    for (int64_t r = 0; r < kRows; r++)
      for (int64_t i = 0; i < d; i++) {
        Sum sum;
        const long double v = x(r * stride + i);
        for (int64_t j = 0; j < n; j++) {
          const int64_t at = i * n + j, in = r * d * n + at;
          const long double p = logistic(b.p[0][at]), q = 1 - p * logistic(b.p[1][at]);
          const long double added = p * b.p[2][at] * v, kept = q * (empty ? 0 : state(in)), h = added + kept;
          const long double g = b.p[3][at] / std::sqrt((long double)n), size = std::fabs(added) + std::fabs(kept);
          EXPECT_WITHIN(next, in, h, room(h, size, 4));
          sum.add(g * h, std::fabs(g) * size);
        }
        sum.add(b.p[4][i] * v);
        const long double out = sum.value * logistic(sum.value);
        EXPECT_WITHIN(y, r * stride + i, out, room(out, sum.size, 12 + n));
      }
  }
}

void attention(const cpu::MegaShape& shape, int64_t length) {
  INFO("length ", length);
  Block b(shape);
  const int64_t k = shape.key, v = shape.value, ks = k + 3, vs = v + 1;
  Buffer<float> query(k, 0, b.random), keys(length * ks, 1, b.random), values(length * vs, 2, b.random),
      bias(length, 0, b.random), gate(v, 0, b.random), out(v, 1), scores(length);
  cpu::kernels<cpu::MegaKernels>().attention(b.l, query, keys, ks, values, vs, length, bias, gate, scores, out);
  std::vector<long double> w(static_cast<size_t>(length));
  long double total = 0, top = -1e30L, score_size = 0;
  for (int64_t j = 0; j < length; j++) {
    Sum s;
    s.add(bias(j));
    for (int64_t i = 0; i < k; i++) s.add(query(i) * keys(j * ks + i));
    w[j] = s.value, top = std::max(top, s.value), score_size = std::max(score_size, s.size);
  }
  for (long double& s : w) total += s = std::exp(s - top);
  for (int64_t c = 0; c < v; c++) {
    Sum sum;
    for (int64_t j = 0; j < length; j++) sum.add(w[j] / total * values(j * vs + c) * gate(c));
    EXPECT_WITHIN(out, c, sum.value, room(sum.value, sum.size, 16 + 4 * score_size));
  }
}

void norms(int64_t channels) {
  Random random(3);
  Buffer<float> x(channels, 1, random), y(channels, 0, random), u(channels, 0, random), hx(channels, 0, random),
      scale(channels, 0, random), bias(channels, 0, random), gated(channels), plain(channels), alone(channels);
  std::copy_n(x.data(), channels, gated.data());
  const auto& kernel = cpu::kernels<cpu::MegaKernels>();
  kernel.gated_norm(gated, u, hx, y, scale, bias, 1e-3f, channels);
  kernel.norm(x, y, scale, bias, 1e-3f, plain, channels);
  kernel.norm(x, nullptr, scale, bias, 1e-3f, alone, channels);
  for (int kind = 0; kind < 3; kind++) {
    INFO("norm ", kind, " of ", channels);
    std::vector<long double> in(static_cast<size_t>(channels));
    long double mean = 0, variance = 0;
    for (int64_t i = 0; i < channels; i++) {
      const long double a = x(i), h = hx(i) + y(i);
      in[i] = kind == 0 ? a + logistic(u(i)) * (h * logistic(h) - a) : kind == 1 ? a + y(i) : a;
      mean += in[i] / channels;
    }
    for (const long double v : in) variance += (v - mean) * (v - mean) / channels;
    Buffer<float>& got = kind == 0 ? gated : kind == 1 ? plain : alone;
    for (int64_t i = 0; i < channels; i++) {
      const long double r = 1 / std::sqrt(variance + 1e-3L), expected = (in[i] - mean) * r * scale(i) + bias(i);
      const long double size = (std::fabs(x(i)) + std::fabs(y(i)) + std::fabs(hx(i)) + std::fabs(mean)) * r;
      EXPECT_WITHIN(got, i, expected, room(expected, size * std::fabs(scale(i)) + std::fabs(bias(i)), 8));
    }
  }
}

void products() {
  Random random(9);
  constexpr int64_t kRows = 3;
  Buffer<float> w1(70 * 20, 0, random), w2(10 * 33, 0, random), x1(kRows * 20, 0, random), x2(kRows * 33, 0, random),
      bias(128, 0, random), p1(cpu::packed_size(70, 20)), p2(cpu::packed_size(10, 33)), y1(kRows * 128), y2(kRows * 64),
      z1(kRows * 128), z2(kRows * 64);
  cpu::pack_panels(w1, 70, 20, 20, cpu::WeightFormat::fp32, p1, nullptr, 0, 2);
  cpu::pack_panels(w2, 10, 33, 33, cpu::WeightFormat::fp32, p2, nullptr, 0, 1);
  const cpu::Product list[] = {{x1, 20, 20, p1, bias, y1, 128, 2, false}, {x2, 33, 33, p2, bias, y2, 64, 1, true}};
  for (int64_t panel = 2; panel >= 0; panel--)
    cpu::kernels<cpu::MegaKernels>().products(list, 2, kRows, panel, panel + 1);
  cpu::skinny_gemm(x1, 20, kRows, 20, {p1}, bias, z1, 128, 0, 2);
  cpu::skinny_gemm(x2, 33, kRows, 33, {p2}, bias, z2, 64, 0, 1);
  CHECK(y1.equals(z1), "products: the first");
  for (int64_t i = 0; i < kRows * 64; i++) {
    const long double expected = z2(i) * logistic(z2(i));
    EXPECT_WITHIN(y2, i, expected, room(expected, std::fabs(z2(i)), 8));
  }
}

// A buffer grows by rows that are given out once.
void history() {
  constexpr int64_t kSequences = 3, kCapacity = 5, kWidth = 4, kHeader = cpu::history_header(kSequences);
  constexpr int64_t kSize = cpu::history_size(kSequences, kCapacity, kWidth), kStride = kCapacity * kWidth;
  Buffer<float> memory(kSize);
  const HistoryView all{memory, kSize, kHeader, kSequences, 2, kWidth, kStride, kWidth};
  const auto with = [&](auto change) {
    HistoryView v = all;
    change(v);
    return cpu::history_claim(v);
  };
  memory.set(0);
  CHECK(!cpu::history_claim(all), "memory without a header");
  cpu::history_begin(memory, kSequences, kCapacity, kWidth, 2);
  CHECK(!with([](auto& v) { v.size--; }), "another size");
  CHECK(!with([](auto& v) { v.size = 3; }), "too small for a header");
  CHECK(!with([](auto& v) { v.width++; }), "another width");
  CHECK(!with([](auto& v) { v.offset++; }), "begins within a row");
  CHECK(!with([](auto& v) { v.offset -= kWidth; }), "begins in the header");
  CHECK(!with([](auto& v) { v.batch++; }), "more sequences than there are");
  CHECK(!with([](auto& v) { v.offset += kStride; }), "ends behind the last sequence");
  CHECK(!with([](auto& v) { v.length--; }), "not the last row");
  CHECK(!with([](auto& v) { v.length++; }), "rows that are not taken");
  CHECK(!with([](auto& v) { v.sequence_stride = 0; }), "the same sequence three times");
  CHECK(!with([](auto& v) { v.row_stride = 2 * kWidth; }), "every other row");
  CHECK(cpu::history_claim(all), "the row behind");
  CHECK(!cpu::history_claim(all), "the same row twice");
  CHECK(with([](auto& v) { v.length = 3; }), "the next row");
  // one sequence alone, its last row only
  CHECK(with([](auto& v) { v.offset += kStride + 3 * kWidth, v.batch = 1, v.length = 1, v.row_stride = 99; }), "a row");
  CHECK(!with([](auto& v) { v.length = 4; }), "one sequence is ahead");
  CHECK(!with([](auto& v) { v.batch = 1, v.length = 5; }), "full");
  CHECK(!with([](auto& v) { v.offset += kStride, v.batch = 1, v.length = 5; }), "full");

  for (int round = 0; round < 20; round++) {
    cpu::history_begin(memory, kSequences, kCapacity, kWidth, 2);
    std::atomic<int> given{0};
    on_threads(4, [&](int64_t) { given += cpu::history_claim(all); });
    CHECK(given == 1, "a row was given to %d threads", given.load());
  }
}

}  // namespace

TEST_CASE("mega_step") {
  for (const cpu::MegaShape& shape : {cpu::MegaShape{8, 4, 6, 10, 12, 2}, cpu::MegaShape{67, 1, 16, 100, 70, 1},
                                      cpu::MegaShape{33, 16, 65, 64, 129, 3}, cpu::MegaShape{1, 1, 1, 1, 1, 1}}) {
    layout(shape);
    average(shape);
    for (const int64_t length : {1, 2, 7, 8, 9, 16, 33, 200}) attention(shape, length);
  }
  for (const int64_t channels : {1, 2, 15, 16, 33, 512}) norms(channels);
  products();
  history();
}

}  // namespace fastasr::test
