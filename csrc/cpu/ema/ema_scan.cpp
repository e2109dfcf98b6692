// SPDX-License-Identifier: Apache-2.0
#include "cpu/ema/ema_scan_plan.h"

namespace fastasr::cpu {
namespace {

template <typename C>
class Forward {
 public:
  using Scan = EmaScan<C>;

  Forward(const EmaShape& shape, const EmaParameters<C>& parameters, const EmaCopies<C>& copies, const void* x,
          EmaStrides xs, void* y, EmaStrides ys, C* final_state, const Parallel& parallel)
      : scan_(shape, parameters, copies, x, xs, Scan::Form::states, parallel),
        plan_(scan_.plan()),
        y_(y),
        ys_(ys),
        final_state_(final_state),
        batch_(shape.batch) {}

  void run(const Parallel& parallel) {
    const int64_t rows = plan_.tiles * batch_, work = plan_.chunk * scan_.rows() * 3 * plan_.halves;
    if (plan_.carried()) {
      carries_.resize(static_cast<size_t>(plan_.halves * rows * plan_.chunks * scan_.rows()));
      each_task(parallel, rows * plan_.chunks, work, [&](int64_t i) {
        for (int64_t half = 0; half < plan_.halves; half++) local(half, i / plan_.chunks, i % plan_.chunks);
      });
      each_task(parallel, rows, plan_.halves * plan_.chunks * scan_.rows() * 40, [&](int64_t row) {
        for (int64_t half = 0; half < plan_.halves; half++) carry(half, row);
      });
    }
    parallel(rows * plan_.chunks, work, [&](int64_t begin, int64_t end) {
      std::vector<C> first_half(static_cast<size_t>(plan_.halves == 2 ? plan_.chunk * kEmaLanes : 0));
      for (int64_t i = begin; i < end; i++) chunk(i / plan_.chunks, i % plan_.chunks, first_half.data());
    });
  }

 private:
  // Computes what chunk j alone adds to the state after it.
  void local(int64_t half, int64_t row, int64_t j) {
    const int64_t tile = row % plan_.tiles;
    const bool backwards = scan_.reversed(half);
    C* g = scan_.border(carries_, half, row, j);
    std::fill(g, g + scan_.rows(), C(0));
    if (scan_.ordered(plan_.chunks - 1, backwards) == j) return;  // nothing follows it
    scan_.convolve(scan_.weights(half, tile), tile, scan_.begin(j, backwards), scan_.end(j, backwards), g, nullptr,
                   scan_.input(row, backwards));
  }

  void carry(int64_t half, int64_t row) {
    const int64_t tile = row % plan_.tiles;
    std::vector<C> before(static_cast<size_t>(scan_.rows()));
    scan_.first(half, tile, row / plan_.tiles, before.data());
    scan_.carry(half, tile, scan_.reversed(half), before.data(), scan_.border(carries_, half, row, 0));
  }

  void chunk(int64_t row, int64_t j, C* first_half) {
    const int64_t tile = row % plan_.tiles, b = row / plan_.tiles, lanes = scan_.lanes(tile);
    const int64_t origin = j * plan_.chunk;
    std::vector<C> own(static_cast<size_t>(scan_.rows())), last(own.size());
    for (int64_t half = 0; half < plan_.halves; half++) {
      const bool backwards = scan_.reversed(half), closing = half + 1 == plan_.halves;
      C* g = own.data();
      if (plan_.carried())
        g = scan_.border(carries_, half, row, j);
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
          scan_.input(row, backwards, false)(tau, steps, x);
        kernels<EmaTile<C>>().activate(z, x, scan_.residual(tile), scan_.shape().activation, steps, lanes);
        scan_.store(z, y_, ys_, tile, b, tau, steps, backwards);
      };
      C* last_state = final_state_ ? last.data() : nullptr;
      scan_.convolve(scan_.weights(half, tile), tile, scan_.begin(j, backwards), scan_.end(j, backwards), g, last_state,
                     scan_.input(row, backwards), start, done);
      if (last_state && scan_.ordered(plan_.chunks - 1, backwards) == j)
        scan_.store_state(last_state, tile, b, final_state_);
    }
  }

