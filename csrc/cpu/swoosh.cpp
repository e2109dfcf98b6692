// SPDX-License-Identifier: Apache-2.0
#include "cpu/swoosh.h"

#include "cpu/elementary.h"
#include "cpu/softplus_avx512.h"

namespace fastasr::cpu {
namespace {

template <typename C>
struct Constants {
  C shift, offset;
};

template <typename C>
FASTASR_INLINE Constants<C> constants(Swoosh kind) {
  return kind == Swoosh::L ? Constants<C>{C(4), C(0.035)} : Constants<C>{C(1), C(0.313261687)};
}

// log(1 + e^z) = max(z, 0) + log1p(e^-|z|): no overflow; a NaN survives in the term -0.08 x.
template <typename C>
FASTASR_INLINE C swoosh(C x, C u, C z, C offset) {
  return ((z > 0 ? z : C(0)) + log1p_unit(u)) - (C(0.08) * x + offset);
}

template <typename C>
FASTASR_INLINE C derivative(C u, C z) {
  return (z > 0 ? C(1) : u) / (C(1) + u) - C(0.08);
}

template <typename T, Mask kMask>
FASTASR_INLINE void forward_body(const T* __restrict x, const T* __restrict mask, T* __restrict y, int64_t n,
                                 Swoosh kind) {
  using C = compute_t<T>;
  const Constants<C> k = constants<C>(kind);
  const C scalar = kMask == Mask::scalar ? load(mask[0]) : C(1);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const C v = load(x[i]), z = v - k.shift;
    C out = swoosh(v, exp_nonpositive(-std::fabs(z)), z, k.offset);
    if (kMask == Mask::scalar) out *= scalar;
    if (kMask == Mask::elementwise) out *= load(mask[i]);
    store(&y[i], out);
  }
}

#ifdef FASTASR_AVX512
template <typename T, Mask kMask>
FASTASR_AVX512_INLINE void forward16(const avx512::Registers& table, const T* x, const T* mask, T* y, __mmask16 lanes,
                                     __m512 scalar, const Constants<float>& k) {
  const __m512 v = avx512::load16(x, lanes), z = _mm512_sub_ps(v, _mm512_set1_ps(k.shift));
  const __m512 softplus = _mm512_add_ps(avx512::softplus_tail(table, z), _mm512_max_ps(z, _mm512_setzero_ps()));
  __m512 out = _mm512_add_ps(softplus, _mm512_fmadd_ps(v, _mm512_set1_ps(-0.08f), _mm512_set1_ps(-k.offset)));
  if (kMask == Mask::scalar) out = _mm512_mul_ps(out, scalar);
  if (kMask == Mask::elementwise) out = _mm512_mul_ps(out, avx512::load16(mask, lanes));
  avx512::store16(y, lanes, out);
}

template <typename T, Mask kMask>
FASTASR_AVX512_TARGET void forward_avx512(const T* x, const T* mask, T* y, int64_t n, Swoosh kind) {
  const Constants<float> k = constants<float>(kind);
  const avx512::Registers table = avx512::load_table();
  const __m512 scalar = _mm512_set1_ps(kMask == Mask::scalar ? load(mask[0]) : 1.0f);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)  // a constant mask: the compiler drops it
    forward16<T, kMask>(table, x + i, kMask == Mask::elementwise ? mask + i : mask, y + i, 0xffff, scalar, k);
  if (i < n)
    forward16<T, kMask>(table, x + i, kMask == Mask::elementwise ? mask + i : mask, y + i,
                        static_cast<__mmask16>((1u << (n - i)) - 1), scalar, k);
}

template <Mask kMask, typename T>
bool forward_table(const T* x, const T* mask, T* y, int64_t n, Swoosh kind) {
  if (!avx512::available()) return false;
  forward_avx512<T, kMask>(x, mask, y, n, kind);
  return true;
}
#else
template <Mask kMask, typename T>
bool forward_table(const T*, const T*, T*, int64_t, Swoosh) {
  return false;
}
#endif

template <Mask kMask>
bool forward_table(const double*, const double*, double*, int64_t, Swoosh) {
  return false;
}

