// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/ema/ema_scan.h"
#include "cpu/ema/ema_scan_numbers.h"

// Cuts ema_scan into tasks, and holds what its passes share: packed coefficients, staging, and the scan of a range of
// time in blocks. The cut depends on the shape alone, so results do not depend on the number of threads.
namespace fastasr::cpu {

struct EmaPlan {
  static constexpr int64_t kFewTiles = 4, kLong = 4096, kLeastChunk = 1024, kPieces = 16, kTasks = 32;

  int64_t length, tiles, halves, truncation, chunk, chunks, groups, run;

  explicit EmaPlan(const EmaShape& s)
      : length(s.length),
        tiles((s.channels + kEmaLanes - 1) / kEmaLanes),
        halves(s.direction == EmaDirection::bidirectional ? 2 : 1),
        truncation(s.truncation < s.length ? s.truncation : 0) {
    const int64_t rows = std::max<int64_t>(1, tiles * s.batch);
    chunk = std::max<int64_t>(1, length), chunks = 1;
    if (rows < kFewTiles && length >= kLong) chunk = std::max(kLeastChunk, (length * rows + kPieces - 1) / kPieces);
    if (chunk < length) {
      chunk = (chunk + kEmaSteps - 1) / kEmaSteps * kEmaSteps;
      chunks = (length + chunk - 1) / chunk;
    }
    // A truncated scan starts again from the earlier taps after this many steps: a step subtracts a little more or less
    // than rounding left of the tap, and in dh/dq this difference is summed twice.
    run = truncation > 0 ? (truncation + kEmaSteps - 1) / kEmaSteps * kEmaSteps : chunk;
    // this many rows of the batch share the sums of the parameters' gradients, if that leaves enough tasks
    groups = std::min(std::max<int64_t>(1, s.batch),
                      (kTasks + std::max<int64_t>(1, tiles) - 1) / std::max<int64_t>(1, tiles));
  }
  bool carried() const { return chunks > 1 && truncation == 0; }
};

// Calls f(i) for each of n tasks.
template <typename F>
void each_task(const Parallel& parallel, int64_t n, int64_t work, const F& f) {
  parallel(n, work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i);
  });
}

template <typename C>
class EmaScan {
 public:
  static constexpr int64_t kBlock = kEmaSteps * kEmaLanes;

  // Says how b and c enter the scans. The forward scan computes h itself (in = b, out = c). Without a state the
  // backward scans u = h / b (in = 1, out = b c), so that one sum of dy u serves the gradients of b and of c.
  enum class Form { states, unit };

  EmaScan(const EmaShape& shape, const EmaParameters<C>& parameters, const EmaCopies<C>& copies, const void* x,
          const EmaStrides& x_strides, Form form, const Parallel& parallel)
      : shape_(shape),
        parameters_(parameters),
        copies_(copies),
        x_(x),
        x_strides_(x_strides),
        numbers_(ema_numbers<C>(shape.complex)),
        plan_(shape),
        states_(shape.states),
        rows_(shape.states * numbers_.width * kEmaLanes),
        unit_(form == Form::unit),
        arrays_(3 + (numbers_.precise ? 2 : 0) + (plan_.truncation > 0 ? 2 : 0)),
        residual_(static_cast<size_t>(plan_.tiles * kEmaLanes)),
        packed_(static_cast<size_t>(plan_.halves * plan_.tiles * arrays_ * rows_)) {
    each_task(parallel, plan_.halves * plan_.tiles, 40 * rows_,
              [&](int64_t i) { pack(i / plan_.tiles, i % plan_.tiles); });
    if (parameters.residual)
      std::memcpy(residual_.data(), parameters.residual, sizeof(C) * static_cast<size_t>(shape.channels));
  }

