// SPDX-License-Identifier: Apache-2.0
// Transposition and sums of vectors in registers, after cpu/vectors.h (no include guard; see each_instruction_set.h).

template <typename C, int kBit, bool kHigh, size_t... kJ>
FASTASR_VECTOR_INLINE constexpr BitVector<C> mixing(std::index_sequence<kJ...>) {
  constexpr int n = Lanes<C>::count;
  return BitVector<C>{
      (kHigh ? (static_cast<int>(kJ) & kBit ? n + static_cast<int>(kJ) : static_cast<int>(kJ) + kBit)
             : (static_cast<int>(kJ) & kBit ? n + static_cast<int>(kJ) - kBit : static_cast<int>(kJ)))...};
}

template <typename C, int kBit>
FASTASR_VECTOR_INLINE void transpose_bit(Vector<C>* r) {
  constexpr int n = Lanes<C>::count;
#pragma GCC unroll 16
  for (int i = 0; i < n; i++) {
    if (i & kBit) continue;
    const Vector<C> a = r[i], b = r[i + kBit];
    r[i] = __builtin_shuffle(a, b, (mixing<C, kBit, false>(std::make_index_sequence<n>())));
    r[i + kBit] = __builtin_shuffle(a, b, (mixing<C, kBit, true>(std::make_index_sequence<n>())));
  }
}
// r: as many vectors as a vector has lanes, a square matrix.
template <typename C>
FASTASR_VECTOR_INLINE void transpose(Vector<C>* r) {
  if constexpr (Lanes<C>::count > 8) transpose_bit<C, 8>(r);
  if constexpr (Lanes<C>::count > 4) transpose_bit<C, 4>(r);
  if constexpr (Lanes<C>::count > 2) transpose_bit<C, 2>(r);
  transpose_bit<C, 1>(r);
}

// r[0] = the sums of the vectors r[0], r[1], ...: as many as a vector has lanes. Half the shuffles of a transposition.
template <typename C, int kBit = Lanes<C>::count / 2>
FASTASR_VECTOR_INLINE void sum_each(Vector<C>* r) {
  constexpr int n = Lanes<C>::count;
#pragma GCC unroll 16
  for (int i = 0; i < kBit; i++) {
    const Vector<C> a = r[i], b = r[i + kBit];
    r[i] = __builtin_shuffle(a, b, (mixing<C, kBit, false>(std::make_index_sequence<n>()))) +
           __builtin_shuffle(a, b, (mixing<C, kBit, true>(std::make_index_sequence<n>())));
  }
  if constexpr (kBit > 1) sum_each<C, kBit / 2>(r);
}
