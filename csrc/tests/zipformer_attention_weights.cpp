// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/zipformer_attention_weights.h"

#include "cpu/attention/attention_rows.h"
#include "cpu/support/buffer_pool.h"
#include "tests/attention_case.h"

namespace fastasr::test {
namespace {

template <typename T>
struct Weights : AttentionCase<T> {
  using Base = AttentionCase<T>;
  using Base::a, Base::kernel, Base::random;
  using typename Base::C;
  int64_t stride = a.keys() + 3;  // of the rows of W
  Buffer<T> grad{this->pairs * a.frames * a.keys(), 2, random}, w{this->pairs * a.frames * stride, 1};

  using Base::Base;
  void run() {
    const cpu::KeyRange* const ranges = this->ranges.data();
    Buffer<C> forward_scratch(a.forward_scratch()), backward_scratch(a.backward_scratch());
    w.set(0);
    for (int64_t pair = 0; pair < this->pairs; pair++) {
      T* weights = w + pair * a.frames * stride;
      kernel.forward(a, ranges, this->x, this->kt_of(pair), this->positions_of(pair), pair, 0, a.frames, weights,
                     stride, forward_scratch);
      this->each_part([&](int64_t k, int64_t begin, int64_t end) {
        kernel.backward(a, ranges, this->x, weights, stride, grad + pair * a.frames * a.keys(), a.keys(),
                        this->kt_of(pair), this->rows_of(pair), this->positions_of(pair), pair, begin, end, this->dx,
                        this->dk_of(pair, k), this->drt_of(pair, k), backward_scratch);
      });
      this->store_keys(pair);
    }
    this->store_positions(a.heads);
  }
  auto outputs() { return std::tie(w, this->dx, this->dpos, this->dcached); }
};

template <typename T>
void values(const AttentionShape& shape, uint64_t seed) {
  INFO(Type<T>::name, " T=", shape.frames, " left=", shape.left, " chunk=", shape.chunk);
  Weights<T> c(shape, seed, rounded<T>);
  Weights<double> exact(shape, seed, rounded<T>);
  c.run(), exact.run();
  // the gradient is formed of W as it is stored, in T
  expect_like<T>(c.outputs(), exact.outputs(), 20 + 5 * kStored<T>);
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
  on_threads(4, [](int64_t) {
    for (int i = 0; i < 50; i++) {
      auto* p = static_cast<char*>(cpu::acquire_buffer((size_t{1} << 20) + static_cast<size_t>(i) * 1000));
      p[0] = p[i] = 1;
      cpu::release_buffer(p);
    }
  });
  cpu::free_idle_buffers();
  CHECK(cpu::idle_buffer_bytes() == 0, "freed");
}

}  // namespace

TEST_CASE("zipformer_attention_weights") {
  const AttentionShape shapes[] = {
      {1, 1, 1, 1, 1, 0, 1, 0, -1, 0, 0},         {7, 2, 2, 8, 4, 0, 1, 0, -1, 1, 0},
      {33, 3, 1, 32, 4, 0, 3, 0, -1, 3, 0},       {40, 2, 2, 5, 3, 0, 1, 8, 1, 0, 0},
      {21, 2, 1, 33, 5, 13, 2, 5, 2, 1, 0},       {19, 1, 1, 4, 2, 70, 1, 4, 0, 4, 0},
      {50, 2, 1, 16, 0, 0, 0, 16, -1, 5, 0},      {37, 2, 1, 9, 4, 5, 1, 7, 1, 3, 0.01},
      {21, 2, 2, 8, 4, 0, 2, 0, -1, 0, 0, 9, 9},  {140, 1, 1, 4, 3, 0, 1, 5, 1, 3, 0.01, 67, 67},
      {50, 1, 1, 4, 3, 0, 1, 0, -1, 1, 0, 40, 6},
  };
  uint64_t seed = 1;
  for (const AttentionShape& shape : shapes) {
    for_each_type([&]<typename T>() { values<T>(shape, seed); });
    seed++;
  }
  exponential();
  pool();
}

}  // namespace fastasr::test