  Scan scan_;
  const EmaPlan& plan_;
  void* y_;
  EmaStrides ys_;
  C* final_state_;
  int64_t batch_;
  std::vector<C> carries_;  // [half][row][chunk][N][64]
};

// Two passes over each row of the batch and tile of channels. The first, in the scan's order, recomputes h and v =
// dh/dq and sums the gradients of q and c, and turns dy into g = dy act'(z). The second is the forward's scan in the
// other order, of g, and gives dx. No state is stored but at chunk borders.
template <typename C>
class Backward {
 public:
  using Scan = EmaScan<C>;
  using Load = typename Scan::Load;
  static constexpr int64_t kBlock = Scan::kBlock;

  Backward(const EmaShape& shape, const EmaParameters<C>& parameters, const EmaCopies<C>& copies, const void* x,
           EmaStrides xs, const void* grad, EmaStrides grad_strides, const C* grad_state, void* dx,
           EmaStrides dx_strides, const EmaGradients<C>& gradients, const Parallel& parallel)
      : scan_(shape, parameters, copies, x, xs, parameters.state || grad_state ? Scan::Form::states : Scan::Form::unit,
              parallel),
        plan_(scan_.plan()),
        grad_(grad),
        grad_strides_(grad_strides),
        grad_state_(grad_state),
        dx_(dx),
        dx_strides_(dx_strides),
        gradients_(gradients),
        batch_(shape.batch),
        rows_(plan_.tiles * shape.batch),
        active_(shape.activation != EmaActivation::identity),
        kinds_(scan_.unit() ? 2 : 4),
        slot_(plan_.halves * kinds_ * scan_.rows() + kEmaLanes),
        slots_(plan_.chunks == 1 ? plan_.groups : batch_ * plan_.chunks),
        sums_(static_cast<size_t>(plan_.tiles * slots_ * slot_)) {}

  void run(const Parallel& parallel) {
    const int64_t work = plan_.chunk * scan_.rows() * 10 * plan_.halves;
    if (plan_.chunks == 1) {
      // A group of rows of the batch is one task: its sums are added in order, and its g stays in a cache.
      const int64_t share = (batch_ + plan_.groups - 1) / plan_.groups;
      parallel(plan_.tiles * plan_.groups, work * share, [&](int64_t begin, int64_t end) {
        std::vector<C> g(static_cast<size_t>(active_ ? plan_.length * kEmaLanes : 0));
        std::vector<C> first_half(static_cast<size_t>(plan_.halves == 2 ? plan_.length * kEmaLanes : 0));
        for (int64_t i = begin; i < end; i++) {
          const int64_t tile = i / plan_.groups, group = i % plan_.groups;
          for (int64_t b = group * batch_ / plan_.groups; b < (group + 1) * batch_ / plan_.groups; b++) {
            first(b * plan_.tiles + tile, 0, sums(tile, group), g.data());
            second(b * plan_.tiles + tile, 0, sums(tile, group), g.data(), first_half.data());
          }
        }
      });
    } else {
      in_chunks(parallel, work);
    }
    each_task(parallel, plan_.halves * plan_.tiles, slots_ * scan_.rows() * kinds_,
              [&](int64_t i) { reduce(i / plan_.tiles, i % plan_.tiles); });
  }

 private:
  void in_chunks(const Parallel& parallel, int64_t work) {
    const int64_t all = rows_ * plan_.chunks, border = plan_.halves * plan_.chunks * scan_.rows();
    std::vector<C> g(static_cast<size_t>(active_ ? rows_ * plan_.length * kEmaLanes : 0));
    const auto g_of = [&](int64_t row) { return active_ ? g.data() + row * plan_.length * kEmaLanes : nullptr; };
    if (plan_.carried()) {
      for (std::vector<C>* borders : {&h_, &v_, &adjoint_}) borders->resize(static_cast<size_t>(rows_ * border));
      each_task(parallel, all, work / 2, [&](int64_t i) {
        for (int64_t half = 0; half < plan_.halves; half++) local(half, i / plan_.chunks, i % plan_.chunks);
      });
      each_task(parallel, rows_, border * 80, [&](int64_t row) {
        for (int64_t half = 0; half < plan_.halves; half++) carry(half, row);
      });
    }
    each_task(parallel, all, work, [&](int64_t i) {
      const int64_t row = i / plan_.chunks, j = i % plan_.chunks;
      first(row, j, sums_in_chunks(row, j), g_of(row));
    });
    if (plan_.carried())
      each_task(parallel, rows_, border * 40, [&](int64_t row) {
        for (int64_t half = 0; half < plan_.halves; half++) carry_adjoint(half, row);
      });
    parallel(all, work / 2, [&](int64_t begin, int64_t end) {
      std::vector<C> first_half(static_cast<size_t>(plan_.halves == 2 ? plan_.chunk * kEmaLanes : 0));
      for (int64_t i = begin; i < end; i++) {
        const int64_t row = i / plan_.chunks, j = i % plan_.chunks;
        second(row, j, sums_in_chunks(row, j), g_of(row), first_half.data());
      }
    });
  }

