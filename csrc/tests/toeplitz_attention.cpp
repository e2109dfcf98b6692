// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/toeplitz_attention.h"

#include <algorithm>

#include "tests/check.h"

namespace fastasr::test {
namespace {

// Computes both products of `depth` terms, whole and in part: the rest of a part may hold anything.
template <typename C>
void tiles(int64_t depth, cpu::TilePart part) {
  INFO(Type<C>::name, " depth ", depth, ", ", part.rows, "x", part.columns);
  const int64_t blocks = std::max<int64_t>(1, (depth + 31) / 32), block = 40 * 32;
  Random random(static_cast<uint64_t>(depth) + 9);
  Buffer<C> a(blocks * block + depth * 32 + 8, 0, random), b(blocks * 32 * 32, 0, random), c(8 * 32, 0, random),
      c2(8 * 32);
  std::vector<C> before(c.data(), c.data() + 8 * 32);
  cpu::tile_columns(a.data(), b.data(), depth, c.data(), true, part);
  cpu::tile_rows(a.data(), block, b.data(), depth, c2.data(), false, part);
  for (int64_t m = 0; m < part.rows; m++)
    for (int64_t n = 0; n < part.columns; n++) {
      Sum columns{before[m * 32 + n], 1 + std::fabs(before[m * 32 + n])}, rows{0, 1};
      for (int64_t k = 0; k < depth; k++) {
        columns.add(a(k * 32 + m) * b(k * 32 + n));
        rows.add(a(k / 32 * block + m * 32 + k % 32) * b(k * 32 + n));
      }
      EXPECT_WITHIN(c, m * 32 + n, columns.value, 20 * Type<C>::half_ulp * columns.size);
      EXPECT_WITHIN(c2, m * 32 + n, rows.value, 20 * Type<C>::half_ulp * rows.size);
    }
}

template <typename C>
void tiles() {
  for (const int64_t depth : {0, 1, 5, 31, 64, 65, 200}) tiles<C>(depth, {});
  for (const int64_t rows : {4, 8})
    for (const int64_t columns : {8, 16, 24, 32}) tiles<C>(45, {rows, columns});
}

struct Shape {
  int64_t length, batch, d, v, chunk;
  bool causal, padded, dropped, activate_value;
};

// Holds one call: inputs, outputs, and the steps in the order of the bindings.
template <typename T>
struct Call {
  using C = compute_t<T>;
  static constexpr int64_t kExtra = 5;  // channels of a wider projection that query_key and gate are slices of
  Shape s;
  Rounding rounding;
  int64_t frames = s.length * s.batch;
  int64_t size = std::max<int64_t>(1, s.chunk > 0 ? std::min(s.chunk, s.length) : s.length);
  int64_t count = (s.length + size - 1) / size;
  Random random{static_cast<uint64_t>(s.length * 31 + s.d), rounding};
  Buffer<T> query_key{frames * (s.d + kExtra), 0, random}, gate{frames * (s.v + kExtra), 0, random},
      value{frames * s.v, 0, random}, grad{frames * s.v, 0, random};
  Buffer<T> y{frames * s.v}, mixed{frames * s.v}, dquery_key{frames * s.d}, dgate{frames * s.v}, dvalue{frames * s.v};
  Buffer<C> weight{2 * s.d, 0, random, 0.5}, bias{2 * s.d, 0, random, 0.5}, position{2 * size + 1, 0, random, 0.5},
      dropout{s.batch * count * size * size};
  Buffer<uint8_t> padding{frames};
  cpu::ToeplitzAttention<T> p{};
  int64_t width = 4 * s.d + 2 * size - 1;
  Buffer<double> sums{width};

