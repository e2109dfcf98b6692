// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv/conv_subsampling.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/simd/vectors.simd.h"

// A block of output frames is worked through stripe by stripe: a stripe is one vector of channels. Three rows of h, in
// the backward pass of dh as well, go through a ring in the first cache, with zeros where the second convolution is
// padded: h itself is never in memory. x is small, and its numbers are multiplied with vectors of weights in registers.
namespace fastasr::cpu {
namespace {

constexpr int kPixels = kRegisters == 32 ? 8 : 4;  // Their sums fit beside nine vectors of weights.
constexpr int64_t kChainPixels = 16;               // products added up in floats, then in double

// Vectors with the alignment of their type, cleared.
template <typename C>
class Vectors {
 public:
  explicit Vectors(int64_t n) : memory_(static_cast<size_t>(n)) {}
  Vector<C>* operator[](int64_t i) { return &memory_[static_cast<size_t>(i)].v; }

 private:
  struct Memory {
    Vector<C> v;
  };
  std::vector<Memory> memory_;
};

// Lanes [0, n) of the elements at p, 0 in the others.
template <typename C, typename T>
FASTASR_INLINE Vector<C> read(const T* p, int64_t n) {
  constexpr int64_t kLanes = Lanes<C>::count;
  alignas(64) C lanes[kLanes] = {};
  copy_row<kLanes>(p, lanes, n);
  return at(lanes);
}
template <typename C, typename T>
FASTASR_INLINE void write(T* p, Vector<C> v, int64_t n) {
  constexpr int64_t kLanes = Lanes<C>::count;
  alignas(64) C lanes[kLanes];
  put(lanes, v);
  copy_row<kLanes>(lanes, p, n);
}

template <typename C>
FASTASR_INLINE void add_to(double* sums, Vector<C> v) {
  constexpr int64_t kLanes = Lanes<C>::count;
  alignas(64) C lanes[kLanes];
  put(lanes, v);
#pragma omp simd
  for (int64_t c = 0; c < kLanes; c++) sums[c] += static_cast<double>(lanes[c]);
}

// The taps and biases of one stripe.
template <typename C>
struct Taps {
  Vector<C> first[9], bias, second[9], second_bias;
};

template <typename T, typename C = compute_t<T>>
std::vector<Taps<C>> pack(const SubsamplingSizes& s, const SubsamplingInputs<T>& in) {
  constexpr int64_t kLanes = Lanes<C>::count;
  std::vector<Taps<C>> packed(static_cast<size_t>((s.channels + kLanes - 1) / kLanes));
  for (int64_t c = 0; c < s.channels; c++) {
    Taps<C>& to = packed[static_cast<size_t>(c / kLanes)];
    const int64_t lane = c % kLanes;
    for (int64_t k = 0; k < 9; k++) {
      to.first[k][lane] = load(in.weight[9 * c + k]);
      to.second[k][lane] = load(in.depthwise_weight[9 * c + k]);
    }
    to.bias[lane] = in.bias ? load(in.bias[c]) : C(0);
    to.second_bias[lane] = in.depthwise_bias ? load(in.depthwise_bias[c]) : C(0);
  }
  return packed;
}

// Computes N pixels of a row of y, from pixel f on, from three rows of x: numbers that all channels share, or vectors.
template <int N, bool kRelu, typename C, typename X>
FASTASR_INLINE void pixels(const X* const* x, int64_t f, const Vector<C>* w, Vector<C> bias, Vector<C>* y) {
  Vector<C> a[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) a[n] = bias;
#pragma GCC unroll 3
  for (int i = 0; i < 3; i++)
#pragma GCC unroll 3
    for (int j = 0; j < 3; j++)
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) a[n] += w[3 * i + j] * x[i][2 * (f + n) + j];
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) y[f + n] = kRelu && a[n] <= C(0) ? Vector<C>{} : a[n];  // a NaN stays
}
// It is a function of its own, as are those below: inlined into a larger one, the compiler keeps vectors on the stack.
template <int N, bool kRelu, typename C, typename X>
__attribute__((noinline)) void convolve(const X* const* x, const Vector<C>* taps, Vector<C> bias, int64_t width,
                                        Vector<C>* y) {
  Vector<C> w[9];
#pragma GCC unroll 9
  for (int k = 0; k < 9; k++) w[k] = taps[k];
  int64_t f = 0;
  for (; f + N <= width; f += N) pixels<N, kRelu, C>(x, f, w, bias, y);
  for (; f < width; f++) pixels<1, kRelu, C>(x, f, w, bias, y);
}

