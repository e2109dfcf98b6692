// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "cuda/ema_coefficients.cuh"
#include "cuda/ema_scan.h"

// Plans and launches of the EMA scan, real and complex; the kernels are in scan_tile.cuh and ema_coefficients.cuh.
//
// One block per 32 channels of a batch row walks all of time: x is read once and y written once. Where that gives fewer
// blocks than a large GPU has multiprocessors, time is cut into segments: their ends are computed first (x is read a
// second time), carried, and the segments then run side by side. Both directions at once always run so, with segments
// of one tile. The choice depends on the shape alone, so results do too.
namespace fastasr::cuda {

// GPUs of compute capability 8.6, 8.9 and 12.0 give a block the least memory, this much: 64 states fit everywhere.
// Complex ones need twice the carries; where those do not fit, time is cut so that no block keeps any.
constexpr int64_t kLeastShared = 99 * 1024;
static_assert(ScanShape<float, kOutput>::shared(16, false) <= kLeastShared, "64 states");
static_assert(ScanShape<float, kChain>::shared(16, false) <= kLeastShared, "64 states");
static_assert(ScanShape<float, kAdjoint>::shared(16, false) <= kLeastShared, "64 states");
static_assert(ScanShape<double, kOutput>::shared(16, false) <= kLeastShared, "64 states");
static_assert(ScanShape<double, kAdjoint>::shared(16, false) <= kLeastShared, "64 states");
static_assert(ScanShape<float, kAdjoint>::shared(64, true) <= kLeastShared, "64 complex states in both directions");
static_assert(ScanShape<double, kAdjoint>::shared(64, true) <= kLeastShared, "64 complex states in both directions");

constexpr int64_t kEnoughBlocks = 128, kWantedBlocks = 512;

// A view of a sequence: lanes run along whichever dimension is contiguous.
inline ScanView scan_view(const FastasrSequence& s, int type) {
  return {s.data, s.time, s.batch, s.channel, s.time == 1 && s.channel != 1, type};
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out pieces of the workspace, or counts them.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <typename C>
  C* take(int64_t elements) {
    unsigned char* const at = base_ != nullptr ? base_ + size_ : nullptr;
    size_ += ceil_div(elements * static_cast<int64_t>(sizeof(C)), 256) * 256;
    return reinterpret_cast<C*>(at);
  }
  int64_t size() const { return size_; }

 private:
  unsigned char* base_;
  int64_t size_ = 0;
};

enum class Pass { kSize, kRun };

// Runs the scans of one call. One function both sizes the workspace and launches, so that the two cannot differ.
//
// P is the type of the parameters and states. Q is a state as it is computed, C or Complex<C>. C is wider than P for
// truncated convolutions: the scan subtracts what leaves the window, and its rounding error stays as long as the memory
// would have lasted.
template <typename Q, typename P>
class EmaScan {
 public:
  using C = typename StateTraits<Q>::Real;
  using Stored = std::conditional_t<StateTraits<Q>::kParts == 1, P, Complex<P>>;  // a state in memory
  static constexpr int kStates = StateTraits<Q>::kStates, kParts = StateTraits<Q>::kParts;

  EmaScan(Pass pass, const FastasrEmaScan& scan, void* stream)
      : s_(scan), runs_(pass == Pass::kRun), workspace_(runs_ ? scan.workspace : nullptr), stream_(stream) {
    directions_ = scan.direction == 2 ? 2 : 1;
    groups_each_ = static_cast<int>(ceil_div(scan.states, kStates));
    groups_ = groups_each_ * directions_;
    reversed_ = scan.direction == 0 ? 0u : scan.direction == 1 ? 1u : 2u;
    truncation_ = scan.truncation >= scan.length ? 0 : scan.truncation;
  }

  int forward(const FastasrSequence& y, void* final_state) {
    if (s_.batch == 0 || s_.channels == 0) return 0;
    if (s_.length <= 1) return step(y, final_state);
    prepare(ScanShape<C, kOutput>::kRows);
    ScanParameters<C> p = scan_of(view(s_.x), view(y), reversed_);
    p.mask_in = true;
    p.residual = residual_;
    p.activation = s_.activation;
    p.initial = state(s_.state);
    p.first_power = 1;
    p.final_state = static_cast<C*>(final_state);
    scan<kOutput>(p);
    return error_;
  }

