// SPDX-License-Identifier: Apache-2.0
// Several threads on disjoint blocks of rows give the same bits as one thread, without a race.
#include <thread>

#include "cpu/rows/bias_norm.h"
#include "cpu/rows/bypass.h"
#include "cpu/rows/swoosh.h"
#include "tests/check.h"

namespace fastasr::test {
namespace {

constexpr int64_t kRows = 61, kChannels = 67, kBlock = 4, kBlocks = (kRows + kBlock - 1) / kBlock;

template <typename T>
struct Data {
  using C = compute_t<T>;
  Buffer<T> x, other, grad, mask, channel, swoosh, swoosh_dx, norm, norm_dx, bypass, bypass_dx, bypass_dx_orig;
  Buffer<C> dbias, dscale;
  std::vector<double> dlog_scale;

  Data()
      : x(kRows * kChannels),
        other(kRows * kChannels),
        grad(kRows * kChannels),
        mask(kRows * kChannels),
        channel(kChannels),
        swoosh(kRows * kChannels),
        swoosh_dx(kRows * kChannels),
        norm(kRows * kChannels),
        norm_dx(kRows * kChannels),
        bypass(kRows * kChannels),
        bypass_dx(kRows * kChannels),
        bypass_dx_orig(kRows * kChannels),
        dbias(kBlocks * kChannels),
        dscale(kBlocks * kChannels),
        dlog_scale(kBlocks) {
    Random random(1);
    for (Buffer<T>* b : {&x, &other, &grad, &mask, &channel}) b->fill(random);
  }

  void block(int64_t k) {
    const int64_t begin = k * kBlock, rows = kBlock < kRows - begin ? kBlock : kRows - begin;
    const int64_t at = begin * kChannels, n = rows * kChannels;
    const auto scale = static_cast<C>(0.9);
    using cpu::Mask;
    using cpu::Swoosh;
    const auto& swooshes = cpu::kernels<cpu::SwooshKernels<T>>();
    const auto& norms = cpu::kernels<cpu::BiasNormKernels<T>>();
    const auto& bypasses = cpu::kernels<cpu::BypassKernels<T>>();
    swooshes.forward(x.data() + at, mask.data() + at, Mask::elementwise, swoosh.data() + at, n, Swoosh::L);
    swooshes.backward(grad.data() + at, x.data() + at, mask.data() + at, Mask::elementwise, swoosh_dx.data() + at,
                      swoosh.data() + at, n, Swoosh::R);
    norms.forward(x.data() + at, channel.data(), scale, norm.data() + at, rows, kChannels);
    norms.backward(grad.data() + at, x.data() + at, channel.data(), scale, norm_dx.data() + at,
                   dbias.data() + k * kChannels, &dlog_scale[static_cast<size_t>(k)], rows, kChannels);
    bypasses.forward(other.data() + at, x.data() + at, channel.data(), bypass.data() + at, rows, kChannels);
    bypasses.backward(grad.data() + at, other.data() + at, x.data() + at, channel.data(), bypass_dx_orig.data() + at,
                      bypass_dx.data() + at, dscale.data() + k * kChannels, rows, kChannels);
  }

  bool equals(Data& o) {
    return swoosh.equals(o.swoosh) && swoosh_dx.equals(o.swoosh_dx) && norm.equals(o.norm) &&
           norm_dx.equals(o.norm_dx) && bypass.equals(o.bypass) && bypass_dx.equals(o.bypass_dx) &&
           bypass_dx_orig.equals(o.bypass_dx_orig) && dbias.equals(o.dbias) && dscale.equals(o.dscale) &&
           dlog_scale == o.dlog_scale;
  }
};

template <typename T>
void compare() {
  Data<T> serial;
  for (int64_t k = 0; k < kBlocks; k++) serial.block(k);
  for (const int64_t count : {2, 3, 8}) {
    Data<T> parallel;
    std::vector<std::thread> threads;
    for (int64_t t = 0; t < count; t++)
      threads.emplace_back([&parallel, t, count] {
        for (int repeat = 0; repeat < 20; repeat++)
          for (int64_t k = t; k < kBlocks; k += count) parallel.block(k);
      });
    for (std::thread& thread : threads) thread.join();
    CHECK(parallel.equals(serial), "%s: %ld threads differ from one", Type<T>::name, long(count));
  }
}

}  // namespace

TEST_CASE("threads") {
  for_each_type([&]<typename T>() { compare<T>(); });
}

}  // namespace fastasr::test