  // --- sums of the parameters' gradients: [tile][slot], a slot being [half][kind][N][64] and the residual's [64]
  enum Kind { of_c, of_q, of_b, of_q_directly };

  double* sums(int64_t tile, int64_t slot) { return sums_.data() + (tile * slots_ + slot) * slot_; }
  double* sums_in_chunks(int64_t row, int64_t j) {
    return sums(row % plan_.tiles, row / plan_.tiles * plan_.chunks + j);
  }
  double* kind(double* slot, int64_t half, Kind k) const { return slot + (half * kinds_ + k) * scan_.rows(); }
  double* residual_sum(double* slot) const { return slot + plan_.halves * kinds_ * scan_.rows(); }

  // --- what the passes read
  Load cotangent(int64_t row, bool backwards) const {
    return [this, tile = row % plan_.tiles, b = row / plan_.tiles, backwards](int64_t tau, int64_t steps, C* buffer) {
      scan_.load(grad_, grad_strides_, tile, b, tau, steps, backwards, false, buffer);
    };
  }
  // dy act'(z), once the first pass has stored it
  Load activated(int64_t row, bool backwards, const C* g) const {
    return [this, row, backwards, g](int64_t tau, int64_t steps, C* buffer) {
      if (active_)
        scan_.load_rows(g, 0, tau, steps, backwards, buffer);
      else
        cotangent(row, backwards)(tau, steps, buffer);
    };
  }

  EmaGradient<C> gradient(const EmaWeights<C>& w, int64_t tile, C* buffers) const {
    const int64_t n = scan_.rows();
    EmaGradient<C> a{};
    a.decay = w.decay, a.low = w.low, a.in = w.in, a.late_gain = w.late, a.late_slope = w.slope;
    a.g = buffers, a.v = buffers + n, a.last_v = buffers + 2 * n, a.dc = buffers + 3 * n, a.dq = buffers + 4 * n;
    a.lanes = scan_.lanes(tile), a.states = scan_.shape().states;
    return a;
  }

  // --- borders of chunks
  void local(int64_t half, int64_t row, int64_t j) {
    const bool backwards = scan_.reversed(half);
    C *h = scan_.border(h_, half, row, j), *v = scan_.border(v_, half, row, j);
    std::fill(h, h + scan_.rows(), C(0)), std::fill(v, v + scan_.rows(), C(0));
    if (scan_.ordered(plan_.chunks - 1, backwards) == j) return;
    alignas(64) C x[kBlock];
    std::vector<C> buffers(static_cast<size_t>(5 * scan_.rows()));
    EmaGradient<C> a = gradient(scan_.weights(half, row % plan_.tiles), row % plan_.tiles, buffers.data());
    a.x = a.dy = x, a.g = h, a.v = v;
    const auto load = scan_.input(row, backwards);
    for (int64_t tau = scan_.begin(j, backwards), end = scan_.end(j, backwards); tau < end; tau += kEmaSteps) {
      a.steps = std::min(kEmaSteps, end - tau);
      load(tau, a.steps, x);
      scan_.numbers().block().gradient(a);
    }
  }
  void carry(int64_t half, int64_t row) {
    const int64_t tile = row % plan_.tiles, b = row / plan_.tiles;
    std::vector<C> h(static_cast<size_t>(scan_.rows())), v(h.size());
    scan_.first(half, tile, b, h.data());
    scan_.load_state(scan_.parameters().state, tile, b, v.data());
    scan_.carry(half, tile, scan_.reversed(half), h.data(), scan_.border(h_, half, row, 0), v.data(),
                scan_.border(v_, half, row, 0));
  }
  void carry_adjoint(int64_t half, int64_t row) {
    const int64_t tile = row % plan_.tiles;
    std::vector<C> before(static_cast<size_t>(scan_.rows()));
    scan_.load_gradient(grad_state_, tile, row / plan_.tiles, before.data());
    scan_.carry(half, tile, !scan_.reversed(half), before.data(), scan_.border(adjoint_, half, row, 0));
  }