  const EmaShape& shape() const { return shape_; }
  const EmaParameters<C>& parameters() const { return parameters_; }
  const EmaPlan& plan() const { return plan_; }
  const EmaNumbers<C>& numbers() const { return numbers_; }
  int64_t rows() const { return rows_; }  // elements of a tile's array over states
  bool unit() const { return unit_; }
  int64_t channels(int64_t tile) const { return std::min(kEmaLanes, shape_.channels - tile * kEmaLanes); }
  int64_t lanes(int64_t tile) const { return (channels(tile) + 15) / 16 * 16; }
  const C* residual(int64_t tile) const { return parameters_.residual ? residual_.data() + tile * kEmaLanes : nullptr; }
  bool reversed(int64_t half) const { return half == 1 || shape_.direction == EmaDirection::reverse; }

  EmaWeights<C> weights(int64_t half, int64_t tile) const {
    return arrays(packed_.data() + (half * plan_.tiles + tile) * arrays_ * rows_);
  }
  // The weights of the adjoint scan, which takes dy and gives dx: c is its input coefficient and b its output one.
  EmaWeights<C> adjoint(int64_t half, int64_t tile) const {
    EmaWeights<C> w = weights(half, tile);
    if (!unit_) std::swap(w.in, w.out), w.real = false;
    return w;
  }

  // Returns the time of scan step tau: the scan may run backwards.
  int64_t time(int64_t tau, bool backwards) const { return backwards ? plan_.length - 1 - tau : tau; }
  // Returns the scan steps of chunk `j`, which is a range of time.
  int64_t begin(int64_t j, bool backwards) const {
    return backwards ? plan_.length - std::min(plan_.length, (j + 1) * plan_.chunk) : j * plan_.chunk;
  }
  int64_t end(int64_t j, bool backwards) const {
    return backwards ? plan_.length - j * plan_.chunk : std::min(plan_.length, (j + 1) * plan_.chunk);
  }
  // Returns the chunk that is k-th in the order of the scan.
  int64_t ordered(int64_t k, bool backwards) const { return backwards ? plan_.chunks - 1 - k : k; }

  // Copies steps of a tensor into a buffer, in the scan's order.
  void load(const void* tensor, const EmaStrides& strides, int64_t tile, int64_t b, int64_t tau, int64_t steps,
            bool backwards, bool masked, C* buffer) const {
    const int64_t t = time(tau, backwards), sign = backwards ? -1 : 1;
    const uint8_t* mask = masked && parameters_.mask ? parameters_.mask + b * plan_.length + t : nullptr;
    copies_.load(tensor, t * strides.time + b * strides.batch + tile * kEmaLanes * strides.channel, sign * strides.time,
                 strides.channel, mask, sign, steps, channels(tile), lanes(tile), buffer);
  }
  void store(const C* buffer, void* tensor, const EmaStrides& strides, int64_t tile, int64_t b, int64_t tau,
             int64_t steps, bool backwards) const {
    const int64_t at = time(tau, backwards) * strides.time + b * strides.batch + tile * kEmaLanes * strides.channel;
    copies_.store(buffer, tensor, at, backwards ? -strides.time : strides.time, strides.channel, steps, channels(tile));
  }
  // Does the same with rows [64] of C that lie in the order of time, which begin with time `origin`.
  void load_rows(const C* rows, int64_t origin, int64_t tau, int64_t steps, bool backwards, C* buffer) const {
    copy(rows + (time(tau, backwards) - origin) * kEmaLanes, backwards ? -kEmaLanes : kEmaLanes, buffer, kEmaLanes,
         steps);
  }
  void store_rows(const C* buffer, C* rows, int64_t origin, int64_t tau, int64_t steps, bool backwards) const {
    copy(buffer, kEmaLanes, rows + (time(tau, backwards) - origin) * kEmaLanes, backwards ? -kEmaLanes : kEmaLanes,
         steps);
  }

  // Returns the place of chunk j in borders, [half][row][chunk][N][64].
  C* border(std::vector<C>& borders, int64_t half, int64_t row, int64_t j) const {
    return borders.data() + ((half * plan_.tiles * shape_.batch + row) * plan_.chunks + j) * rows_;
  }