// Adds a row's share to the gradients of a convolution: sums (10, lanes). gradient(f) is that of pixel f, which comes
// from three rows of x.
template <typename C, typename X>
FASTASR_INLINE void row_sums(const X* const* x, int64_t width, double* sums, const auto& gradient) {
  constexpr int64_t kLanes = Lanes<C>::count;
  for (int64_t from = 0; from < width; from += kChainPixels) {
    Vector<C> a[9] = {}, bias = {};
    for (int64_t f = from; f < std::min(from + kChainPixels, width); f++) {
      const Vector<C> g = gradient(f);
      bias += g;
#pragma GCC unroll 3
      for (int i = 0; i < 3; i++)
#pragma GCC unroll 3
        for (int j = 0; j < 3; j++) a[3 * i + j] += g * x[i][2 * f + j];
    }
    for (int k = 0; k < 9; k++) add_to<C>(sums + k * kLanes, a[k]);
    add_to<C>(sums + 9 * kLanes, bias);
  }
}

template <typename C>
__attribute__((noinline)) void second_sums(const Vector<C>* const* h, const Vector<C>* g, int64_t width, double* sums) {
  row_sums<C>(h, width, sums, [&](int64_t f) { return g[f]; });
}

// Writes the share of an output frame to row i of dh, or adds it.
template <bool kAdd, typename C>
__attribute__((noinline)) void spread(const Vector<C>* g, const Vector<C>* v, int64_t width, Vector<C>* dh) {
  const Vector<C> v0 = v[0], v1 = v[1], v2 = v[2];
  Vector<C> before = {};
  for (int64_t f = 0; f < width; f++) {
    const Vector<C> even = v0 * g[f] + v2 * before, odd = v1 * g[f];
    dh[2 * f] = kAdd ? dh[2 * f] + even : even;
    dh[2 * f + 1] = kAdd ? dh[2 * f + 1] + odd : odd;
    before = g[f];
  }
  dh[2 * width] = kAdd ? dh[2 * width] + v2 * before : v2 * before;
}

// Turns a row of dh into dz as well.
template <typename C>
__attribute__((noinline)) void first_sums(const C* x, int64_t bins, const Vector<C>* h, Vector<C>* dh, int64_t width,
                                          double* sums) {
  const C* const rows[] = {x, x + bins, x + 2 * bins};
  row_sums<C>(rows, width, sums, [&](int64_t f) { return dh[f] = h[f] <= C(0) ? Vector<C>{} : dh[f]; });
}

// Adds a row of dz to the three rows of dx that it comes from.
template <typename C>
__attribute__((noinline)) void add_dx(const Vector<C>* dz, const Taps<C>& taps, int64_t width, int64_t bins,
                                      double* dx) {
  for (int64_t f = 0; f < width; f++)
    for (int64_t k = 0; k < 9; k++) {
      const Vector<C> products = dz[f] * taps.first[k];
      double sum = 0;
      for (int64_t c = 0; c < Lanes<C>::count; c++) sum += static_cast<double>(products[c]);
      dx[k / 3 * bins + 2 * f + k % 3] += sum;
    }
}

// One stripe of one block: its rows of x, and a ring of rows of h.
template <typename T>
class Block {
 public:
  using C = compute_t<T>;

  Block(const SubsamplingSizes& s, const SubsamplingInputs<T>& in)
      : s_(s), in_(in), columns_(2 * s.out_width() + 1), h_(3 * columns_) {
    if constexpr (!std::is_same_v<T, C>) copy_.resize(static_cast<size_t>(kSubsamplingRows * s.bins));
  }

  // Starts with the block of this number.
  void start(int64_t block) {
    const int64_t blocks = (s_.out_frames() + kSubsamplingFrames - 1) / kSubsamplingFrames;
    b_ = block / blocks, first_ = block % blocks * kSubsamplingFrames;
    last_ = std::min(first_ + kSubsamplingFrames, s_.out_frames());
    const T* x = in_.x + (b_ * s_.frames + 4 * first_) * s_.bins;
    if constexpr (std::is_same_v<T, C>) {
      x_ = x;
    } else {
      convert(x, copy_.data(), (4 * (last_ - first_) + 3) * s_.bins);
      x_ = copy_.data();
    }
  }
  int64_t sequence() const { return b_; }
  int64_t first() const { return first_; }
  int64_t last() const { return last_; }

