// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <random>
#include <vector>

#include "cpu/rows/dropout.h"
#include "tests/rows_case.h"

namespace fastasr::test {
namespace {

// Draws the same numbers as word by word, from any place within a block.
void draws(int64_t skipped, int64_t n, double p) {
  INFO(n, " draws after ", skipped);
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
    kernel.draw(generator, p, part, keep);
    for (int64_t i = 0; i < part; i++) CHECK(keep[i] == (next() < p), "draw %ld", long(i));
  }
  std::vector<uint8_t> want(20), row(20);
  for (auto& k : want) k = next() < p;
  const int64_t places[4] = {19, 0, 7, 7};
  Buffer<float> picked(4, 1);
  kernel.picked(generator, p, 20, places, 4, 1.5f, row.data(), picked);
  for (int64_t i = 0; i < 4; i++) CHECK(picked[i] == (want[places[i]] ? 1.5f : 0.0f), "picked %ld", long(i));
}

void applied(int64_t n) {
  Random random(static_cast<uint64_t>(n));
  Buffer<float> x(n, 1, random), residual(n, 2, random), y(n, 3);
  Buffer<uint8_t> keep(n, 1);
  for (int64_t i = 0; i < n; i++) keep[i] = random.uniform() < 0.7;
  for (const bool add : {false, true}) {
    cpu::kernels<cpu::DropoutKernels>().apply(x, keep, 1.25f, add ? residual.data() : nullptr, y, n);
    for (int64_t i = 0; i < n; i++)
      EXPECT(y, i, (keep[i] ? 1.25 * x(i) : 0) + (add ? residual(i) : 0), 2 * (1 + std::fabs(x(i))));
  }
}

TEST_CASE("dropout") {
  for (const int64_t skipped : {0, 1, 311, 312, 313}) draws(skipped, 1300, 0.9);
  draws(5, 700, 0.25);
  for (const int64_t n : kSizes) applied(n);
}

}  // namespace
}  // namespace fastasr::test
