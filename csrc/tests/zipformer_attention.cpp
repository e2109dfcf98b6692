// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/zipformer_attention.h"

#include "tests/attention_case.h"

namespace fastasr::test {
namespace {

using cpu::ValueShape;

template <typename T>
struct Weighted : AttentionCase<T> {
  using Base = AttentionCase<T>;
  using Base::a, Base::random;
  using typename Base::C;
  ValueShape v;
  Buffer<T> value{a.keys() * a.batch * v.heads * v.dim, 1, random},
      grad{a.frames * a.batch * v.heads * v.dim, 3, random};
  Buffer<T> y{grad.size(), 1}, dvalue{value.size(), 1};

  Weighted(const AttentionShape& shape, const ValueShape& v_, uint64_t seed, Rounding rounding)
      : Base(shape, seed, rounding), v(v_) {}
  void run() {
    const auto& kernel = cpu::kernels<cpu::ZipformerAttentionKernels<T>>();
    const int64_t valued = v.heads * a.batch, vs = attention_values_size(a, v),
                  vts = attention_values_transposed_size(a, v);
    const cpu::KeyRange* const ranges = this->ranges.data();
    Buffer<C> packed(valued * vs), transposed(valued * vts), dv(valued * this->parts * vs),
        forward_scratch(attention_values_scratch(a, v)), backward_scratch(attention_values_backward_scratch(a, v));
    for (int64_t pair = 0; pair < valued; pair++) {
      kernel.pack_values(a, v, value, pair, packed + pair * vs);
      kernel.transpose_values(a, v, value, pair, transposed + pair * vts);
      in_pieces(a.frames, cpu::kAttentionQueries, [&](int64_t begin, int64_t end) {
        kernel.forward(a, v, ranges, this->x, this->kt_of(pair), this->positions_of(pair), packed + pair * vs, pair,
                       begin, end, y, forward_scratch);
      });
      this->each_part([&](int64_t k, int64_t begin, int64_t end) {
        kernel.backward(a, v, ranges, grad, this->x, this->kt_of(pair), this->rows_of(pair), this->positions_of(pair),
                        transposed + pair * vts, pair, begin, end, this->dx, this->dk_of(pair, k),
                        this->drt_of(pair, k), dv + (pair * this->parts + k) * vs, backward_scratch);
      });
      this->store_keys(pair);
      kernel.store_values(a, v, dv + pair * this->parts * vs, this->parts, pair, dvalue);
    }
    this->store_positions(v.heads);
  }
  auto outputs() { return std::tie(y, dvalue, this->dx, this->dpos, this->dcached); }
};

template <typename T>
void values(const AttentionShape& shape, const ValueShape& v, uint64_t seed) {
  INFO(Type<T>::name, " T=", shape.frames, " left=", shape.left, " chunk=", shape.chunk);
  Weighted<T> c(shape, v, seed, rounded<T>);
  Weighted<double> exact(shape, v, seed, rounded<T>);
  c.run(), exact.run();
  expect_like<T>(c.outputs(), exact.outputs(), 20);
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