  // Returns the three rows of x behind row r of h.
  const C* x(int64_t r) const { return x_ + 2 * (r - 2 * first_) * s_.bins; }
  bool kept(int64_t r) const { return !in_.mask || in_.mask[b_ * s_.first_frames() + r]; }
  Vector<C>* row(int64_t r) { return h_[r % 3 * columns_]; }

  // Computes rows [from, to) of h.
  void compute(int64_t from, int64_t to, const Taps<C>& taps) {
    for (int64_t r = from; r < to; r++) {
      Vector<C>* h = row(r) + s_.left;
      if (!kept(r)) {
        std::fill(h, h + s_.first_width(), Vector<C>{});
        continue;
      }
      const C* const rows[] = {x(r), x(r) + s_.bins, x(r) + 2 * s_.bins};
      convolve<kPixels, true, C>(rows, taps.first, taps.bias, s_.first_width(), h);
    }
  }

 private:
  const SubsamplingSizes& s_;
  const SubsamplingInputs<T>& in_;
  int64_t columns_, b_ = 0, first_ = 0, last_ = 0;
  Vectors<C> h_;
  std::vector<C> copy_;
  const C* x_ = nullptr;
};

template <typename T>
void forward(const SubsamplingSizes& s, const SubsamplingInputs<T>& in, T* y, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t kLanes = Lanes<C>::count;
  const int64_t width = s.out_width();
  const std::vector<Taps<C>> packed = pack(s, in);
  Block<T> block(s, in);
  Vectors<C> out(width);
  for (int64_t i = begin; i < end; i++) {
    block.start(i);
    // A stripe writes one vector of each pixel. It takes two to four times as long to write it to memory that is not in
    // the cache than to what this pass from the first byte to the last has brought there.
    T* const written = y + (block.sequence() * s.out_frames() + block.first()) * width * s.channels;
    std::memset(written, 0, sizeof(T) * static_cast<size_t>((block.last() - block.first()) * width * s.channels));
    for (int64_t c = 0; c < s.channels; c += kLanes) {
      const Taps<C>& taps = packed[static_cast<size_t>(c / kLanes)];
      const int64_t n = std::min(kLanes, s.channels - c);
      block.compute(2 * block.first(), 2 * block.first() + 1, taps);
      for (int64_t t = block.first(); t < block.last(); t++) {
        block.compute(2 * t + 1, 2 * t + 3, taps);
        const Vector<C>* const h[] = {block.row(2 * t), block.row(2 * t + 1), block.row(2 * t + 2)};
        convolve<4, false, C>(h, taps.second, taps.second_bias, width, out[0]);
        T* to = y + (block.sequence() * s.out_frames() + t) * width * s.channels + c;
        for (int64_t f = 0; f < width; f++) write<C>(to + f * s.channels, *out[f], n);
      }
    }
  }
}

