// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/add_norm.h"

#include <algorithm>
#include <cmath>

#include "tests/rows_case.h"

namespace fastasr::test {
namespace {

struct AddNormForm {
  bool centred, has_bias, norms_update, has_grad_t;
  double update_limit, limit;
};

template <typename T>
struct AddNorm {
  using C = compute_t<T>;
  int64_t rows, channels, step, n = rows * channels;
  AddNormForm form;
  Random random;
  Buffer<T> x{n, channels % 4, random, 1, 0.4}, update{n, channels % 3, random}, grad_t{n, 1, random},
      grad_y{n, 2, random};
  Buffer<T> t{n, 3}, y{n, channels % 5}, dx{n, channels % 2}, dupdate{n, 1};
  Buffer<C> weight{channels, 0, random, 0.5, 1}, bias{channels, 0, random, 0.5},
      update_weight{channels, 0, random, 0.5, 1};
  Buffer<C> dweight{pieces_of(rows, step) * channels}, dbias{pieces_of(rows, step) * channels},
      dupdate_weight{pieces_of(rows, step) * channels};

  AddNorm(int64_t rows_, int64_t channels_, int64_t step_, AddNormForm form_)
      : rows(rows_),
        channels(channels_),
        step(step_),
        form(form_),
        random(static_cast<uint64_t>(rows * 131 + channels)) {}
  void run(int64_t begin, int64_t end) {
    const auto& kernel = cpu::kernels<cpu::AddNormKernels<T>>();
    Buffer<C> scratch(cpu::add_norm_scratch(channels));
    const cpu::AddNorm<T> p{x,
                            update,
                            form.norms_update ? update_weight.data() : nullptr,
                            weight,
                            form.has_bias ? bias.data() : nullptr,
                            1e-3,
                            C(0.5),
                            static_cast<C>(form.update_limit),
                            static_cast<C>(form.limit),
                            form.centred,
                            channels};
    const int64_t at = (step ? begin / step : 0) * channels;
    kernel.forward(p, begin, end, t, y, scratch);
    kernel.backward(p, form.has_grad_t ? grad_t.data() : nullptr, grad_y, begin, end, dx, dupdate, dweight + at,
                    dbias + at, dupdate_weight + at, scratch);
  }
  bool same_rows(AddNorm& o) { return t.equals(o.t) && y.equals(o.y) && dx.equals(o.dx) && dupdate.equals(o.dupdate); }
  bool same_sums(AddNorm& o) {
    return dweight.equals(o.dweight) && dbias.equals(o.dbias) && dupdate_weight.equals(o.dupdate_weight);
  }
};

// Every norm is that of the formula; t is compared as it is stored, since the norm reads it so.
template <typename T>
void add_norm_values(int64_t rows, int64_t channels, AddNormForm form) {
  INFO(Type<T>::name, " ", rows, "x", channels, form.centred ? "" : " rms", form.norms_update ? ", of both" : "");
  AddNorm<T> c(rows, channels, rows, form);
  c.run(0, rows);
  const auto limited = [](long double v, double limit) {
    return std::clamp<long double>(v, -static_cast<long double>(limit), static_cast<long double>(limit));
  };
  const long double units = 60;
  Reals m(static_cast<size_t>(channels)), n(m), dt(m);
  std::vector<Sum> dweight(static_cast<size_t>(channels)), dbias(dweight), dupdate_weight(dweight);
  for (int64_t first = 0; first < c.n; first += channels) {
    long double square = 0, mean = 0, var = 0, d_mean = 0, d_along = 0, e_along = 0;
    for (int64_t j = 0; j < channels; j++)
      square += limited(c.update(first + j), form.update_limit) * limited(c.update(first + j), form.update_limit);
    const long double inner = 1 / std::sqrt(square / channels + 1e-3L);
    for (int64_t j = 0; j < channels; j++) {
      m[j] = limited(c.update(first + j), form.update_limit) * inner;
      const long double u = form.norms_update ? m[j] * c.update_weight(j) : c.update(first + j);
      EXPECT(c.t, first + j, c.x(first + j) + 0.5L * u, units * (1 + std::fabs(u)));
      mean += form.centred ? limited(c.t(first + j), form.limit) / channels : 0;
    }
    for (int64_t j = 0; j < channels; j++) {
      n[j] = limited(c.t(first + j), form.limit) - mean;
      var += n[j] * n[j] / channels;
    }
    const long double scale = 1 / std::sqrt(var + 1e-3L);
    for (int64_t j = 0; j < channels; j++) {
      n[j] *= scale;
      const long double g = c.grad_y(first + j), d = g * c.weight(j);
      EXPECT(c.y, first + j, n[j] * c.weight(j) + (form.has_bias ? c.bias(j) : 0), units * (1 + scale));
      dweight[j].add(g * n[j], units * std::fabs(g) * (1 + scale) * (1 + std::fabs(n[j])));
      dbias[j].add(g, units * std::fabs(g));
      d_mean += form.centred ? d / channels : 0, d_along += d * n[j] / channels;
    }
    for (int64_t j = 0; j < channels; j++) {
      const long double d = c.grad_y(first + j) * c.weight(j);
      dt[j] = std::fabs(c.t(first + j)) > form.limit ? 0 : (d - d_mean - n[j] * d_along) * scale;
      dt[j] += form.has_grad_t ? c.grad_t(first + j) : 0;
      EXPECT(c.dx, first + j, dt[j], 10 * units * (1 + scale) * (1 + scale) * (1 + std::fabs(n[j])));
      e_along += 0.5L * dt[j] * c.update_weight(j) * m[j] / channels;
    }
    for (int64_t j = 0; j < channels; j++) {
      const long double du = 0.5L * dt[j], off = 20 * units * (1 + scale) * (1 + scale) * (1 + inner);
      const bool outside = std::fabs(c.update(first + j)) > form.update_limit;
      const long double df = outside ? 0 : (du * c.update_weight(j) - m[j] * e_along) * inner;
      EXPECT(c.dupdate, first + j, form.norms_update ? df : du, off * (1 + std::fabs(m[j])) * (1 + std::fabs(n[j])));
      dupdate_weight[j].add(form.norms_update ? du * m[j] : 0, off * (1 + std::fabs(m[j])) * (1 + std::fabs(n[j])));
    }
  }
  EXPECT_ALL(c.dweight, dweight, 1);
  EXPECT_ALL(c.dbias, dbias, 1);
  EXPECT_ALL(c.dupdate_weight, dupdate_weight, 1);
}

TEST_CASE("add_norm") {
  for_each_type([]<typename T>() {
    for (const int64_t rows : {0, 1, 3})
      for (const int64_t channels : kSizes)
        for (int form = 0; channels && form < 4; form++) {
          const double update_limit = form == 1 ? 0.75 : kInf, limit = form == 2 ? 1.25 : kInf;
          add_norm_values<T>(rows, channels,
                             {form % 2 == 0, form < 2, form > 0, channels % 2 == 0, update_limit, limit});
        }
    for (const bool rms : {false, true})
      rows_apart(61, 4, [&](int64_t step) {
        return AddNorm<T>(61, 67, step, {!rms, !rms, rms, true, rms ? 1 : kInf, rms ? 2 : kInf});
      });
  });
}

}  // namespace
}  // namespace fastasr::test