  // --- the first pass
  void first(int64_t row, int64_t j, double* slot, C* g) {
    if (active_ && plan_.halves == 2) both_directions(row, j, g);
    for (int64_t half = 0; half < plan_.halves; half++) {
      parameter_sums(half, row, j, slot, g);
      if (!plan_.carried()) continue;
      const bool backwards = !scan_.reversed(half);
      C* e = scan_.border(adjoint_, half, row, j);
      std::fill(e, e + scan_.rows(), C(0));
      if (scan_.ordered(plan_.chunks - 1, backwards) == j) continue;
      const int64_t tile = row % plan_.tiles;
      scan_.convolve(scan_.adjoint(half, tile), tile, scan_.begin(j, backwards), scan_.end(j, backwards), e, nullptr,
                     activated(row, backwards, g));
    }
  }

  // Loads h before chunk j, and v unless it is null.
  void enter(int64_t half, int64_t row, int64_t j, C* h, C* v) {
    const int64_t tile = row % plan_.tiles, b = row / plan_.tiles;
    if (plan_.carried()) {
      std::copy_n(scan_.border(h_, half, row, j), scan_.rows(), h);
      if (v) std::copy_n(scan_.border(v_, half, row, j), scan_.rows(), v);
    } else {
      scan_.first(half, tile, b, h);
      if (v) scan_.load_state(scan_.parameters().state, tile, b, v);
    }
  }

  // Computes g = dy act'(z) where z takes both directions; meanwhile g holds the first one's sum.
  void both_directions(int64_t row, int64_t j, C* g) {
    const int64_t tile = row % plan_.tiles, lanes = scan_.lanes(tile);
    std::vector<C> h(static_cast<size_t>(scan_.rows()));
    alignas(64) C dy[kBlock];
    for (int64_t half = 0; half < 2; half++) {
      const bool backwards = scan_.reversed(half);
      enter(half, row, j, h.data(), nullptr);
      const auto start = [&](int64_t tau, int64_t steps, C* z) {
        if (half == 1) scan_.load_rows(g, 0, tau, steps, backwards, z);
        return half == 0;
      };
      const auto done = [&](int64_t tau, int64_t steps, C* z, C* x) {
        if (half == 1) {
          if (scan_.residual(tile) && scan_.parameters().mask) scan_.input(row, backwards, false)(tau, steps, x);
          cotangent(row, backwards)(tau, steps, dy);
          kernels<EmaTile<C>>().activate_backward(z, x, scan_.residual(tile), dy, scan_.shape().activation, steps,
                                                  lanes);
        }
        scan_.store_rows(z, g, 0, tau, steps, backwards);
      };
      scan_.convolve(scan_.weights(half, tile), tile, scan_.begin(j, backwards), scan_.end(j, backwards), h.data(),
                     nullptr, scan_.input(row, backwards), start, done);
    }
  }

