// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/zipformer_attention.h"

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
  Buffer<T> value, grad;
  std::vector<long double> y, dvalue;

  Weighted(const AttentionShape& shape, const ValueShape& v_, uint64_t seed)
      : c(shape, seed),
        v(v_),
        value(c.a.keys() * c.a.batch * v.heads * v.dim, 1),
        grad(c.a.frames * c.a.batch * v.heads * v.dim, 3) {
    const AttentionProblem& a = c.a;
    Random random(seed + 100);
    value.fill(random), grad.fill(random);
    y.assign(static_cast<size_t>(grad.size()), 0), dvalue.assign(static_cast<size_t>(value.size()), 0);
    std::fill(c.dw.begin(), c.dw.end(), 0);  // heads without values have no gradient
    for (int64_t h = 0; h < v.heads; h++)
      for (int64_t b = 0; b < a.batch; b++)
        for (int64_t i = 0; i < a.frames; i++)
          for (int64_t j = 0; j < a.keys(); j++) {
            const size_t at = static_cast<size_t>(((h * a.batch + b) * a.frames + i) * a.keys() + j);
            for (int64_t d = 0; d < v.dim; d++) {
              const int64_t in = ((j * a.batch + b) * v.heads + h) * v.dim + d;
              const int64_t out = ((i * a.batch + b) * v.heads + h) * v.dim + d;
              const long double g = test::value(grad[out]), x = test::value(value[in]);
              y[static_cast<size_t>(out)] += c.w[at] * x;
              dvalue[static_cast<size_t>(in)] += c.w[at] * g;
              c.dw[at] += g * x;
            }
          }
    c.reference();
  }
};

