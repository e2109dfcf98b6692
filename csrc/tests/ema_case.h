// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "cpu/ema/ema_scan.h"
#include "tests/check.h"

// The options, operands and results of the EMA scans, for the kernels of the CPU and of CUDA alike, and the CPU's scan.
namespace fastasr::test {

enum Direction : int { kForward, kReverse, kBidirectional };
enum ActivationNumber : int { kIdentity, kSilu, kRelu, kTanh, kGelu };
enum Layout { kLbd, kBld, kBdl, kPadded };  // kPadded: as kBld, with gaps between rows

struct EmaOptions {
  int64_t length, batch, channels, states;
  int64_t truncation = 0;
  int direction = kForward, activation = kIdentity;
  Layout layout = kLbd;
  bool state = false, mask = false, residual = true;
  double decay = 0;  // mean of the decay parameters before the sigmoid

  std::string text() const {
    return formatted("%ldx%ldx%ld N %ld K %ld direction %d activation %d layout %d%s%s", long(length), long(batch),
                     long(channels), long(states), long(truncation), direction, activation, layout,
                     state ? " state" : "", mask ? " mask" : "");
  }
  int64_t halves() const { return direction == kBidirectional ? 2 : 1; }
  int64_t rows() const { return halves() * channels; }
  int64_t elements() const { return length * batch * channels; }
};

// Holds a sequence tensor in one of the layouts.
template <typename T>
struct Sequence {
  Buffer<T> data;
  int64_t time, batch, channel;
  Sequence(const EmaOptions& o, Layout layout, int64_t offset) : data(size(o, layout), offset) {
    const int64_t row = o.channels + (layout == kPadded ? 3 : 0);
    time = layout == kLbd ? o.batch * row : layout == kBdl ? 1 : row;
    batch = layout == kLbd ? row : row * o.length;
    channel = layout == kBdl ? o.length : 1;
  }
  static int64_t size(const EmaOptions& o, Layout layout) {
    return o.length * o.batch * (o.channels + (layout == kPadded ? 3 : 0));
  }
  T& at(int64_t t, int64_t b, int64_t d) { return data[t * time + b * batch + d * channel]; }
  template <typename View>
  View view() {
    return {data, time, batch, channel};
  }
};

// The four parameters, states and results are those of the real average, or of the complex one: alpha, delta, theta and
// gamma in the order of the real ones, real and imaginary parts as the last dimension.
template <typename T, bool complex = false>
struct EmaCase {
  using C = compute_t<T>;
  static constexpr int64_t kParts = complex ? 2 : 1;
  EmaOptions o;
  Random random;
  int64_t parameters = o.rows() * o.states, angles = complex ? o.rows() : parameters;
  int64_t states = kParts * o.batch * o.channels * o.states;
  Sequence<T> x, grad, y, dx;
  Buffer<C> damping{parameters, 1}, decay{parameters}, expansion{angles}, projection{kParts * parameters},
      residual{o.channels}, state{states}, grad_state{states}, final_state{o.state ? states : 0};
  Buffer<C> ddamping{parameters}, ddecay{parameters}, dexpansion{angles}, dprojection{kParts * parameters},
      dresidual{o.residual ? o.channels : 0}, dstate{o.state ? states : 0};
  Buffer<uint8_t> mask{o.batch * o.length};

  // mixed: not all tensors have the layout of x.
  EmaCase(const EmaOptions& options, uint64_t seed, bool mixed, Rounding rounding)
      : o(options),
        random(seed, rounding),
        x(o, o.layout, 1),
        grad(o, mixed && o.layout == kBdl ? kBld : o.layout, 3),
        y(o, mixed && o.layout == kPadded ? kLbd : o.layout, 1),
        dx(o, mixed && o.layout == kPadded ? kBdl : o.layout, 2) {
    y.data.set(0), dx.data.set(0);  // there may be gaps between rows
    x.data.fill(random), grad.data.fill(random), damping.fill(random), decay.fill(random, 1, o.decay);
    for (Buffer<C>* b : {&expansion, &projection, &residual, &state, &grad_state}) b->fill(random);
    for (int64_t i = 0; i < mask.size(); i++) mask[i] = random.uniform() < 0.3;
  }
  static uint64_t seed_of(const EmaOptions& o) {
    return static_cast<uint64_t>(o.length * 31 + o.channels * 7 + o.states);
  }
  C* if_residual(Buffer<C>& b) { return o.residual ? b.data() : nullptr; }
  C* if_state(Buffer<C>& b) { return o.state ? b.data() : nullptr; }
  uint8_t* mask_or_null() { return o.mask ? mask.data() : nullptr; }
  auto outputs() {
    return std::tie(y.data, dx.data, ddamping, ddecay, dexpansion, dprojection, dresidual, final_state, dstate);
  }
};

inline const cpu::Parallel kSerial = [](int64_t tasks, int64_t, const std::function<void(int64_t, int64_t)>& f) {
  if (tasks > 0) f(0, tasks);
};

template <typename T, bool complex = false>
struct CpuEma : EmaCase<T, complex> {
  using C = compute_t<T>;
  using EmaCase<T, complex>::EmaCase;

  cpu::EmaShape shape() {
    const EmaOptions& o = this->o;
    return {o.length,
            o.batch,
            o.channels,
            o.states,
            o.truncation,
            cpu::EmaDirection(o.direction),
            cpu::EmaActivation(o.activation),
            complex};
  }
  cpu::EmaStrides strides(Sequence<T>& s) { return {s.time, s.batch, s.channel}; }
  cpu::EmaParameters<C> arguments() {
    return {this->damping,
            this->decay,
            this->expansion,
            this->projection,
            this->if_residual(this->residual),
            this->if_state(this->state),
            this->mask_or_null()};
  }
  void run(const cpu::Parallel& parallel = kSerial) {
    auto &x = this->x, &y = this->y, &grad = this->grad, &dx = this->dx;
    cpu::kernels<cpu::EmaScanKernels<T>>().forward(shape(), arguments(), x.data, strides(x), y.data, strides(y),
                                                   this->if_state(this->final_state), parallel);
    cpu::kernels<cpu::EmaScanKernels<T>>().backward(shape(), arguments(), x.data, strides(x), grad.data, strides(grad),
                                                    this->if_state(this->grad_state), dx.data, strides(dx),
                                                    {this->ddamping, this->ddecay, this->dexpansion, this->dprojection,
                                                     this->if_residual(this->dresidual), this->if_state(this->dstate)},
                                                    parallel);
  }
};

}  // namespace fastasr::test