  int backward(const FastasrEmaScanGrads& g) {
    if (s_.channels == 0) return 0;
    GradientParameters<P> finish{s_.length,
                                 s_.batch,
                                 s_.channels,
                                 s_.states,
                                 0,
                                 groups_,
                                 groups_each_,
                                 pointer(s_.damping),
                                 pointer(s_.decay),
                                 pointer(s_.expansion),
                                 pointer(s_.projection),
                                 pointer(s_.state),
                                 pointer(g.grad_state),
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 static_cast<P*>(g.ddamping),
                                 static_cast<P*>(g.ddecay),
                                 static_cast<P*>(g.dexpansion),
                                 static_cast<P*>(g.dprojection),
                                 static_cast<P*>(g.dresidual),
                                 static_cast<P*>(g.dstate),
                                 nullptr};
    if (s_.length > 0 && s_.batch > 0) {
      static_assert(ScanShape<C, kChain>::kRows == ScanShape<C, kAdjoint>::kRows, "one set of coefficients");
      prepare(ScanShape<C, kAdjoint>::kRows);
      ScanView slope = view(g.grad);
      if (s_.activation != kIdentity) {  // g' = g act'(z), in the type of computation
        C* const made = workspace_.template take<C>(s_.length * s_.batch * s_.channels);
        slope = like(s_.x, made);
        ScanParameters<C> p = scan_of(view(s_.x), slope, reversed_);
        p.other = view(g.grad);
        p.mask_in = true;
        p.residual = residual_;
        p.activation = s_.activation;
        p.initial = state(s_.state);
        p.first_power = 1;
        scan<kChain>(p);
      }
      const int64_t values = s_.batch * groups_ * 8 * s_.channels;
      if (g.grad_state != nullptr) {  // here the final state's gradient meets x: the scan itself, with its derivative
        ScanParameters<C> p = scan_of(view(s_.x), ScanView{}, reversed_);
        p.mask_in = true;
        p.finals = workspace_.template take<C>(values);
        scan<kAdjoint>(p);
        finish.input_finals = pointer(p.finals);
      }
      ScanParameters<C> p = scan_of(slope, view(g.dx), ~reversed_ & (directions_ == 2 ? 3u : 1u));
      p.other = view(s_.x);
      p.mask_out = true;
      p.residual = residual_;
      p.initial = state(g.grad_state);
      p.out_coefficient = kIn;
      p.first_power = 0;
      if (s_.state != nullptr) p.finals = workspace_.template take<C>(values);
      const int64_t blocks = cut<kAdjoint>(p) * s_.batch;
      p.parts = workspace_.template take<double>(blocks * (groups_ * 8 + 1) * s_.channels);
      scan<kAdjoint>(p);
      finish.finals = pointer(p.finals);
      finish.parts = p.parts;
      finish.blocks = blocks;
    }
    const int64_t blocks = ceil_div(s_.channels, 32) * (groups_ * kStates + 1), rows = directions_ * s_.channels;
    if (kParts == 2) finish.by_angle = workspace_.template take<double>(rows * s_.states);
    start(&finish_gradients<Stored>, blocks, 256, 2 * kParts * 8 * 32 * sizeof(double), finish);
    if constexpr (kParts == 2) {
      const AngleParameters<P> angles{rows, s_.states, finish.by_angle, finish.expansion, finish.dexpansion};
      start(&add_angles<P>, ceil_div(rows, kFlatThreads), kFlatThreads, 0, angles);
    }
    return error_;
  }

  int64_t workspace_size() const { return workspace_.size(); }

 private:
  ScanView view(const FastasrSequence& s) const { return scan_view(s, s_.dtype); }
  static const P* pointer(const void* p) { return static_cast<const P*>(p); }
  static const C* state(const void* p) { return static_cast<const C*>(p); }  // null unless C is P

  template <typename Parameters>
  void start(void (*kernel)(Parameters), int64_t blocks, int threads, int64_t shared, const Parameters& p) {
    if (error_ == 0 && runs_) error_ = launch(kernel, blocks, threads, shared, stream_, p);
  }

  int step(const FastasrSequence& y, void* final_state) {
    StepParameters<P> p{view(s_.x),
                        view(y),
                        s_.length,
                        s_.batch,
                        s_.channels,
                        s_.states,
                        directions_,
                        s_.activation,
                        pointer(s_.damping),
                        pointer(s_.decay),
                        pointer(s_.expansion),
                        pointer(s_.projection),
                        pointer(s_.residual),
                        pointer(s_.state),
                        s_.mask,
                        static_cast<P*>(final_state)};
    start(&scan_step<Stored>, ceil_div(s_.batch * s_.channels, kFlatThreads), kFlatThreads, 0, p);
    return error_;
  }