  void parameter_sums(int64_t half, int64_t row, int64_t j, double* slot, C* g) {
    const int64_t tile = row % plan_.tiles, b = row / plan_.tiles, lanes = scan_.lanes(tile), n = scan_.rows();
    const bool backwards = scan_.reversed(half), here = active_ && plan_.halves == 1;
    const EmaWeights<C> w = scan_.weights(half, tile);
    const EmaBlock<C>& block = scan_.numbers().block();
    alignas(64) C x[kBlock], late[kBlock], raw[kBlock], z[kBlock], dy[kBlock];
    std::vector<C> buffers(static_cast<size_t>(6 * n));
    EmaGradient<C> a = gradient(w, tile, buffers.data());
    EmaConvolution<C> forward{};
    forward.x = x, forward.decay = w.decay, forward.low = w.low, forward.in = w.in, forward.out = w.out,
    forward.late_gain = w.late;
    forward.y = z, forward.g = buffers.data() + 5 * n, forward.start = true, forward.lanes = lanes;
    forward.states = a.states, forward.real = w.real;
    const auto load = scan_.input(row, backwards);
    enter(half, row, j, a.g, a.v);
    const int64_t begin = scan_.begin(j, backwards), end = scan_.end(j, backwards);
    const bool residual = scan_.residual(tile) != nullptr, reload = residual && scan_.parameters().mask != nullptr;
    for (int64_t tau = begin; tau < end; tau += kEmaSteps) {
      if (plan_.truncation > 0 && (tau - begin) % plan_.run == 0) {
        a.x_late = nullptr;
        scan_.warm_up(tau, a.g, a.v, [&](int64_t at, int64_t steps) {
          load(at, steps, x);
          a.x = a.dy = x, a.steps = steps;
          block.gradient(a);
        });
        a.x_late = forward.x_late = late;
      }
      const int64_t steps = forward.steps = std::min(kEmaSteps, end - tau);
      load(tau, steps, x);
      if (forward.x_late) scan_.load_late(tau, steps, load, late);
      if (reload) scan_.input(row, backwards, false)(tau, steps, raw);
      const C* plain = reload ? raw : x;
      if (here) {
        std::copy_n(a.g, n, forward.g);
        block.convolution(forward);
        cotangent(row, backwards)(tau, steps, dy);
        kernels<EmaTile<C>>().activate_backward(z, plain, scan_.residual(tile), dy, scan_.shape().activation, steps,
                                                lanes);
        scan_.store_rows(z, g, 0, tau, steps, backwards);
      } else {
        activated(row, backwards, g)(tau, steps, dy);
      }
      const C* cotangents = here ? z : dy;
      for (int64_t s = 0; s < steps; s += kEmaChain) {
        a.steps = std::min(kEmaChain, steps - s);
        a.x = x + s * kEmaLanes, a.dy = cotangents + s * kEmaLanes;
        if (forward.x_late) a.x_late = late + s * kEmaLanes;
        block.gradient(a);
        kernels<EmaTile<C>>().fold(a.dc, kind(slot, half, of_c), n);
        kernels<EmaTile<C>>().fold(a.dq, kind(slot, half, of_q), n);
      }
      if (residual && half == 0)
        kernels<EmaTile<C>>().add_products(cotangents, plain, residual_sum(slot), steps, lanes);
    }
    if (grad_state_ && scan_.ordered(plan_.chunks - 1, backwards) == j) {
      std::vector<C> last(static_cast<size_t>(n));
      scan_.load_gradient(grad_state_, tile, b, last.data());
      scan_.numbers().add_products(last.data(), a.last_v, kind(slot, half, of_q_directly), a.states);
    }
  }

  // --- the second pass
  void second(int64_t row, int64_t j, double* slot, const C* g, C* first_half) {
    const int64_t tile = row % plan_.tiles, b = row / plan_.tiles, lanes = scan_.lanes(tile);
    const int64_t origin = j * plan_.chunk;
    const uint8_t* mask = scan_.parameters().mask ? scan_.parameters().mask + b * plan_.length : nullptr;
    std::vector<C> own(static_cast<size_t>(scan_.rows()));
    for (int64_t half = 0; half < plan_.halves; half++) {
      const bool backwards = !scan_.reversed(half), closing = half + 1 == plan_.halves;
      C* e = own.data();
      if (plan_.carried())
        e = scan_.border(adjoint_, half, row, j);
      else
        scan_.load_gradient(grad_state_, tile, b, e);
      const auto start = [&](int64_t tau, int64_t steps, C* out) {
        if (half == 1) scan_.load_rows(first_half, origin, tau, steps, backwards, out);
        return half == 0;
      };
      const auto done = [&](int64_t tau, int64_t steps, C* out, C* dy) {
        if (!closing) return scan_.store_rows(out, first_half, origin, tau, steps, backwards);
        kernels<EmaTile<C>>().finish_gradient(out, dy, scan_.residual(tile),
                                              mask ? mask + scan_.time(tau, backwards) : nullptr, backwards ? -1 : 1,
                                              steps, lanes);
        scan_.store(out, dx_, dx_strides_, tile, b, tau, steps, backwards);
      };
      scan_.convolve(scan_.adjoint(half, tile), tile, scan_.begin(j, backwards), scan_.end(j, backwards), e, nullptr,
                     activated(row, backwards, g), start, done, scan_.unit() ? Load() : scan_.input(row, backwards),
                     [&](const C* part) { kernels<EmaTile<C>>().fold(part, kind(slot, half, of_b), scan_.rows()); });
      if (gradients_.state && scan_.ordered(plan_.chunks - 1, backwards) == j)
        scan_.store_gradient(e, tile, b, gradients_.state);
    }
  }

