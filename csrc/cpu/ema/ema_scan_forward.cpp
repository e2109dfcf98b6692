// SPDX-License-Identifier: Apache-2.0
#include "cpu/ema/ema_scan_plan.h"

namespace fastasr::cpu {
namespace {

template <typename C, template <typename> typename Numbers>
class Forward {
 public:
  using Scan = EmaScan<C, Numbers>;

  Forward(const EmaShape& shape, const typename Scan::Parameters& parameters, const EmaCopies<C>& copies, const void* x,
          EmaStrides xs, void* y, EmaStrides ys, C* final_state, const Parallel& parallel)
      : scan_(shape, parameters, copies, Scan::Form::states, parallel),
        plan_(scan_.plan()),
        x_(x),
        xs_(xs),
        y_(y),
        ys_(ys),
        final_state_(final_state),
        batch_(shape.batch) {}

  void run(const Parallel& parallel) {
    const int64_t rows = plan_.tiles * batch_, work = plan_.chunk * scan_.rows() * 3 * plan_.halves;
    if (plan_.carried()) {
      carries_.resize(static_cast<size_t>(plan_.halves * rows * plan_.chunks * scan_.rows()));
      each(parallel, rows * plan_.chunks, work, [&](int64_t i) {
        for (int64_t half = 0; half < plan_.halves; half++) local(half, i / plan_.chunks, i % plan_.chunks);
      });
      each(parallel, rows, plan_.halves * plan_.chunks * scan_.rows() * 40, [&](int64_t row) {
        for (int64_t half = 0; half < plan_.halves; half++) carry(half, row);
      });
    }
    parallel(rows * plan_.chunks, work, [&](int64_t begin, int64_t end) {
      std::vector<C> first_half(static_cast<size_t>(plan_.halves == 2 ? plan_.chunk * kEmaLanes : 0));
      for (int64_t i = begin; i < end; i++) chunk(i / plan_.chunks, i % plan_.chunks, first_half.data());
    });
  }

 private:
  template <typename F>
  static void each(const Parallel& parallel, int64_t n, int64_t work, const F& f) {
    parallel(n, work, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) f(i);
    });
  }

  C* carried(int64_t half, int64_t row, int64_t j) {
    return carries_.data() + ((half * plan_.tiles * batch_ + row) * plan_.chunks + j) * scan_.rows();
  }
  typename Scan::Load input(int64_t tile, int64_t b, bool backwards) const {
    return [this, tile, b, backwards](int64_t tau, int64_t steps, C* buffer) {
      scan_.load(x_, xs_, tile, b, tau, steps, backwards, true, buffer);
    };
  }

  // Computes what chunk j alone adds to the state after it.
  void local(int64_t half, int64_t row, int64_t j) {
    const int64_t tile = row % plan_.tiles, b = row / plan_.tiles;
    const bool backwards = scan_.reversed(half);
    C* g = carried(half, row, j);
    std::fill(g, g + scan_.rows(), C(0));
    if (scan_.ordered(plan_.chunks - 1, backwards) == j) return;  // nothing follows it
    scan_.convolve(scan_.weights(half, tile), tile, scan_.begin(j, backwards), scan_.end(j, backwards), g, nullptr,
                   input(tile, b, backwards));
  }

  // Turns each chunk's own share into the state before it.
  void carry(int64_t half, int64_t row) {
    const int64_t tile = row % plan_.tiles, b = row / plan_.tiles;
    const bool backwards = scan_.reversed(half);
    std::vector<C> before(static_cast<size_t>(scan_.rows())), own(before.size());
    scan_.first(half, tile, b, before.data());
    for (int64_t k = 0; k < plan_.chunks; k++) {
      const int64_t j = scan_.ordered(k, backwards);
      C* slot = carried(half, row, j);
      std::copy(slot, slot + scan_.rows(), own.data());
      std::copy(before.begin(), before.end(), slot);
      scan_.carry(half, tile, scan_.end(j, backwards) - scan_.begin(j, backwards), before.data(), own.data(),
                  before.data(), nullptr, nullptr, nullptr);
    }
  }

  void chunk(int64_t row, int64_t j, C* first_half) {
    const int64_t tile = row % plan_.tiles, b = row / plan_.tiles, lanes = scan_.lanes(tile);
    const int64_t origin = j * plan_.chunk;
    std::vector<C> own(static_cast<size_t>(scan_.rows())), last(own.size());
    for (int64_t half = 0; half < plan_.halves; half++) {
      const bool backwards = scan_.reversed(half), closing = half + 1 == plan_.halves;
      C* g = own.data();
      if (plan_.carried())
        g = carried(half, row, j);
      else
        scan_.first(half, tile, b, g);
      const auto start = [&](int64_t tau, int64_t steps, C* z) {
        if (half == 0) return true;
        scan_.load_rows(first_half, origin, tau, steps, backwards, z);
        return false;
      };
      const auto done = [&](int64_t tau, int64_t steps, C* z, C* x) {
        if (!closing) return scan_.store_rows(z, first_half, origin, tau, steps, backwards);
        if (scan_.residual(tile) && scan_.parameters().mask)  // the residual takes x unchanged
          scan_.load(x_, xs_, tile, b, tau, steps, backwards, false, x);
        kernels<EmaTile<C>>().activate(z, x, scan_.residual(tile), scan_.shape().activation, steps, lanes);
        scan_.store(z, y_, ys_, tile, b, tau, steps, backwards);
      };
      C* last_state = final_state_ ? last.data() : nullptr;
      scan_.convolve(scan_.weights(half, tile), tile, scan_.begin(j, backwards), scan_.end(j, backwards), g, last_state,
                     input(tile, b, backwards), start, done);
      if (last_state && scan_.ordered(plan_.chunks - 1, backwards) == j)
        scan_.store_state(last_state, tile, b, final_state_);
    }
  }

  Scan scan_;
  const EmaPlan& plan_;
  const void* x_;
  EmaStrides xs_;
  void* y_;
  EmaStrides ys_;
  C* final_state_;
  int64_t batch_;
  std::vector<C> carries_;  // [half][row][chunk][N][64]
};

template <typename T, template <typename> typename Numbers>
void run(const EmaShape& shape, const typename Numbers<compute_t<T>>::Parameters& parameters, const T* x, EmaStrides xs,
         T* y, EmaStrides ys, compute_t<T>* final_state, const Parallel& parallel) {
  if (shape.length == 0 || shape.batch == 0 || shape.channels == 0) {
    if (!final_state) return;
    const int64_t n = shape.batch * shape.channels * shape.states * Numbers<compute_t<T>>::width;
    for (int64_t i = 0; i < n; i++) final_state[i] = parameters.state ? parameters.state[i] : 0;
    return;
  }
  const EmaCopies<compute_t<T>>& copies = kernels<EmaTensor<T>>().copies;
  Forward<compute_t<T>, Numbers>(shape, parameters, copies, x, xs, y, ys, final_state, parallel).run(parallel);
}

}  // namespace

FASTASR_KERNELS(EmaForward, .real = run<T, RealNumbers>, .complex = run<T, ComplexNumbers>)

}  // namespace fastasr::cpu
