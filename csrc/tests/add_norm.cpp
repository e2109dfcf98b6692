// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/add_norm.h"

#include "tests/rows_case.h"

namespace fastasr::test {
namespace {

struct AddNormForm {
  bool centred, has_bias, norms_update, has_grad_t;
  double update_limit = kInf, limit = kInf;
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

  AddNorm(int64_t rows_, int64_t channels_, int64_t step_, AddNormForm form_, Rounding rounding = nullptr)
      : rows(rows_), channels(channels_), step(step_), form(form_), random(seed_of(rows, channels), rounding) {}
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
  auto by_row() { return std::tie(t, y, dx, dupdate); }
  auto sums() { return std::tie(dweight, dbias, dupdate_weight); }
};

TEST_CASE("add_norm") {
  for_each_type([]<typename T>() {
    // t is stored in T, and the norm reads it so: its rounding shows in y, and decides which elements are in a limit
    const bool wide = sizeof(T) > 2;
    for (const int64_t rows : {0, 1, 3})
      for (const int64_t channels : kSizes)
        for (int form = 0; channels && form < 4; form++)
          values_like_double<AddNorm, T>(rows, channels, 600 + 20 * kStored<T>,
                                         AddNormForm{form % 2 == 0, form < 2, form > 0, channels % 2 == 0,
                                                     form == 1 ? 0.75 : kInf, form == 2 && wide ? 1.25 : kInf});
    for (const bool rms : {false, true})
      rows_apart(61, 4, [&](int64_t step) {
        return AddNorm<T>(61, 67, step, {!rms, !rms, rms, true, rms ? 1 : kInf, rms ? 2 : kInf});
      });
  });
}

}  // namespace
}  // namespace fastasr::test