  // What convolve calls per block. The calls are few: as templates, each of its uses would be compiled apart.
  using Load = std::function<void(int64_t, int64_t, C*)>;
  using Start = std::function<bool(int64_t, int64_t, C*)>;
  using Done = std::function<void(int64_t, int64_t, C*, C*)>;
  using Sum = std::function<void(const C*)>;

  // Returns what loads x.
  Load input(int64_t row, bool backwards, bool masked = true) const {
    return [this, tile = row % plan_.tiles, b = row / plan_.tiles, backwards, masked](int64_t tau, int64_t steps,
                                                                                      C* buffer) {
      load(x_, x_strides_, tile, b, tau, steps, backwards, masked, buffer);
    };
  }

  // Runs blocks of the scan steps [from, to). load(tau, steps, buffer) reads the input; start(tau, steps, y) may
  // initialise y and returns whether it left y empty; done(tau, steps, y, input) takes the result. For g see
  // EmaConvolution. `other` works as load, with sum(part) called per block. All but load may be absent. Truncated scans
  // start by themselves and overwrite `g`.
  void convolve(const EmaWeights<C>& w, int64_t tile, int64_t from, int64_t to, C* g, C* last, const Load& load,
                const Start& start = {}, const Done& done = {}, const Load& other = {}, const Sum& sum = {}) const {
    alignas(64) C input[kBlock], late[kBlock], y[kBlock], second[kBlock];
    EmaConvolution<C> a{};
    a.x = input, a.decay = w.decay, a.low = w.low, a.in = w.in, a.out = w.out, a.late_gain = w.late, a.y = y, a.g = g,
    a.last = last;
    a.lanes = lanes(tile), a.states = states_, a.real = w.real;
    const EmaBlock<C>& block = numbers_.block();
    std::vector<C> part;
    if (other) part.resize(static_cast<size_t>(rows_)), a.sum = part.data();
    for (int64_t tau = from; tau < to; tau += kEmaSteps) {
      if (plan_.truncation > 0 && (tau - from) % plan_.run == 0) {
        a.x_late = nullptr, a.start = true;
        warm_up(tau, g, nullptr, [&](int64_t at, int64_t steps) {
          load(at, steps, input);
          a.steps = steps;
          block.convolution(a);
        });
        a.x_late = late;
      }
      const int64_t steps = std::min(kEmaSteps, to - tau);
      load(tau, steps, input);
      if (a.x_late) load_late(tau, steps, load, late);
      a.start = !start || start(tau, steps, y);
      if (!other) {
        a.steps = steps;
        block.convolution(a);
      } else {
        other(tau, steps, second);
        for (int64_t s = 0; s < steps; s += kEmaChain) {
          const int64_t at = s * kEmaLanes;
          a.x = input + at, a.y = y + at, a.other = second + at, a.steps = std::min(kEmaChain, steps - s);
          block.convolution(a);
          sum(part.data());
        }
      }
      if (done) done(tau, steps, y, input);
    }
  }

  // Reads the input K steps before.
  void load_late(int64_t tau, int64_t steps, const Load& load, C* buffer) const {
    const int64_t absent = std::clamp<int64_t>(plan_.truncation - tau, 0, steps);
    std::fill(buffer, buffer + absent * kEmaLanes, C(0));
    if (absent < steps) load(tau + absent - plan_.truncation, steps - absent, buffer + absent * kEmaLanes);
  }
  // Zeroes the states and calls block(tau, steps) over the K steps before `from`.
  void warm_up(int64_t from, C* g, C* v, const std::function<void(int64_t, int64_t)>& block) const {
    std::fill(g, g + rows_, C(0));
    if (v) std::fill(v, v + rows_, C(0));
    for (int64_t tau = std::max<int64_t>(0, from - plan_.truncation); tau < from; tau += kEmaSteps)
      block(tau, std::min(kEmaSteps, from - tau));
  }

