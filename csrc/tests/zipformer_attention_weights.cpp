// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/zipformer_attention_weights.h"

#include <algorithm>
#include <thread>

#include "cpu/attention/attention_rows.h"
#include "cpu/support/buffer_pool.h"
#include "tests/attention_case.h"

namespace fastasr::test {
namespace {

using Shape = AttentionShape;
template <typename T>
using Case = AttentionCase<T>;
using cpu::AttentionProblem;

template <typename T>
void values(const Shape& shape, uint64_t seed) {
  using C = compute_t<T>;
  const auto& kernel = cpu::kernels<cpu::AttentionWeightsKernels<T>>();
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
    kernel.pack_keys(a, c.x.data(), c.cached.data(), hb, kt.data() + hb * a.keys_transposed_size(),
                     rows.data() + hb * a.key_rows_size());
  for (int64_t k = 0; k < a.heads * a.pos_batch; k++)
    kernel.pack_positions(a, c.pos.data(), k / a.pos_batch, k % a.pos_batch, rt.data() + k * a.positions_size());
  for (int64_t hb = 0; hb < pairs; hb++) {
    const C* positions =
        a.pos_batch
            ? rt.data() + (hb / a.batch * a.pos_batch + (a.pos_batch == 1 ? 0 : hb % a.batch)) * a.positions_size()
            : nullptr;
    T* weights = w.data() + hb * a.frames * stride;
    kernel.forward(a, ranges.data(), c.x.data(), kt.data() + hb * a.keys_transposed_size(), positions, hb, 0, a.frames,
                   weights, stride, forward_scratch.data());
    for (int64_t k = 0; k < parts; k++)
      kernel.backward(a, ranges.data(), c.x.data(), weights, stride, c.grad.data() + hb * a.frames * a.keys(), a.keys(),
                      kt.data() + hb * a.keys_transposed_size(), rows.data() + hb * a.key_rows_size(), positions, hb,
                      k * part, std::min(a.frames, (k + 1) * part), dx.data(),
                      dk.data() + (hb * parts + k) * a.key_rows_size(),
                      drt.data() + (hb * parts + k) * a.positions_size(), backward_scratch.data());
    kernel.store_keys(a, dk.data() + hb * parts * a.key_rows_size(), parts, hb, dx.data(), dcached.data());
  }
  for (int64_t k = 0; k < a.heads * a.pos_batch; k++)
    kernel.store_positions(a, drt.data(), parts, k / a.pos_batch, k % a.pos_batch, dpos.data());
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
  const auto& rows = cpu::kernels<cpu::AttentionRows<float>>();
  for (const float x : {0.0f, -0.5f, -20.0f, -87.0f}) {
    alignas(64) float s[32];
    for (int j = 0; j < 32; j++) s[j] = x * static_cast<float>(j) / 31;
    const long double last = std::exp(static_cast<long double>(s[31]));
    rows.exponentials(s, 32, 0.0f);
    CHECK(std::fabs(s[31] - last) <= 2e-6L * last, "e^%g: %g", x, s[31]);
  }
  alignas(64) float s[32];
  for (int j = 0; j < 32; j++) s[j] = j < 16 ? -87.4f : j < 31 ? -3e38f : -INFINITY;
  const float sum = rows.exponentials(s, 32, 0.0f);
  CHECK(sum == 0, "not zero: %g", sum);  // constant attention asks whether a weight is zero
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

TEST_CASE("zipformer_attention_weights") {
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