  explicit Call(const Shape& shape, Rounding rounding_ = nullptr) : s(shape), rounding(rounding_) {
    for (int64_t i = 0; i < dropout.size(); i++) dropout[i] = random.uniform() < 0.2 ? C(0) : C(1.25);
    for (int64_t b = 0; b < s.batch; b++)  // never the first of a chunk: that could leave a query without a key
      for (int64_t j = 0; j < s.length; j++)
        padding[b * s.length + j] = j % size != 0 && (j >= s.length - b || j % 5 == 3);
    p.query_key = {query_key, s.batch * (s.d + kExtra), s.d + kExtra};
    p.gate = {gate, s.batch * (s.v + kExtra), s.v + kExtra};
    p.value = {value, s.batch * s.v, s.v};
    p.qk_weight = weight, p.qk_bias = bias;
    p.reach = size, p.position_bias = position + size;
    p.padding = s.padded ? padding.data() : nullptr, p.dropout = s.dropped ? dropout.data() : nullptr;
    p.length = s.length, p.batch = s.batch, p.d = s.d, p.v = s.v;
    p.size = size, p.count = count;
    p.causal = s.causal, p.activate_value = s.activate_value, p.activation = 1;
  }

  void run() {
    sums.set(0);
    const auto& kernel = cpu::kernels<cpu::ToeplitzAttentionKernels<T>>();
    cpu::ToeplitzGradients<T> g{{grad, p.batch * p.v, p.v}, {mixed, p.batch * p.v, p.v}, dquery_key, dgate, dvalue};
    for (int64_t unit = 0; unit < p.units(); unit++) {
      Buffer<C> memory(cpu::toeplitz_unit_elements(p, true)), scratch(cpu::toeplitz_scratch_elements(p));
      const auto u = cpu::toeplitz_unit(p, true, memory);
      kernel.pack(p, unit, true, u, scratch);
      for (int64_t block = 0; block < p.blocks(); block++) kernel.pack_value(p, unit, block, u);
      for (int64_t block = p.blocks(); block-- > 0;) kernel.forward(p, unit, block, u, y, mixed, scratch);
      for (int64_t block = p.blocks(); block-- > 0;) kernel.backward(p, g, unit, block, u, scratch);
      for (int64_t block = p.blocks(); block-- > 0;) kernel.backward_keys(p, g, unit, block, u, scratch);
      std::vector<double> part(static_cast<size_t>(width));
      kernel.backward_parameters(p, g, unit, u, part.data(), part.data() + 4 * p.d, scratch);
      for (int64_t i = 0; i < width; i++) sums[i] += part[i];
    }
  }
  auto outputs() { return std::tie(y, dquery_key, dgate, dvalue, sums); }
};

const Shape kShapes[] = {
    {1, 1, 1, 1, 0, true, false, false, false},   {7, 2, 5, 9, 0, true, true, false, true},
    {33, 1, 33, 34, 0, true, false, true, false}, {40, 2, 16, 31, 0, false, true, false, false},
    {45, 1, 8, 40, 20, true, true, true, true},   {70, 1, 40, 33, 33, false, false, false, true},
    {100, 1, 4, 8, 0, true, true, false, false},  {36, 1, 8, 150, 0, true, false, false, true},
};

template <typename T>
void values() {
  for (const Shape& shape : kShapes) {
    INFO(Type<T>::name, " length ", shape.length);
    Call<T> call(shape, rounded<T>);
    Call<double> exact(shape, rounded<T>);
    call.run(), exact.run();
    // h is kept in T for the backward pass
    expect_like<T>(call.outputs(), exact.outputs(), 20 + kStored<T>);
  }
}

// The kernels do not even read what a query may not see.
void masked_keys_are_not_read() {
  Call<float> call({40, 2, 8, 12, 0, true, true, false, false}), other({40, 2, 8, 12, 0, true, true, false, false});
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (int64_t c = 0; c < 12; c++) other.value[(39 * 2) * 12 + c] = nan;  // the last frame of the first sequence
  call.run(), other.run();
  for (int64_t i = 0; i < 32 * 2 * 12; i++) CHECK(same_bits(call.y[i], other.y[i]), "a later frame was read");
}

}  // namespace

TEST_CASE("toeplitz_attention") {
  tiles<float>();
  tiles<double>();
  for_each_type([&]<typename T>() { values<T>(); });
  masked_keys_are_not_read();
}

}  // namespace fastasr::test