template <typename T>
void backward(const SubsamplingSizes& s, const SubsamplingInputs<T>& in, const T* grad, double* parts, double* dx_parts,
              int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t kLanes = Lanes<C>::count;
  const int64_t width = s.out_width(), first_width = s.first_width(), columns = 2 * width + 1;
  const int64_t all = subsampling_blocks(s), groups = subsampling_groups(s);
  const std::vector<Taps<C>> packed = pack(s, in);
  Block<T> block(s, in);
  Vectors<C> g(width), dh(3 * columns);
  alignas(64) double sums[kSubsamplingSums * kLanes];
  for (int64_t group = begin; group < end; group++) {
    double* part = parts + group * kSubsamplingSums * s.channels;
    std::fill(part, part + kSubsamplingSums * s.channels, 0.0);
    for (int64_t i = all * group / groups; i < all * (group + 1) / groups; i++) {
      block.start(i);
      double* dx = dx_parts ? dx_parts + i * kSubsamplingRows * s.bins : nullptr;
      if (dx) std::fill(dx, dx + kSubsamplingRows * s.bins, 0.0);
      for (int64_t c = 0; c < s.channels; c += kLanes) {
        const Taps<C>& taps = packed[static_cast<size_t>(c / kLanes)];
        const int64_t n = std::min(kLanes, s.channels - c);
        std::fill(sums, sums + kSubsamplingSums * kLanes, 0.0);
        const auto finish = [&](int64_t r) {  // row r of dh is complete
          if (!block.kept(r)) return;
          Vector<C>* dz = dh[r % 3 * columns + s.left];
          first_sums<C>(block.x(r), s.bins, block.row(r) + s.left, dz, first_width, sums);
          if (dx) add_dx<C>(dz, taps, first_width, s.bins, dx + 2 * (r - 2 * block.first()) * s.bins);
        };
        const int64_t start = 2 * block.first();
        block.compute(start, start + 1, taps);
        std::fill(dh[start % 3 * columns], dh[start % 3 * columns] + columns, Vector<C>{});
        for (int64_t t = block.first(); t < block.last(); t++) {
          block.compute(2 * t + 1, 2 * t + 3, taps);
          const T* from = grad + (block.sequence() * s.out_frames() + t) * width * s.channels + c;
          for (int64_t f = 0; f < width; f++) *g[f] = read<C>(from + f * s.channels, n);
          const Vector<C>* const h[] = {block.row(2 * t), block.row(2 * t + 1), block.row(2 * t + 2)};
          second_sums<C>(h, g[0], width, sums + 10 * kLanes);
          spread<true, C>(g[0], taps.second, width, dh[2 * t % 3 * columns]);
          spread<false, C>(g[0], taps.second + 3, width, dh[(2 * t + 1) % 3 * columns]);
          spread<false, C>(g[0], taps.second + 6, width, dh[(2 * t + 2) % 3 * columns]);
          finish(2 * t);
          finish(2 * t + 1);
        }
        finish(2 * block.last());
        for (int64_t k = 0; k < kSubsamplingSums; k++)
          for (int64_t j = 0; j < n; j++) part[k * s.channels + c + j] += sums[k * kLanes + j];
      }
    }
  }
}

template <typename T>
void reduce(const SubsamplingSizes& s, const double* parts, T* dweight, T* dbias, T* ddepthwise_weight,
            T* ddepthwise_bias) {
  using C = compute_t<T>;
  const int64_t n = kSubsamplingSums * s.channels, groups = subsampling_groups(s);
  std::vector<double> sum(static_cast<size_t>(n));
  for (int64_t g = 0; g < groups; g++)
    for (int64_t i = 0; i < n; i++) sum[static_cast<size_t>(i)] += parts[g * n + i];
  for (int64_t c = 0; c < s.channels; c++) {
    const auto of = [&](int64_t k) { return static_cast<C>(sum[static_cast<size_t>(k * s.channels + c)]); };
    for (int64_t k = 0; k < 9; k++) store(&dweight[9 * c + k], of(k)), store(&ddepthwise_weight[9 * c + k], of(10 + k));
    store(&dbias[c], of(9)), store(&ddepthwise_bias[c], of(19));
  }
}

template <typename T>
void add_blocks(const SubsamplingSizes& s, const double* dx_parts, T* dx, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t blocks = (s.out_frames() + kSubsamplingFrames - 1) / kSubsamplingFrames;
  std::vector<double> sum(static_cast<size_t>(s.frames * s.bins));
  for (int64_t b = begin; b < end; b++) {
    std::fill(sum.begin(), sum.end(), 0.0);
    for (int64_t block = 0; block < blocks; block++) {
      const double* part = dx_parts + (b * blocks + block) * kSubsamplingRows * s.bins;
      const int64_t from = 4 * block * kSubsamplingFrames * s.bins;
      const int64_t n = std::min(kSubsamplingRows * s.bins, s.frames * s.bins - from);
      for (int64_t i = 0; i < n; i++) sum[static_cast<size_t>(from + i)] += part[i];
    }
    T* to = dx + b * s.frames * s.bins;
    for (size_t i = 0; i < sum.size(); i++) store(&to[i], static_cast<C>(sum[i]));
  }
}

}  // namespace

FASTASR_KERNELS(ConvSubsamplingKernels, .forward = forward<T>, .backward = backward<T>, .reduce = reduce<T>,
                .add_blocks = add_blocks<T>)

}  // namespace fastasr::cpu
