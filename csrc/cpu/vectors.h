// SPDX-License-Identifier: Apache-2.0
// Vectors of one instruction set: included by kernels once per set, inside a namespace of its own (no include guard;
// see each_instruction_set.h).

#define FASTASR_VECTOR_INLINE static inline __attribute__((always_inline))

template <typename C>
struct Bits;
template <>
struct Bits<float> {
  using integer = int32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float magic = 12582912.0f;  // 1.5 2^23: adding it rounds and leaves an integer in the low bits
};
template <>
struct Bits<double> {
  using integer = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double magic = 6755399441055744.0;
};

template <typename C>
struct Lanes {
  using integer = typename Bits<C>::integer;
  static constexpr int count = FASTASR_VECTOR_BYTES / static_cast<int>(sizeof(C));
  typedef C vector __attribute__((vector_size(FASTASR_VECTOR_BYTES)));
  typedef integer bits __attribute__((vector_size(FASTASR_VECTOR_BYTES)));
  typedef C memory __attribute__((vector_size(FASTASR_VECTOR_BYTES), aligned(sizeof(C)), may_alias));
};
template <typename C>
using Vector = typename Lanes<C>::vector;
template <typename C>
using BitVector = typename Lanes<C>::bits;

template <typename C>
FASTASR_VECTOR_INLINE Vector<C> vector_of(C v) {
  return v - Vector<C>{};
}
template <typename C>
FASTASR_VECTOR_INLINE Vector<C> at(const C* p) {
  return *reinterpret_cast<const typename Lanes<C>::memory*>(p);
}
template <typename C>
FASTASR_VECTOR_INLINE void put(C* p, Vector<C> v) {
  *reinterpret_cast<typename Lanes<C>::memory*>(p) = v;
}