  // Copies a state (B, D, N) to and from a tile [N][64], real and imaginary parts apart.
  void load_state(const C* state, int64_t tile, int64_t b, C* out) const {
    std::fill(out, out + rows_, C(0));
    if (!state) return;
    const int64_t values = states_ * numbers_.width;
    const C* p = state + (b * shape_.channels + tile * kEmaLanes) * values;
    for (int64_t j = 0; j < channels(tile); j++)
      for (int64_t n = 0; n < values; n++) out[n * kEmaLanes + j] = p[j * values + n];
  }
  void store_state(const C* in, int64_t tile, int64_t b, C* state) const {
    const int64_t values = states_ * numbers_.width;
    C* p = state + (b * shape_.channels + tile * kEmaLanes) * values;
    for (int64_t j = 0; j < channels(tile); j++)
      for (int64_t n = 0; n < values; n++) p[j * values + n] = in[n * kEmaLanes + j];
  }
  // Does the same for the gradient of a state, which the tile holds as a derivative.
  void load_gradient(const C* gradient, int64_t tile, int64_t b, C* out) const {
    load_state(gradient, tile, b, out);
    numbers_.conjugate(out, states_);
  }
  void store_gradient(C* in, int64_t tile, int64_t b, C* gradient) const {
    numbers_.conjugate(in, states_);
    store_state(in, tile, b, gradient);
  }
  // Computes g before the first step: q times the state.
  void first(int64_t half, int64_t tile, int64_t b, C* g) const {
    load_state(parameters_.state, tile, b, g);
    numbers_.decay(weights(half, tile), g, states_);
  }
  // Turns what each chunk of a row adds to h, and to v unless that is null, into h and v before the chunk. h and v are
  // given as they are before the first chunk; the slots are the borders of chunk 0.
  void carry(int64_t half, int64_t tile, bool backwards, C* h, C* h_slots, C* v = nullptr, C* v_slots = nullptr) const {
    std::vector<C> own(static_cast<size_t>(2 * rows_));
    for (int64_t k = 0; k < plan_.chunks; k++) {
      const int64_t j = ordered(k, backwards);
      std::copy_n(h_slots + j * rows_, rows_, own.data()), std::copy_n(h, rows_, h_slots + j * rows_);
      if (v) std::copy_n(v_slots + j * rows_, rows_, own.data() + rows_), std::copy_n(v, rows_, v_slots + j * rows_);
      numbers_.carry(weights(half, tile), states_, static_cast<double>(end(j, backwards) - begin(j, backwards)), h,
                     own.data(), h, v, own.data() + rows_, v);
    }
  }

 private:
  static void copy(const C* from, int64_t from_step, C* to, int64_t to_step, int64_t steps) {
    for (int64_t s = 0; s < steps; s++) std::memcpy(to + s * to_step, from + s * from_step, sizeof(C) * kEmaLanes);
  }

  template <typename P>
  EmaArrays<P> arrays(P p) const {
    const int64_t late = numbers_.precise ? 5 : 3;
    const bool truncated = plan_.truncation > 0;
    return {p,
            p + rows_,
            p + 2 * rows_,
            numbers_.precise ? p + 3 * rows_ : nullptr,
            numbers_.precise ? p + 4 * rows_ : nullptr,
            truncated ? p + late * rows_ : nullptr,
            truncated ? p + (late + 1) * rows_ : nullptr,
            true};
  }
  void pack(int64_t half, int64_t tile) {
    const EmaArrays<C*> to = arrays(packed_.data() + (half * plan_.tiles + tile) * arrays_ * rows_);
    numbers_.pack(parameters_, half * shape_.channels + tile * kEmaLanes, channels(tile), states_, unit_, to);
    if (plan_.truncation > 0) numbers_.pack_late(static_cast<double>(plan_.truncation), states_, to);
  }

  EmaShape shape_;
  EmaParameters<C> parameters_;
  const EmaCopies<C>& copies_;
  const void* x_;
  EmaStrides x_strides_;
  const EmaNumbers<C>& numbers_;
  EmaPlan plan_;
  int64_t states_, rows_;
  bool unit_;
  int64_t arrays_;
  std::vector<C> residual_, packed_;
};

}  // namespace fastasr::cpu
