// SPDX-License-Identifier: Apache-2.0
#include "cpu/skinny_gemm.h"

#include <algorithm>
#include <thread>

#include "tests/check.h"

namespace fastasr::test {
namespace {

using cpu::kPanelColumns;

struct Problem {
  int64_t rows, n, k, panels;
  Buffer<float> w, x, bias, packed;
  Problem(int64_t rows_, int64_t n_, int64_t k_)
      : rows(rows_),
        n(n_),
        k(k_),
        panels(cpu::panel_count(n)),
        w(n * (k + 3), 1),
        x(rows * (k + 5), 3),
        bias(panels * kPanelColumns),
        packed(cpu::packed_size(n, k)) {
    Random random(static_cast<uint64_t>(rows * 7919 + n * 131 + k));
    w.fill(random);
    x.fill(random);
    bias.fill(random);
    for (int64_t i = n; i < bias.size(); i++) bias[i] = 0;
    cpu::pack_panels(w.data(), n, k, k + 3, packed.data(), 0, panels);
  }
  int64_t stride() const { return panels * kPanelColumns + 7; }
  void run(Buffer<float>& y, int64_t from, int64_t to, int64_t begin, int64_t end) {
    cpu::skinny_gemm(x.data() + from * (k + 5), k + 5, to - from, k, packed.data(), bias.data(),
                     y.data() + from * stride(), stride(), begin, end);
  }
};

void values(int64_t rows, int64_t n, int64_t k) {
  Problem p(rows, n, k);
  Buffer<float> y(rows * p.stride(), 2);
  for (int64_t i = 0; i < y.size(); i++) y[i] = 1e30f;
  p.run(y, 0, rows, 0, p.panels);
  CHECK(y.intact() && p.packed.intact(), "wrote outside, %ldx%ldx%ld", long(rows), long(n), long(k));
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t j = 0; j < p.stride(); j++) {
      const float got = y[i * p.stride() + j];
      if (j >= p.panels * kPanelColumns) {
        CHECK(got == 1e30f, "wrote behind the panels");
      } else if (j >= n) {
        CHECK(got == 0.0f, "padding is not zero");
      } else {
        long double sum = p.bias[j], size = std::fabs(p.bias[j]);
        for (int64_t l = 0; l < k; l++) {
          const long double term = static_cast<long double>(p.x[i * (k + 5) + l]) * p.w[j * (k + 3) + l];
          sum += term, size += std::fabs(term);
        }
        // chains of at most 128 terms, then blocks: the error grows with the root of the number of terms
        CHECK(std::fabs(got - sum) <= size * 0x1p-24L *
                                          (4 + std::sqrt(static_cast<long double>(std::min<int64_t>(k, 128))) +
                                           static_cast<long double>(k) / 128),
              "%ldx%ldx%ld (%ld, %ld): expected %.9Lg, got %.9g", long(rows), long(n), long(k), long(i), long(j), sum,
              static_cast<double>(got));
      }
    }
  }
}

// Any split of rows and panels over calls and threads gives the same bits.
void splits() {
  constexpr int64_t kRows = 16;
  Problem p(kRows, 333, 391);
  Buffer<float> whole(kRows * p.stride());
  whole.fill(*std::make_unique<Random>(1));
  p.run(whole, 0, kRows, 0, p.panels);
  for (int64_t height = 1; height <= kRows; height++) {
    Buffer<float> y(kRows * p.stride());
    std::memcpy(y.data(), whole.data(), sizeof(float) * static_cast<size_t>(y.size()));
    for (int64_t i = 0; i < y.size(); i++)
      if (i % p.stride() < p.panels * kPanelColumns) y[i] = 7;
    for (int64_t from = 0; from < kRows; from += height)
      for (int64_t panel = 0; panel < p.panels; panel += 2)
        p.run(y, from, std::min(kRows, from + height), panel, std::min(p.panels, panel + 2));
    CHECK(y.equals(whole), "rows by %ld differ from all at once", long(height));
  }
  for (const int64_t count : {2, 3, 5}) {
    Buffer<float> y(kRows * p.stride());
    std::memcpy(y.data(), whole.data(), sizeof(float) * static_cast<size_t>(y.size()));
    std::vector<std::thread> threads;
    for (int64_t t = 0; t < count; t++)
      threads.emplace_back([&, t] { p.run(y, 0, kRows, p.panels * t / count, p.panels * (t + 1) / count); });
    for (std::thread& t : threads) t.join();
    CHECK(y.equals(whole), "%ld threads differ from one", long(count));
  }
}

void packing_in_parts() {
  Problem p(1, 200, 37);
  Buffer<float> packed(p.packed.size());
  for (const int64_t panel : {3, 1, 0, 2}) cpu::pack_panels(p.w.data(), 200, 37, 40, packed.data(), panel, panel + 1);
  CHECK(packed.equals(p.packed), "panels packed one by one differ");
  for (int64_t c = 0; c < 200; c++)
    for (int64_t k = 0; k < 37; k++)
      CHECK(packed[(c / kPanelColumns * 37 + k) * kPanelColumns + c % kPanelColumns] == p.w[c * 40 + k], "layout");
}

void without_bias() {
  Problem p(3, 70, 130);
  Buffer<float> y(3 * p.stride()), z(3 * p.stride());
  cpu::skinny_gemm(p.x.data(), 135, 3, 130, p.packed.data(), nullptr, y.data(), p.stride(), 0, p.panels);
  for (int64_t i = 0; i < p.bias.size(); i++) p.bias[i] = 0;
  p.run(z, 0, 3, 0, p.panels);
  for (int64_t i = 0; i < 3; i++)
    for (int64_t j = 0; j < 70; j++) CHECK(y[i * p.stride() + j] == z[i * p.stride() + j], "no bias is a bias of zero");
}

void pages() {
  std::vector<char> memory(5 << 20, 3);
  for (const int64_t bytes : {0, 100, 2 << 20, 5 << 20}) cpu::advise_huge_pages(memory.data(), bytes);
  CHECK(std::count(memory.begin(), memory.end(), 3) == 5 << 20, "the advice changed memory");
}

}  // namespace

void skinny_gemm() {
  for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 16})
    for (const int64_t n : {1, 63, 64, 65, 130})
      for (const int64_t k : {1, 2, 16, 127, 128, 129, 300}) values(rows, n, k);
  values(1, 512, 1024);
  values(0, 64, 16);
  values(2, 64, 0);
  splits();
  packing_in_parts();
  without_bias();
  pages();
}

}  // namespace fastasr::test
