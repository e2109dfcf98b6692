// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/dropout.h"

#include <cstring>

#include "bindings/dispatch.h"

namespace fastasr::bindings::dropout {
namespace {

// The layout of torch's CPU generator in torch.get_rng_state(): seed (8 bytes), words left in the block and one more
// (4), a flag (4), words used up (8), the block with 8 bytes per word, and numbers of the normal distribution.
class GeneratorState {
 public:
  explicit GeneratorState(const Tensor& state, const char* op) {
    check(dtype_of(state) == ScalarType::Byte && state.is_contiguous() && state.numel() == kBytes, op,
          "generator is no state of torch's");
    bytes_ = mutable_data<unsigned char>(state);
    const auto left = get<int32_t>(kLeft);
    const auto given = static_cast<int64_t>(get<uint64_t>(kGiven));
    check(left >= 1 && left <= cpu::kTwisterWords && given >= 0 && given <= cpu::kTwisterWords &&
              (left + given == cpu::kTwisterWords + 1 || left == 1),
          op, "generator is no state of torch's");
    generator.given = cpu::kTwisterWords + 1 - left;
    for (size_t i = 0; i < static_cast<size_t>(cpu::kTwisterWords); i++)
      generator.state[i] = static_cast<uint32_t>(get<uint64_t>(kWords + 8 * i));
  }
  void put_back() {
    put(kLeft, static_cast<int32_t>(cpu::kTwisterWords + 1 - generator.given));
    put(kGiven, static_cast<uint64_t>(generator.given));
    for (size_t i = 0; i < static_cast<size_t>(cpu::kTwisterWords); i++)
      put(kWords + 8 * i, static_cast<uint64_t>(generator.state[i]));
  }
  cpu::Twister generator;

 private:
  static constexpr int64_t kBytes = 5056;
  static constexpr size_t kLeft = 8, kGiven = 16, kWords = 24;
  template <typename T>
  T get(size_t at) const {
    T value;
    std::memcpy(&value, bytes_ + at, sizeof(T));
    return value;
  }
  template <typename T>
  void put(size_t at, T value) {
    std::memcpy(bytes_ + at, &value, sizeof(T));
  }
  unsigned char* bytes_;
};

Tensor new_mask(const Tensor& like, const Tensor& bytes) {
  // of the generator's dtype, which is that of the mask
  return new_contiguous(bytes, {like.numel()});
}

const cpu::DropoutKernels& kernels() { return cpu::kernels<cpu::DropoutKernels>(); }

void check_probability(double p, const char* op) { check(p > 0 && p < 1, op, "p is not in (0, 1)"); }

float scale_of(double p) { return 1.0f / static_cast<float>(1 - p); }

void apply(const Tensor& x, const Tensor& keep, double p, const Optional& residual, const Tensor& y) {
  const auto& kernel = kernels();
  const float *from = data<float>(x), *add = data_or_null<float>(residual);
  const auto* mask = data<uint8_t>(keep);
  auto* to = mutable_data<float>(y);
  parallel_range(x.numel(), kGrain, [&](int64_t b, int64_t e) {
    kernel.apply(from + b, mask + b, scale_of(p), add ? add + b : nullptr, to + b, e - b);
  });
}

// Returns x plus residual, with each element of x set to 0 with probability p or divided by 1 - p; and a mask of the
// kept. It advances the generator's state in place.
std::tuple<Tensor, Tensor> dropout_forward(const Tensor& x, const Optional& residual, Tensor generator, double p) {
  const char* op = "dropout_forward";
  check_like(x, x, op, "x");
  check(dtype_of(x) == ScalarType::Float, op, "x is not float32");
  if (residual) check_same_size(*residual, x, op, "residual");
  check_probability(p, op);
  GeneratorState state(generator, op);
  Tensor y = new_like(x), keep = new_mask(x, generator);
  kernels().draw(state.generator, 1 - p, x.numel(), mutable_data<uint8_t>(keep));
  state.put_back();
  apply(x, keep, p, residual, y);
  return {y, keep};
}

// Draws which elements of a tensor like `like` dropout keeps.
Tensor dropout_keep(const Tensor& like, Tensor generator, double p) {
  const char* op = "dropout_keep";
  check_like(like, like, op, "like");
  check_probability(p, op);
  GeneratorState state(generator, op);
  Tensor keep = new_mask(like, generator);
  kernels().draw(state.generator, 1 - p, like.numel(), mutable_data<uint8_t>(keep));
  state.put_back();
  return keep;
}

Tensor dropout_backward(const Tensor& grad, const Tensor& keep, double p) {
  const char* op = "dropout_backward";
  check_like(grad, grad, op, "grad");
  check(dtype_of(grad) == ScalarType::Float && dtype_of(keep) == ScalarType::Byte && keep.is_contiguous() &&
            keep.numel() == grad.numel(),
        op, "grad and keep");
  check_probability(p, op);
  Tensor dx = new_like(grad);
  apply(grad, keep, p, {}, dx);
  return dx;
}

// Returns factors of dropout for the weights that are seen, (sequences, queries, lanes) like `like`: of `sequences`
// dense (queries, keys) tensors of draws those at columns `places` (queries, lanes) of each row.
Tensor dropout_windows(const Tensor& like, const Tensor& places, Tensor generator, int64_t sequences, int64_t keys,
                       double p) {
  const char* op = "dropout_windows";
  check(dtype_of(like) == ScalarType::Float, op, "not float32");
  check(places.dim() == 2 && dtype_of(places) == ScalarType::Long && places.is_contiguous(), op, "places");
  check(sequences >= 0 && keys >= 0, op, "sizes");
  check_probability(p, op);
  const int64_t queries = places.size(0), lanes = places.size(1);
  const auto* at = data<int64_t>(places);
  for (int64_t i = 0; i < queries * lanes; i++) check(at[i] >= 0 && at[i] < keys, op, "places");
  GeneratorState state(generator, op);
  Tensor out = new_contiguous(like, {sequences, queries, lanes});
  std::vector<uint8_t> keep(static_cast<size_t>(keys));
  auto* to = mutable_data<float>(out);
  for (int64_t row = 0; row < sequences * queries; row++, to += lanes)
    kernels().picked(state.generator, 1 - p, keys, at + row % queries * lanes, lanes, scale_of(p), keep.data(), to);
  state.put_back();
  return out;
}

}  // namespace

FASTASR_UNDECLARED(
    "fastasr/ops/_dropout.py calls it in a node of autograd, for plain tensors; random numbers have no formula",
    FASTASR_TYPED(dropout_forward), FASTASR_TYPED(dropout_keep), FASTASR_TYPED(dropout_backward),
    FASTASR_TYPED(dropout_windows))

}  // namespace fastasr::bindings::dropout