// dx may be the same memory as grad: each element is read before it is written.
template <typename T, Mask kMask, bool kOutput>
FASTASR_INLINE void backward_body(const T* grad, const T* __restrict x, const T* __restrict mask, T* dx,
                                  T* __restrict y, int64_t n, Swoosh kind) {
  using C = compute_t<T>;
  const Constants<C> k = constants<C>(kind);
  const C scalar = kMask == Mask::scalar ? load(mask[0]) : C(1);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const C v = load(x[i]), z = v - k.shift;
    const C u = exp_nonpositive(-std::fabs(z));
    C d = derivative(u, z);
    C out = kOutput ? swoosh(v, u, z, k.offset) : C(0);
    const C m = kMask == Mask::elementwise ? load(mask[i]) : scalar;
    if (kMask != Mask::none) {
      d *= m;
      out *= m;
    }
    store(&dx[i], load(grad[i]) * d);
    if (kOutput) store(&y[i], out);
  }
}

}  // namespace

// A function of its own for each (type, mask, output): several bodies in one function spill.
#define FASTASR_FORWARD(T, KIND)                                                                              \
  FASTASR_CLONES static void forward_clones_##KIND(const T* x, const T* mask, T* y, int64_t n, Swoosh kind) { \
    forward_body<T, Mask::KIND>(x, mask, y, n, kind);                                                         \
  }                                                                                                           \
  static void forward_##KIND(const T* x, const T* mask, T* y, int64_t n, Swoosh kind) {                       \
    if (!forward_table<Mask::KIND>(x, mask, y, n, kind)) forward_clones_##KIND(x, mask, y, n, kind);          \
  }
#define FASTASR_BACKWARD(T, KIND)                                                                                     \
  FASTASR_CLONES static void backward_##KIND(const T* grad, const T* x, const T* mask, T* dx, int64_t n,              \
                                             Swoosh kind) {                                                           \
    backward_body<T, Mask::KIND, false>(grad, x, mask, dx, static_cast<T*>(nullptr), n, kind);                        \
  }                                                                                                                   \
  FASTASR_CLONES static void backward_output_##KIND(const T* grad, const T* x, const T* mask, T* dx, T* y, int64_t n, \
                                                    Swoosh kind) {                                                    \
    backward_body<T, Mask::KIND, true>(grad, x, mask, dx, y, n, kind);                                                \
  }

#define FASTASR_DEFINE(T)                                                                                \
  FASTASR_FORWARD(T, none)                                                                               \
  FASTASR_FORWARD(T, scalar)                                                                             \
  FASTASR_FORWARD(T, elementwise)                                                                        \
  FASTASR_BACKWARD(T, none)                                                                              \
  FASTASR_BACKWARD(T, scalar)                                                                            \
  FASTASR_BACKWARD(T, elementwise)                                                                       \
  void swoosh_forward(const T* x, const T* mask, Mask mask_kind, T* y, int64_t n, Swoosh kind) {         \
    if (mask_kind == Mask::none) return forward_none(x, mask, y, n, kind);                               \
    if (mask_kind == Mask::scalar) return forward_scalar(x, mask, y, n, kind);                           \
    forward_elementwise(x, mask, y, n, kind);                                                            \
  }                                                                                                      \
  void swoosh_backward(const T* grad, const T* x, const T* mask, Mask mask_kind, T* dx, T* y, int64_t n, \
                       Swoosh kind) {                                                                    \
    if (y == nullptr) {                                                                                  \
      if (mask_kind == Mask::none) return backward_none(grad, x, mask, dx, n, kind);                     \
      if (mask_kind == Mask::scalar) return backward_scalar(grad, x, mask, dx, n, kind);                 \
      return backward_elementwise(grad, x, mask, dx, n, kind);                                           \
    }                                                                                                    \
    if (mask_kind == Mask::none) return backward_output_none(grad, x, mask, dx, y, n, kind);             \
    if (mask_kind == Mask::scalar) return backward_output_scalar(grad, x, mask, dx, y, n, kind);         \
    backward_output_elementwise(grad, x, mask, dx, y, n, kind);                                          \
  }

FASTASR_DEFINE(float)
FASTASR_DEFINE(double)
FASTASR_DEFINE(bfloat16)
FASTASR_DEFINE(float16)

}  // namespace fastasr::cpu
