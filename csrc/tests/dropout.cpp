// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/dropout.h"

#include <random>

#include "tests/check.h"

namespace fastasr::test {
namespace {

// Draws the same numbers as word by word, from any place within a block.
void draws(int64_t skipped, int64_t n, double p) {
  const auto& kernel = cpu::kernels<cpu::DropoutKernels>();
  std::mt19937 words(4321);
  cpu::Twister generator{};
  generator.state[0] = 4321;
  for (uint32_t i = 1; i < cpu::kTwisterWords; i++) {
    const uint32_t before = generator.state[i - 1];
    generator.state[i] = 1812433253u * (before ^ (before >> 30)) + i;
  }
  generator.given = cpu::kTwisterWords;
  const auto next = [&] {
    const uint64_t first = words(), second = words();
    return static_cast<double>((first << 32 | second) & ((uint64_t{1} << 53) - 1)) * 0x1p-53;
  };
  for (int64_t part : {skipped, n}) {
    Buffer<uint8_t> keep(part, 3);
    kernel.draw(generator, p, part, keep.data());
    for (int64_t i = 0; i < part; i++) CHECK(keep[i] == (next() < p), "draw %ld of %ld", long(i), long(part));
    CHECK(keep.intact(), "wrote outside");
  }
  std::vector<uint8_t> want(20), row(20);
  for (auto& k : want) k = next() < p;
  const int64_t places[4] = {19, 0, 7, 7};
  Buffer<float> picked(4, 1);
  kernel.picked(generator, p, 20, places, 4, 1.5f, row.data(), picked.data());
  for (int64_t i = 0; i < 4; i++)
    CHECK(picked[i] == (want[static_cast<size_t>(places[i])] ? 1.5f : 0.0f), "picked %ld", long(i));
  CHECK(picked.intact(), "wrote outside");
}

void applied(int64_t n) {
  const auto& kernel = cpu::kernels<cpu::DropoutKernels>();
  Buffer<float> x(n, 1), residual(n, 2), y(n, 3);
  Buffer<uint8_t> keep(n, 1);
  Random random(static_cast<uint64_t>(n));
  x.fill(random), residual.fill(random);
  for (int64_t i = 0; i < n; i++) keep[i] = random.uniform() < 0.7;
  for (const bool add : {false, true}) {
    kernel.apply(x.data(), keep.data(), 1.25f, add ? residual.data() : nullptr, y.data(), n);
    for (int64_t i = 0; i < n; i++) {
      const double want = (keep[i] ? 1.25 * value(x[i]) : 0.0) + (add ? value(residual[i]) : 0.0);
      CHECK(close(y[i], want, 2 * (1 + std::fabs(value(x[i])))), "element %ld of %ld", long(i), long(n));
    }
    CHECK(y.intact(), "wrote outside");
  }
}

}  // namespace

TEST_CASE("dropout") {
  for (const int64_t skipped : {0, 1, 311, 312, 313}) draws(skipped, 1300, 0.9);
  draws(5, 700, 0.25);
  for (const int64_t n : kSizes) applied(n);
}

}  // namespace fastasr::test