template <typename T>
void values(const AttentionShape& shape, const ValueShape& v, uint64_t seed) {
  using C = compute_t<T>;
  const auto& kernel = cpu::kernels<cpu::ZipformerAttentionKernels<T>>();
  const auto& shared = cpu::kernels<cpu::AttentionWeightsKernels<T>>();
  Weighted<T> w(shape, v, seed);
  AttentionCase<T>& c = w.c;
  const AttentionProblem& a = c.a;
  const int64_t pairs = a.heads * a.batch, valued = v.heads * a.batch;
  const int64_t vs = attention_values_size(a, v), vts = attention_values_transposed_size(a, v);
  std::vector<cpu::KeyRange> ranges(static_cast<size_t>(a.batch));
  attention_key_ranges(a, ranges.data());
  Buffer<C> kt(pairs * a.keys_transposed_size()), rows(pairs * a.key_rows_size()),
      rt(a.heads * a.pos_batch * a.positions_size()), packed(valued * vs), transposed(valued * vts),
      forward_scratch(attention_values_scratch(a, v)), backward_scratch(attention_values_backward_scratch(a, v));
  const int64_t part = cpu::kAttentionStep * 2, parts = (a.frames + part - 1) / part;
  Buffer<C> dk(pairs * parts * a.key_rows_size()), drt(pairs * parts * a.positions_size()), dv(valued * parts * vs);
  Buffer<T> y(w.grad.size(), 1), dx(c.x.size(), 1), dpos(c.pos.size(), 1), dcached(c.cached.size(), 1),
      dvalue(w.value.size(), 1);
  for (int64_t i = 0; i < dx.size(); i++) dx[i] = make<T>(0);
  for (int64_t i = 0; i < dpos.size(); i++) dpos[i] = make<T>(0);
  for (int64_t i = 0; i < dcached.size(); i++) dcached[i] = make<T>(0);
  for (int64_t hb = 0; hb < pairs; hb++)
    shared.pack_keys(a, c.x.data(), c.cached.data(), hb, kt.data() + hb * a.keys_transposed_size(),
                     rows.data() + hb * a.key_rows_size());
  for (int64_t k = 0; k < a.heads * a.pos_batch; k++)
    shared.pack_positions(a, c.pos.data(), k / a.pos_batch, k % a.pos_batch, rt.data() + k * a.positions_size());
  for (int64_t hb = 0; hb < valued; hb++) {
    const C* positions =
        a.pos_batch
            ? rt.data() + (hb / a.batch * a.pos_batch + (a.pos_batch == 1 ? 0 : hb % a.batch)) * a.positions_size()
            : nullptr;
    kernel.pack_values(a, v, w.value.data(), hb, packed.data() + hb * vs);
    kernel.transpose_values(a, v, w.value.data(), hb, transposed.data() + hb * vts);
    for (int64_t i = 0; i < a.frames; i += cpu::kAttentionQueries)
      kernel.forward(a, v, ranges.data(), c.x.data(), kt.data() + hb * a.keys_transposed_size(), positions,
                     packed.data() + hb * vs, hb, i, std::min(i + cpu::kAttentionQueries, a.frames), y.data(),
                     forward_scratch.data());
    for (int64_t k = 0; k < parts; k++)
      kernel.backward(a, v, ranges.data(), w.grad.data(), c.x.data(), kt.data() + hb * a.keys_transposed_size(),
                      rows.data() + hb * a.key_rows_size(), positions, transposed.data() + hb * vts, hb, k * part,
                      std::min(a.frames, (k + 1) * part), dx.data(), dk.data() + (hb * parts + k) * a.key_rows_size(),
                      drt.data() + (hb * parts + k) * a.positions_size(), dv.data() + (hb * parts + k) * vs,
                      backward_scratch.data());
    shared.store_keys(a, dk.data() + hb * parts * a.key_rows_size(), parts, hb, dx.data(), dcached.data());
    kernel.store_values(a, v, dv.data() + hb * parts * vs, parts, hb, dvalue.data());
  }
  for (int64_t k = 0; k < v.heads * a.pos_batch; k++)
    shared.store_positions(a, drt.data(), parts, k / a.pos_batch, k % a.pos_batch, dpos.data());
  CHECK(kt.intact() && rows.intact() && rt.intact() && packed.intact() && transposed.intact() &&
            forward_scratch.intact() && backward_scratch.intact() && dk.intact() && drt.intact() && dv.intact() &&
            y.intact() && dx.intact() && dpos.intact() && dcached.intact() && dvalue.intact(),
        "%s wrote outside, T=%ld left=%ld", Type<T>::name, long(a.frames), long(a.left));
  const double unit = 256 * Type<C>::half_ulp;
  const auto same = [&](Buffer<T>& got, const std::vector<long double>& expected, const char* name) {
    for (int64_t i = 0; i < got.size(); i++)
      CHECK(near(got[i], expected[static_cast<size_t>(i)], unit),
            "%s %s, T=%ld left=%ld chunk=%ld, %ld: %g, expected %Lg", Type<T>::name, name, long(a.frames), long(a.left),
            long(a.chunk), long(i), value(got[i]), expected[static_cast<size_t>(i)]);
  };
  same(y, w.y, "y");
  same(dvalue, w.dvalue, "dvalue");
  same(dx, c.dx, "dx");
  same(dcached, c.dcached, "dcached_key");
  if (a.pos_batch) same(dpos, c.dpos, "dpos");
}

}  // namespace

TEST_CASE("zipformer_attention") {
  const struct {
    AttentionShape shape;
    ValueShape values;
  } cases[] = {
      {{1, 1, 1, 1, 1, 0, 1, 0, -1, 0, 0}, {1, 1}},    {{7, 2, 2, 8, 4, 0, 1, 0, -1, 1, 0}, {2, 12}},
      {{33, 3, 1, 32, 4, 0, 3, 0, -1, 3, 0}, {1, 48}}, {{40, 2, 3, 5, 3, 0, 1, 8, 1, 0, 0}, {1, 64}},
      {{21, 2, 2, 33, 5, 13, 2, 5, 2, 1, 0}, {1, 17}}, {{19, 1, 1, 4, 2, 70, 1, 4, 0, 4, 0}, {1, 12}},
      {{50, 2, 1, 16, 0, 0, 0, 16, -1, 5, 0}, {1, 3}}, {{300, 1, 1, 4, 4, 5, 1, 7, 1, 1, 0}, {1, 12}},
  };
  uint64_t seed = 1;
  for (const auto& c : cases) {
    for_each_type([&]<typename T>() { values<T>(c.shape, c.values, seed); });
    seed++;
  }
}

}  // namespace fastasr::test
