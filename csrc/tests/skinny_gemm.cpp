// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/skinny_gemm.h"

#include "tests/check.h"

namespace fastasr::test {
namespace {

using cpu::kPanelColumns;
using cpu::WeightFormat;

constexpr const char* kNames[] = {"fp32", "bf16", "int8", "fp16"};  // by WeightFormat
const char* name_of(WeightFormat format) { return kNames[static_cast<int64_t>(format)]; }

struct Problem {
  int64_t rows, n, k;
  WeightFormat format = WeightFormat::fp32;
  int64_t panels = cpu::panel_count(n);
  Random random{static_cast<uint64_t>(rows * 7919 + n * 131 + k)};
  Buffer<float> w{n * (k + 3), 1, random}, x{rows * (k + 5), 3, random}, bias{panels * kPanelColumns, 0, random},
      scale{panels * kPanelColumns}, packed{cpu::packed_size(n, k) * cpu::weight_bytes(format) / 4};
  Problem(int64_t rows_, int64_t n_, int64_t k_, WeightFormat format_ = WeightFormat::fp32)
      : rows(rows_), n(n_), k(k_), format(format_) {
    for (int64_t i = n; i < bias.size(); i++) bias[i] = 0;
    pack();
  }
  void pack() { cpu::pack_panels(w, n, k, k + 3, format, packed, scale, 0, panels); }
  cpu::Panels weights() { return {packed, format, scale}; }
  // Returns what is kept of the weight from input l to output j.
  double kept(int64_t j, int64_t l) {
    const float v = w[j * (k + 3) + l];
    if (format == WeightFormat::bf16) return value(make<bfloat16>(v));
    if (format == WeightFormat::fp16) return value(make<float16>(v));
    if (format == WeightFormat::fp32) return v;
    float most = 1e-30f;
    for (int64_t i = 0; i < k; i++) most = std::max(most, std::fabs(w[j * (k + 3) + i]));
    return std::nearbyint(v / (most / 127)) * static_cast<double>(most / 127);
  }
  int64_t stride() const { return panels * kPanelColumns + 7; }
  void run(Buffer<float>& y, int64_t from, int64_t to, int64_t begin, int64_t end) {
    cpu::skinny_gemm(x + from * (k + 5), k + 5, to - from, k, weights(), bias, y + from * stride(), stride(), begin,
                     end);
  }
};

void values(int64_t rows, int64_t n, int64_t k, WeightFormat format) {
  INFO(name_of(format), " ", rows, "x", n, "x", k);
  Problem p(rows, n, k, format);
  Buffer<float> y(rows * p.stride(), 2);
  p.run(y, 0, rows, 0, p.panels);
  std::vector<double> kept(static_cast<size_t>(n * k));
  for (int64_t j = 0; j < n; j++)
    for (int64_t l = 0; l < k; l++) {
      const double v = kept[j * k + l] = p.kept(j, l), exact = p.w[j * (k + 3) + l];
      const double most = format == WeightFormat::int8   ? p.scale[j] * 0.5001
                          : format == WeightFormat::fp16 ? std::fabs(exact) * 0x1p-11 + 0x1p-25
                                                         : std::fabs(exact) * 0x1p-8;
      CHECK(std::fabs(v - exact) <= most, "%g kept as %g", exact, v);
    }
  for (int64_t at = 0; at < y.size(); at++) {
    const int64_t i = at / p.stride(), j = at % p.stride();
    if (j >= p.panels * kPanelColumns) {
      CHECK(y.unset(at), "wrote behind the panels");
    } else if (j >= n) {
      CHECK(y[at] == 0.0f, "padding is not zero");
    } else {
      Sum sum;
      sum.add(p.bias(j));
      for (int64_t l = 0; l < k; l++) sum.add(p.x(i * (k + 5) + l) * kept[j * k + l]);
      // sums are chains of at most 128 terms, then blocks: the error grows with the root of the number of terms
      const long double chain = 6 + std::sqrt(static_cast<long double>(std::min<int64_t>(k, 128)));
      EXPECT_WITHIN(y, at, sum.value, sum.size * 0x1p-24L * (chain + static_cast<long double>(k) / 128));
    }
  }
}

// Any split of rows and panels over calls and threads gives the same bits.
void splits(WeightFormat format) {
  constexpr int64_t kRows = 16;
  Problem p(kRows, 333, 391, format);
  Buffer<float> whole(kRows * p.stride());
  p.run(whole, 0, kRows, 0, p.panels);
  for (int64_t height = 1; height <= kRows; height++) {
    Buffer<float> y(whole.size());
    in_pieces(kRows, height, [&](int64_t from, int64_t to) {
      in_pieces(p.panels, 2, [&](int64_t begin, int64_t end) { p.run(y, from, to, begin, end); });
    });
    CHECK(y.equals(whole), "rows by %ld differ from all at once", long(height));
  }
  for (const int64_t count : {2, 3, 5}) {
    Buffer<float> y(whole.size());
    on_threads(count, [&](int64_t t) { p.run(y, 0, kRows, p.panels * t / count, p.panels * (t + 1) / count); });
    CHECK(y.equals(whole), "%ld threads differ from one", long(count));
  }
}

void packing_in_parts(WeightFormat format) {
  Problem p(1, 200, 37, format);
  Buffer<float> packed(p.packed.size()), scale(p.scale.size());
  for (const int64_t panel : {3, 1, 0, 2}) cpu::pack_panels(p.w, 200, 37, 40, format, packed, scale, panel, panel + 1);
  CHECK(packed.equals(p.packed) && scale.equals(p.scale), "panels packed one by one differ");
  if (format != WeightFormat::fp32) return;
  for (int64_t c = 0; c < 200; c++)
    for (int64_t k = 0; k < 37; k++)
      CHECK(packed[(c / kPanelColumns * 37 + k) * kPanelColumns + c % kPanelColumns] == p.w[c * 40 + k], "layout");
}

void without_bias() {
  Problem p(3, 70, 130);
  Buffer<float> y(3 * p.stride()), z(3 * p.stride());
  cpu::skinny_gemm(p.x, 135, 3, 130, p.weights(), nullptr, y, p.stride(), 0, p.panels);
  p.bias.set(0);
  p.run(z, 0, 3, 0, p.panels);
  for (int64_t i = 0; i < 3; i++)
    for (int64_t j = 0; j < 70; j++) CHECK(y[i * p.stride() + j] == z[i * p.stride() + j], "no bias is a bias of zero");
}

// Panels of 16 bits give the bits of fp32 panels with the same values, however small.
template <typename T>
void as_fp32_of_rounded_weights(WeightFormat format) {
  Problem rounded(5, 100, 300, format), exact(5, 100, 300);
  for (int64_t i = 0; i < exact.w.size(); i++) {
    rounded.w[i] *= std::ldexp(1.0f, static_cast<int>(-(i % 30)));
    exact.w[i] = static_cast<float>(value(make<T>(rounded.w[i])));
  }
  rounded.pack(), exact.pack();
  Buffer<float> y(5 * exact.stride()), z(5 * exact.stride());
  rounded.run(y, 0, 5, 0, 2);
  exact.run(z, 0, 5, 0, 2);
  CHECK(y.equals(z), "%s panels differ from fp32 panels of the same values", name_of(format));
}

// Columns of zeros, of tiny and huge numbers, and with numbers that are not finite: the latter stay in their column.
void unusual_weights(WeightFormat format) {
  constexpr int64_t kInputs = 40, kNan = 0, kInfinite = 3;
  Problem p(2, 8, kInputs, format);
  const auto column = [&](int64_t c, float v) {
    for (int64_t j = 0; j < kInputs; j++) p.w[c * (kInputs + 3) + j] = v;
  };
  p.w[kNan * (kInputs + 3) + 7] = std::numeric_limits<float>::quiet_NaN();
  p.w[kInfinite * (kInputs + 3) + 9] = std::numeric_limits<float>::infinity();
  const float huge = format == WeightFormat::fp16 ? 65504 : 1e36f;
  column(1, 0), column(2, 1e-40f), column(4, huge), column(5, -0.0f);
  for (int64_t j = 0; j < kInputs; j++) p.x[j] = 1;
  p.pack();
  Buffer<float> y(2 * p.stride());
  p.run(y, 0, 2, 0, 1);
  for (int64_t c = 0; c < kPanelColumns; c++)
    CHECK(std::isfinite(y[c]) == (c != kNan && c != kInfinite), "%s, column %ld: %g", name_of(format), long(c),
          static_cast<double>(y[c]));
  CHECK(y[1] == p.bias[1] && y[5] == p.bias[5], "columns of zeros");
  CHECK(std::fabs(y[4] / (kInputs * static_cast<double>(huge)) - 1) < 0.01, "huge weights: %g",
        static_cast<double>(y[4]));
}

void pages() {
  std::vector<char> memory(5 << 20, 3);
  for (const int64_t bytes : {0, 100, 2 << 20, 5 << 20}) cpu::advise_huge_pages(memory.data(), bytes);
  CHECK(std::count(memory.begin(), memory.end(), 3) == 5 << 20, "the advice changed memory");
}

}  // namespace

TEST_CASE("skinny_gemm") {
  for (const WeightFormat format : {WeightFormat::fp32, WeightFormat::bf16, WeightFormat::int8, WeightFormat::fp16}) {
    for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 16})
      for (const int64_t n : {1, 63, 64, 65, 130})
        for (const int64_t k : {1, 2, 16, 127, 128, 129, 300}) values(rows, n, k, format);
    values(1, 512, 1024, format);
    values(0, 64, 16, format);
    values(2, 64, 0, format);
    splits(format);
    packing_in_parts(format);
    unusual_weights(format);
  }
  as_fp32_of_rounded_weights<bfloat16>(WeightFormat::bf16);
  as_fp32_of_rounded_weights<float16>(WeightFormat::fp16);
  without_bias();
  pages();
}

}  // namespace fastasr::test
