// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/gated_depthwise_conv.h"

#include <algorithm>

#include "tests/check.h"

namespace fastasr::test {
namespace {

struct Shape {
  int64_t frames, batch, channels, taps, chunk;  // chunk 0: plain
  cpu::GatedActivation activation;
  bool mask, cache, biases;
  int64_t delay = 0;
  cpu::Gate gate = cpu::Gate::sigmoid;
  std::vector<int64_t> starts = {};  // of recordings in every sequence, and the end of the last; empty: one

  int64_t recordings() const { return std::max<int64_t>(1, static_cast<int64_t>(starts.size()) - 1); }
};

template <typename T>
struct Case {
  using C = compute_t<T>;
  Shape s;
  Rounding rounding = nullptr;
  bool chunked = s.chunk > 0;
  int64_t P = s.taps / 2 + s.delay, groups = std::min(s.batch * s.recordings(), cpu::kGatedGroups),
          n = s.frames * s.batch * s.channels;
  int64_t chunk = chunked ? std::min(s.chunk, s.frames) : s.frames;
  Random random{static_cast<uint64_t>(s.frames * 1000 + s.channels * 10 + s.taps), rounding};
  Buffer<T> h{2 * n, 3, random, 1.5}, grad{n, 1, random}, y{n, 5}, dh{2 * n, 2};
  Buffer<C> weight{s.channels * s.taps, 1, random, 0.4}, bias{s.channels, 0, random, 0.4},
      causal{s.channels * (P + 1), 0, random, 0.4}, causal_bias{s.channels, 0, random, 0.4};
  Buffer<T> scale{2 * s.channels * s.taps, 0, random, 0.4}, cache{s.batch * s.channels * P, 0, random, 0.4};
  bool both = chunked && s.biases, alone = s.starts.empty();
  Buffer<C> dweight{weight.size()}, dbias{s.biases ? s.channels : 0}, dcausal{chunked ? causal.size() : 0},
      dcausal_bias{both ? s.channels : 0};
  Buffer<T> dscale{chunked ? scale.size() : 0}, new_cache{alone ? cache.size() : 0}, dcache{s.cache ? cache.size() : 0};
  Buffer<bool> mask{s.batch * s.frames};

  // Runs tasks in pieces of `step`.
  void run(int64_t step) {
    for (int64_t i = 0; i < mask.size(); i++) mask[i] = i % s.frames > s.frames - 2 * (i / s.frames) - 1;
    const auto given = [](bool there, auto& b) { return there ? b.data() : nullptr; };
    const cpu::GatedDepthwiseConv<T> conv{h,
                                          s.batch * 2 * s.channels,
                                          2 * s.channels,
                                          weight,
                                          given(s.biases, bias),
                                          given(chunked, causal),
                                          given(both, causal_bias),
                                          given(chunked, scale),
                                          given(s.mask, mask),
                                          given(s.cache, cache),
                                          s.frames,
                                          s.batch,
                                          s.channels,
                                          s.taps,
                                          P,
                                          chunk,
                                          s.activation,
                                          s.gate,
                                          s.recordings(),
                                          given(!alone, s.starts)};
    std::vector<C> parts(static_cast<size_t>(groups * conv.sums() * s.channels));
    const auto& backward = cpu::kernels<cpu::GatedDepthwiseConvBackward<T>>();
    const int64_t stripes = (s.channels + cpu::kGatedStripe - 1) / cpu::kGatedStripe;
    in_pieces(stripes * conv.count(), step, [&](int64_t begin, int64_t end) {
      cpu::kernels<cpu::GatedDepthwiseConvForward<T>>().run(conv, y, given(alone, new_cache), begin, end);
    });
    in_pieces(stripes * groups, step, [&](int64_t begin, int64_t end) {
      backward.run(conv, grad, s.batch * s.channels, s.channels, dh, given(s.cache, dcache), parts.data(), groups,
                   begin, end);
    });
    backward.reduce(conv, parts.data(), groups, dweight, given(s.biases, dbias), given(chunked, dcausal),
                    given(both, dcausal_bias), given(chunked, dscale));
  }
  auto outputs() { return std::tie(y, dh, dweight, dbias, dcausal, dcausal_bias, dscale, new_cache, dcache); }
};

template <typename T>
void values(const Shape& s) {
  INFO(Type<T>::name, " T=", s.frames, " B=", s.batch, " C=", s.channels, " K=", s.taps, " chunk=", s.chunk);
  like_double_in_any_pieces<Case, T>(3, 20, s);
}

}  // namespace

TEST_CASE("gated_depthwise_conv") {
  using enum cpu::GatedActivation;
  for_each_type([]<typename T>() {
    for (const int64_t channels : {1, 7, 16, 33, 64})
      for (const int64_t taps : {1, 5, 15}) values<T>({70, 3, channels, taps, 0, swoosh_r, true, false, true});
    for (const int64_t batch : {1, 3})
      for (const auto activation : {identity, swoosh_r})
        values<T>(
            {133, batch, 33, 9, 0, activation, batch == 3, false, true, 0, cpu::Gate::sigmoid, {0, 1, 4, 70, 133}});
    values<T>({70, 1, 17, 4, 0, silu, false, false, false, -1, cpu::Gate::silu, {0, 64, 70}});
    for (const int64_t chunk : {1, 2, 5, 8, 40, 64, 65, 100, 200})
      values<T>({133, 2, 18, 15, chunk, swoosh_r, true, true, true});
    for (const int64_t chunk : {1, 6, 40, 200})
      values<T>(
          {133, 2, 18, 9, chunk, swoosh_r, true, false, true, 0, cpu::Gate::sigmoid, {0, 1, 4, 30, 60, 130, 133}});
    for (const int64_t frames : {1, 3, 63, 64, 65}) {
      values<T>({frames, 2, 17, 31, 0, identity, false, false, false});
      values<T>({frames, 2, 17, 31, 16, identity, true, true, false});
      values<T>({frames, 6, 9, 7, frames, swoosh_r, false, false, true});
      values<T>({frames, 2, 17, 9, 0, silu, true, true, true, 4});
      values<T>({frames, 2, 33, 4, 0, silu, true, true, true, -1});
      values<T>({frames, 2, 33, 3, 0, silu, true, true, true, 1, cpu::Gate::silu});
      values<T>({frames, 2, 17, 5, 8, swoosh_r, true, true, true, 0, cpu::Gate::silu});
    }
  });
}

}  // namespace fastasr::test
