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
  int64_t frames = s.length * s.batch;
  int64_t size = std::max<int64_t>(1, s.chunk > 0 ? std::min(s.chunk, s.length) : s.length);
  int64_t count = (s.length + size - 1) / size;
  Random random{static_cast<uint64_t>(s.length * 31 + s.d)};
  Buffer<T> query_key{frames * (s.d + kExtra), 0, random}, gate{frames * (s.v + kExtra), 0, random},
      value{frames * s.v, 0, random}, grad{frames * s.v, 0, random};
  Buffer<T> y{frames * s.v}, mixed{frames * s.v}, dquery_key{frames * s.d}, dgate{frames * s.v}, dvalue{frames * s.v};
  Buffer<C> weight{2 * s.d, 0, random, 0.5}, bias{2 * s.d, 0, random, 0.5}, position{2 * size + 1, 0, random, 0.5},
      dropout{s.batch * count * size * size};
  Buffer<uint8_t> padding{frames};
  cpu::ToeplitzAttention<T> p{};
  std::vector<double> parts;

  explicit Call(const Shape& shape) : s(shape) {
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
    const int64_t width = 4 * p.d + 2 * p.size - 1;
    parts.assign(static_cast<size_t>(p.units() * width), 0.0);
    const auto& kernel = cpu::kernels<cpu::ToeplitzAttentionKernels<T>>();
    cpu::ToeplitzGradients<T> g{{grad, p.batch * p.v, p.v}, {mixed, p.batch * p.v, p.v}, dquery_key, dgate, dvalue};
    for (int64_t unit = 0; unit < p.units(); unit++) {
      Buffer<C> memory(cpu::toeplitz_unit_elements(p, true)), scratch(cpu::toeplitz_scratch_elements(p));
      const auto u = cpu::toeplitz_unit(p, true, memory);
      kernel.pack(p, unit, true, u, scratch);
      for (int64_t panel = 0; panel < p.v_panels(); panel++) kernel.pack_value(p, unit, panel, u);
      for (int64_t block = p.blocks(); block-- > 0;) kernel.forward(p, unit, block, u, y, mixed, scratch);
      for (int64_t block = p.blocks(); block-- > 0;) kernel.backward(p, g, unit, block, u, scratch);
      for (int64_t panel = 0; panel < p.v_panels() + p.d_panels(); panel++)
        kernel.backward_keys(p, g, unit, panel, u, scratch);
      double* part = parts.data() + unit * width;
      kernel.backward_parameters(p, g, unit, u, part, part + 4 * p.d, scratch);
    }
  }

  // Computes y in double from the formula.
  std::vector<double> expected() {
    std::vector<double> out(static_cast<size_t>(y.size()));
    const auto silu = [](double x) { return x / (1 + std::exp(-x)); };
    for (int64_t b = 0; b < p.batch; b++)
      for (int64_t i = 0; i < p.length; i++) {
        const int64_t first = i / p.size * p.size, last = std::min(p.length, first + p.size);
        bool all = true;
        for (int64_t j = first; j < last; j++) all = all && padding[b * p.length + j];
        std::vector<double> a(static_cast<size_t>(last - first));
        double sum = 0;
        for (int64_t j = first; j < last; j++) {
          double s = 0;
          for (int64_t c = 0; c < p.d; c++) {
            const double zi = silu(test::value(*(p.query_key.at(i, b) + c)));
            const double zj = silu(test::value(*(p.query_key.at(j, b) + c)));
            s += (zi * weight[c] + bias[c]) * (zj * weight[p.d + c] + bias[p.d + c]);
          }
          const bool hidden = (p.causal && j > i) || (p.padding && !all && p.padding[b * p.length + j]);
          const double e = hidden ? 0 : std::exp(s / std::sqrt(double(p.d)) + p.position_bias[j - i]);
          a[j - first] = e, sum += e;
        }
        for (int64_t c = 0; c < p.v; c++) {
          double h = 0;
          for (int64_t j = first; j < last; j++) {
            double w = a[j - first] / sum, x = test::value(*(p.value.at(j, b) + c));
            if (p.dropout) w *= p.dropout[((b * p.count + i / p.size) * p.size + i - first) * p.size + j - first];
            h += w * (p.activate_value ? silu(x) : x);
          }
          out[(i * p.batch + b) * p.v + c] = h * silu(test::value(*(p.gate.at(i, b) + c)));
        }
      }
    return out;
  }
};

const Shape kShapes[] = {
    {1, 1, 1, 1, 0, true, false, false, false},   {7, 2, 5, 9, 0, true, true, false, true},
    {33, 1, 33, 34, 0, true, false, true, false}, {40, 2, 16, 31, 0, false, true, false, false},
    {45, 1, 8, 40, 20, true, true, true, true},   {70, 1, 40, 33, 33, false, false, false, true},
    {100, 1, 4, 8, 0, true, true, false, false},
};

template <typename T>
void values() {
  for (const Shape& shape : kShapes) {
    INFO(Type<T>::name, " length ", shape.length);
    Call<T> call(shape);
    call.run();
    const auto want = call.expected();
    for (int64_t i = 0; i < call.y.size(); i++) EXPECT(call.y, i, want[i], 200);
  }
}

// Compares gradients in double with differences of the formula, at elements all over each argument.
void gradients() {
  for (const Shape& shape : kShapes) {
    INFO("length ", shape.length);
    Call<double> call(shape);
    call.run();
    const auto& p = call.p;
    const auto probe = [&](double* at, double got, const char* name) {
      expect_slope(name, at, got, call.grad, [&] { return call.expected(); });
    };
    const auto sum = [&](int64_t column) {
      double total = 0;
      const int64_t width = 4 * p.d + 2 * p.size - 1;
      for (int64_t unit = 0; unit < p.units(); unit++) total += call.parts[unit * width + column];
      return total;
    };
    for (int64_t f = 0; f < p.length * p.batch; f += std::max<int64_t>(1, p.length * p.batch / 5)) {
      const int64_t c = f % p.d, e = f % p.v;
      probe(call.query_key + f * (p.d + call.kExtra) + c, call.dquery_key[f * p.d + c], "query_key");
      probe(call.gate + f * (p.v + call.kExtra) + e, call.dgate[f * p.v + e], "gate");
      probe(call.value + f * p.v + e, call.dvalue[f * p.v + e], "value");
    }
    for (int64_t j = 0; j < 2 * p.d; j += 3) {
      probe(call.weight + j, sum(j), "qk_weight");
      probe(call.bias + j, sum(2 * p.d + j), "qk_bias");
    }
    for (int64_t t = 1 - p.size; t < p.size; t += std::max<int64_t>(1, p.size / 4))
      probe(call.position + p.size + t, sum(4 * p.d + p.size - 1 + t), "position_bias");
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
  gradients();
  masked_keys_are_not_read();
}

}  // namespace fastasr::test