  void prepare(int warp_rows) {
    const int64_t states = static_cast<int64_t>(groups_) * kStates * s_.channels,
                  size = kCoefficients * kParts * states;
    const bool has_residual = s_.residual != nullptr;
    coefficients_ = workspace_.template take<C>(size + (has_residual ? s_.channels : 0));
    if (has_residual && coefficients_ != nullptr) residual_ = coefficients_ + size;
    CoefficientParameters<C, P> p{s_.channels,
                                  s_.states,
                                  truncation_,
                                  warp_rows,
                                  groups_,
                                  groups_each_,
                                  pointer(s_.damping),
                                  pointer(s_.decay),
                                  pointer(s_.expansion),
                                  pointer(s_.projection),
                                  pointer(s_.residual),
                                  coefficients_};
    start(&prepare_coefficients<Q, P>, ceil_div(states, kFlatThreads), kFlatThreads, 0, p);
  }

  // A dense sequence in the order of `order`'s strides.
  ScanView like(const FastasrSequence& order, C* data) const {
    if (view(order).along_time) return {data, 1, s_.channels * s_.length, s_.length, true, Storage<C>::kOwn};
    return {data, s_.channels, s_.channels * s_.length, 1, false, Storage<C>::kOwn};
  }

  ScanParameters<C> scan_of(ScanView in, ScanView out, unsigned reversed) const {
    ScanParameters<C> p{};
    p.in = in;
    p.out = out;
    p.length = s_.length;
    p.batch = s_.batch;
    p.channels = s_.channels;
    p.states = s_.states;
    p.groups = groups_;
    p.groups_each = groups_each_;
    p.reversed = reversed;
    p.truncation = truncation_;
    p.coefficients = coefficients_;
    p.mask = s_.mask;
    p.out_coefficient = kOut;
    return p;
  }

  // Sets the tiles per segment; returns the number of segments.
  template <ScanMode mode>
  int64_t cut(ScanParameters<C>& p) const {
    const int64_t tiles = ceil_div(s_.length, ScanShape<C, mode>::kTile);
    const int64_t blocks = ceil_div(s_.channels, 32) * s_.batch;
    p.tiles_per_segment = tiles;
    if (directions_ == 2 || ScanShape<C, mode>::shared(groups_, false) > kLeastShared)
      p.tiles_per_segment = 1;
    else if (blocks < kEnoughBlocks && tiles > 2)
      p.tiles_per_segment = ceil_div(tiles, std::min(ceil_div(kWantedBlocks, blocks), ceil_div(tiles, 2)));
    p.segments = ceil_div(tiles, p.tiles_per_segment);
    return p.segments;
  }

  template <ScanMode mode>
  void scan(ScanParameters<C> p) {
    using Shape = ScanShape<C, mode>;
    cut<mode>(p);
    const int64_t blocks = ceil_div(s_.channels, 32) * s_.batch * p.segments;
    const int64_t shared = Shape::shared(groups_, p.tiles_per_segment == 1);
    if (p.segments > 1) {
      p.carry = workspace_.template take<C>(p.segments * s_.batch * groups_ * Shape::kValues * s_.channels);
      p.ends_only = true;
      start(&scan_tiles<Q, mode>, blocks, Shape::kThreads, shared, p);
      p.ends_only = false;
      CarryParameters<C> carry{s_.batch,      s_.channels,  p.segments,     p.tiles_per_segment * Shape::kTile,
                               groups_,       groups_each_, Shape::kValues, p.reversed,
                               coefficients_, p.carry};
      start(&carry_segments<Q>, ceil_div(s_.batch * groups_ * kStates * s_.channels, kFlatThreads), kFlatThreads, 0,
            carry);
    }
    start(&scan_tiles<Q, mode>, blocks, Shape::kThreads, shared, p);
  }

  const FastasrEmaScan& s_;
  bool runs_;
  Workspace workspace_;
  void* stream_;
  int directions_, groups_, groups_each_, error_ = 0;
  unsigned reversed_;
  int64_t truncation_;
  C* coefficients_ = nullptr;
  const C* residual_ = nullptr;
};

}  // namespace fastasr::cuda