  // --- the parameters' gradients
  void reduce(int64_t half, int64_t tile) {
    const int64_t n = scan_.rows(), m = scan_.channels(tile);
    std::vector<double> total(static_cast<size_t>(4 * n));
    for (int64_t k = 0; k < slots_; k++) {
      const double* from = kind(sums(tile, k), half, of_c);
      for (int64_t i = 0; i < kinds_ * n; i++) total[static_cast<size_t>(i)] += from[i];
    }
    const double* kinds = total.data();
    scan_.numbers().finish(scan_.parameters(), half * scan_.shape().channels + tile * kEmaLanes, m,
                           scan_.shape().states, scan_.unit(), kinds + of_c * n, kinds + of_q * n, kinds + of_b * n,
                           kinds + of_q_directly * n, gradients_);
    if (half == 0 && gradients_.residual)
      for (int64_t j = 0; j < m; j++) {
        double sum = 0;
        for (int64_t k = 0; k < slots_; k++) sum += residual_sum(sums(tile, k))[j];
        gradients_.residual[tile * kEmaLanes + j] = static_cast<C>(sum);
      }
  }

  Scan scan_;
  const EmaPlan& plan_;
  const void* grad_;
  EmaStrides grad_strides_;
  const C* grad_state_;
  void* dx_;
  EmaStrides dx_strides_;
  EmaGradients<C> gradients_;
  int64_t batch_, rows_;
  bool active_;
  int64_t kinds_, slot_, slots_;
  std::vector<double> sums_;
  std::vector<C> h_, v_, adjoint_;  // [half][row][chunk][N][64]: before each chunk, in the order of its scan
};

bool empty(const EmaShape& s) { return s.length == 0 || s.batch == 0 || s.channels == 0; }
int64_t state_size(const EmaShape& s) { return s.batch * s.channels * s.states * (s.complex ? 2 : 1); }

template <typename T>
void forward(const EmaShape& shape, const EmaParameters<compute_t<T>>& parameters, const T* x, EmaStrides xs, T* y,
             EmaStrides ys, compute_t<T>* final_state, const Parallel& parallel) {
  if (empty(shape)) {
    for (int64_t i = 0; final_state && i < state_size(shape); i++)
      final_state[i] = parameters.state ? parameters.state[i] : 0;
    return;
  }
  Forward<compute_t<T>>(shape, parameters, kernels<EmaTensor<T>>().copies, x, xs, y, ys, final_state, parallel)
      .run(parallel);
}

template <typename T>
void backward(const EmaShape& shape, const EmaParameters<compute_t<T>>& parameters, const T* x, EmaStrides xs,
              const T* grad, EmaStrides grad_strides, const compute_t<T>* grad_state, T* dx, EmaStrides dx_strides,
              const EmaGradients<compute_t<T>>& gradients, const Parallel& parallel) {
  if (empty(shape)) {
    const int64_t rows = shape.channels * (shape.direction == EmaDirection::bidirectional ? 2 : 1);
    const int64_t all = rows * shape.states;
    std::fill_n(gradients.damping, all, 0), std::fill_n(gradients.decay, all, 0);
    std::fill_n(gradients.expansion, shape.complex ? rows : all, 0);
    std::fill_n(gradients.projection, shape.complex ? 2 * all : all, 0);
    if (gradients.residual) std::fill_n(gradients.residual, shape.channels, 0);
    for (int64_t i = 0; gradients.state && i < state_size(shape); i++)
      gradients.state[i] = grad_state ? grad_state[i] : 0;
    return;
  }
  Backward<compute_t<T>>(shape, parameters, kernels<EmaTensor<T>>().copies, x, xs, grad, grad_strides, grad_state, dx,
                         dx_strides, gradients, parallel)
      .run(parallel);
}

}  // namespace

FASTASR_KERNELS(EmaScanKernels, .forward = forward<T>, .backward = backward<T>)

}  // namespace fastasr::cpu
