// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/zipformer_attention.h"

#include <algorithm>
#include <numeric>

#include "tests/attention_case.h"

namespace fastasr::test {
namespace {

using cpu::AttentionProblem;
using cpu::ValueShape;

// Holds values, y and the gradients of a case whose W is given to values.
template <typename T>
struct Weighted {
  AttentionCase<T> c;
  ValueShape v;
  Random random;
  Buffer<T> value{c.a.keys() * c.a.batch * v.heads * v.dim, 1, random},
      grad{c.a.frames * c.a.batch * v.heads * v.dim, 3, random};
  Reals y, dvalue;

  Weighted(const AttentionShape& shape, const ValueShape& v_, uint64_t seed)
      : c(shape, seed), v(v_), random(seed + 100) {
    const AttentionProblem& a = c.a;
    y.assign(size_t(grad.size()), 0), dvalue.assign(size_t(value.size()), 0);
    std::fill(c.dw.begin(), c.dw.end(), 0);  // heads without values have no gradient
    if (v.equal) equalise();
    for (int64_t h = 0; h < v.heads; h++)
      for (int64_t b = 0; b < a.batch; b++)
        for (int64_t i = 0; i < a.frames; i++)
          for (int64_t j = 0; j < a.keys(); j++) {
            const int64_t at = ((h * a.batch + b) * a.frames + i) * a.keys() + j;
            for (int64_t d = 0; d < v.dim; d++) {
              const int64_t in = ((j * a.batch + b) * v.heads + h) * v.dim + d;
              const int64_t out = ((i * a.batch + b) * v.heads + h) * v.dim + d;
              y[out] += c.w[at] * value(in);
              dvalue[in] += c.w[at] * grad(out);
              if (!v.equal) c.dw[at] += grad(out) * value(in);
            }
          }
    c.reference();
  }

  // Sets the weights of each row to 1 / n on the n keys whose weight, rounded to T, is not 0.
  void equalise() {
    for (auto row = c.w.begin(); row != c.w.end(); row += c.a.keys()) {
      const auto end = row + c.a.keys();
      std::for_each(row, end, [](long double& w) {
        T rounded;
        cpu::store(&rounded, static_cast<compute_t<T>>(w));
        w = cpu::load(rounded) > 0;
      });
      const long double number = std::max<long double>(1, std::accumulate(row, end, 0.0L));
      std::for_each(row, end, [&](long double& w) { w /= number; });
    }
  }
};

template <typename T>
void values(const AttentionShape& shape, const ValueShape& v, uint64_t seed) {
  INFO(Type<T>::name, " T=", shape.frames, " left=", shape.left, " chunk=", shape.chunk);
  using C = compute_t<T>;
  const auto& kernel = cpu::kernels<cpu::ZipformerAttentionKernels<T>>();
  Weighted<T> w(shape, v, seed);
  Workspace<T> p(w.c);
  AttentionCase<T>& c = w.c;
  const AttentionProblem& a = c.a;
  const int64_t valued = v.heads * a.batch, vs = attention_values_size(a, v),
                vts = attention_values_transposed_size(a, v);
  Buffer<C> packed(valued * vs), transposed(valued * vts), dv(valued * p.parts * vs),
      forward_scratch(attention_values_scratch(a, v)), backward_scratch(attention_values_backward_scratch(a, v));
  Buffer<T> y(w.grad.size(), 1), dvalue(w.value.size(), 1);
  p.dx.set(0), p.dpos.set(0), p.dcached.set(0);
  for (int64_t pair = 0; pair < valued; pair++) {
    kernel.pack_values(a, v, w.value, pair, packed + pair * vs);
    kernel.transpose_values(a, v, w.value, pair, transposed + pair * vts);
    in_pieces(a.frames, cpu::kAttentionQueries, [&](int64_t begin, int64_t end) {
      kernel.forward(a, v, p.ranges.data(), c.x, p.kt_of(pair), p.positions_of(pair), packed + pair * vs, pair, begin,
                     end, y, forward_scratch);
    });
    for (int64_t k = 0; k < p.parts; k++)
      kernel.backward(a, v, p.ranges.data(), w.grad, c.x, p.kt_of(pair), p.rows_of(pair), p.positions_of(pair),
                      transposed + pair * vts, pair, k * p.part, std::min(a.frames, (k + 1) * p.part), p.dx,
                      p.dk_of(pair, k), p.drt_of(pair, k), dv + (pair * p.parts + k) * vs, backward_scratch);
    p.store_keys(pair);
    kernel.store_values(a, v, dv + pair * p.parts * vs, p.parts, pair, dvalue);
  }
  p.store_positions(v.heads);
  const double unit = 256 * Type<C>::half_ulp;
  expect_near("y", y, w.y, unit);
  expect_near("dvalue", dvalue, w.dvalue, unit);
  p.compare(unit);
}

}  // namespace

TEST_CASE("zipformer_attention") {
  const struct {
    AttentionShape shape;
    ValueShape values;
  } cases[] = {
      {{1, 1, 1, 1, 1, 0, 1, 0, -1, 0, 0}, {1, 1}},
      {{7, 2, 2, 8, 4, 0, 1, 0, -1, 1, 0}, {2, 12}},
      {{33, 3, 1, 32, 4, 0, 3, 0, -1, 3, 0}, {1, 48}},
      {{40, 2, 3, 5, 3, 0, 1, 8, 1, 0, 0}, {1, 64}},
      {{21, 2, 2, 33, 5, 13, 2, 5, 2, 1, 0}, {1, 17}},
      {{19, 1, 1, 4, 2, 70, 1, 4, 0, 4, 0}, {1, 12}},
      {{50, 2, 1, 16, 0, 0, 0, 16, -1, 5, 0}, {1, 3}},
      {{300, 1, 1, 4, 4, 5, 1, 7, 1, 1, 0}, {1, 12}},
      {{21, 2, 2, 8, 4, 0, 2, 0, -1, 0, 0, 9, 9}, {2, 12}},
      {{140, 1, 1, 4, 3, 0, 1, 5, 1, 3, 0, 67, 67}, {1, 12}},
      {{50, 1, 1, 4, 3, 0, 1, 0, -1, 1, 0, 40, 6}, {1, 5}},
      {{40, 2, 2, 8, 4, 5, 1, 8, 1, 1, 0.5}, {2, 12}},
      {{40, 2, 2, 8, 4, 0, 1, 8, 1, 3, 0}, {1, 12, true}},
      {{70, 1, 2, 4, 3, 0, 1, 5, 0, 1, 0.5, 31, 24}, {2, 40, true}},
  };
  uint64_t seed = 1;
  for (const auto& c : cases) {
    for_each_type([&]<typename T>() { values<T>(c.shape, c.values, seed); });
    seed++;
  }
}

}  // namespace fastasr::test
