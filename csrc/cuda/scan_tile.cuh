// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/activation.cuh"
#include "cuda/scan_state.cuh"

// The scan u_n(t) = q_n u_n(t-1) + s_t with output Σ_n Re(w_n u_n(t)), over tiles of time.
//
// A block owns 32 channels of one batch row and walks a segment of time, tile by tile; it loads the next tile's values
// while it computes the present one. In a tile each warp owns `kRows` successive steps and each lane one channel:
//   local scan   the end of the warp's rows, starting from zero, put into shared memory;
//   carry        after one barrier each warp adds up what comes before its rows: q^rows per warp;
//   replay       the rows again, now from the right start, with outputs.
// States are taken four real numbers at a time (a group). With one group the output replaces the input in shared
// memory; with several they are added in a second tile.
//
// Modes: kOutput  y = act(Σ + ω s)                                  reads s, writes y
//        kChain   g' = g act'(Σ + ω s)                              reads s and g, writes g'
//        kAdjoint the same scan over g', in the opposite direction: dx = Σ + ω g', and with f = du/dq
//                 (f_n(t) = q_n f_n(t-1) + u_n(t-1)) the sums Σ x u_n, Σ x f_n, Σ x g'
namespace fastasr::cuda {

enum ScanMode { kOutput = 0, kChain = 1, kAdjoint = 2 };

// Coefficients in global memory: [kind][part][state][channel], states padded to whole groups, directions one after the
// other.
// kQLessOne is q - 1: the adjoint scan, and every scan of complex numbers, takes u + ((q - 1) u + s), which is exact
// for q close to 1, where q itself is not. kQRows and its derivative by q, kSlopeRows, cover the rows of a warp: they
// are rounded once, not power by power, so the error of a long memory grows with the number of warps, not of steps.
enum Coefficient {
  kQ = 0,
  kWeight,
  kIn,
  kOut,
  kLog,
  kLogLow,  // complex numbers alone, see power
  kQLessOne,
  kQRows,
  kSlopeRows,
  kDelayed,
  kDelayedSlope,
  kCoefficients
};

// A sequence in global memory. along_time: its threads run along time, which is contiguous; if false, along channels.
struct ScanView {
  const void* data;
  int64_t time, batch, channel;
  bool along_time;
  int type;  // StorageType
};

template <typename C>
struct ScanParameters {
  ScanView in, other, out;
  int64_t length, batch, channels;
  int64_t states;           // as the caller counts them
  int groups, groups_each;  // in all; per direction
  unsigned reversed;        // bit k: direction k scans from the end
  int64_t truncation;       // 0: none
  int activation;
  const C* coefficients;
  const C* residual;          // (channels) or null
  const unsigned char* mask;  // (batch, length) or null
  bool mask_in, mask_out;     // padding is zero in the scan's input; in its output and in `other`
  const C* initial;           // adds out_n init_n q^(step + first_power) to the output: (batch, channels, states)
  int64_t first_power;
  int out_coefficient;  // kOut; kIn where the scan is the adjoint
  int64_t segments, tiles_per_segment;
  bool ends_only;  // only the state at the end of each segment, from zero
  C* carry;        // [segment][batch][group][value][channel]: in: state before the segment; null: zero
  C* final_state;  // kOutput: h after the last step, (batch, channels, states), or null
  C* finals;       // kAdjoint: u and f after the last step, [batch][group][value][channel], or null
  double* parts;   // kAdjoint: [segment][batch][group x 8 + 1][channel]: sums of the block, or null
};

template <typename C, ScanMode mode>
struct ScanShape {
  static constexpr bool kWideNumbers = sizeof(C) == 8;
  static constexpr int kWarps = kWideNumbers ? 4 : 8;
  static constexpr int kRows = (mode == kOutput ? 32 : 16) / (kWideNumbers ? 2 : 1);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int64_t kTile = static_cast<int64_t>(kWarps) * kRows;
  static constexpr int kPitch = 33;  // odd: rows and columns of a warp's part both meet all banks
  static constexpr int kPart = kRows * kPitch;
  static constexpr int kValues = mode == kAdjoint ? 8 : 4;  // real numbers that a group passes on
  static constexpr int kSums = 8;                           // kAdjoint: real numbers that a group adds up

  // Bytes of shared memory: input, second input, output of several groups, ends (two in turn), sums (two in turn), and
  // between tiles the carries (one more than there are groups, so that the one being written is never the one being
  // read).
  static constexpr int64_t shared(int groups, bool one_tile) {
    const int64_t tiles = static_cast<int64_t>(kWarps) * kPart * (1 + (mode != kOutput) + (groups > 1));
    const int64_t ends = 2 * kWarps * kValues * 32, sums = mode == kAdjoint ? 2 * kWarps * kSums * 32 : 0;
    const int64_t carries = one_tile ? 0 : static_cast<int64_t>(groups + 1) * kValues * 32;
    return (tiles + ends + sums + carries) * static_cast<int64_t>(sizeof(C));
  }
};

// Loads the warp's rows of a tile into registers; elements outside are 0.
template <typename C, int kRows>
FASTASR_DEVICE void fetch(const ScanView& v, int64_t batch, int64_t first, int rows, int64_t channel, int channels,
                          int lane, typename Storage<C>::Raw (&raw)[kRows]) {
  int64_t at = batch * v.batch, step = v.time;
  int limit = lane < channels ? rows : 0;
  if (v.along_time) {
    const int row = lane % kRows, column = lane / kRows;
    at += (first + row) + (channel + column) * v.channel;
    step = (32 / kRows) * v.channel;
    limit = row < rows ? (channels - column + 32 / kRows - 1) / (32 / kRows) : 0;
  } else {
    at += first * v.time + (channel + lane) * v.channel;
  }
  const auto load = [&](auto type, auto whole) {
    constexpr int kType = decltype(type)::value;
    constexpr int64_t kBytes = kBytesOf<kType>;
    const char* from = static_cast<const char*>(v.data) + at * kBytes;
    step *= kBytes;
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      raw[i] = 0;
      if (decltype(whole)::value || i < limit) raw[i] = Storage<C>::template load<kType>(from);
      from += step;
    }
  };
  const bool whole = rows == kRows && channels == 32;
  const auto load_rows = [&](auto type) { whole ? load(type, Constant<1>{}) : load(type, Constant<0>{}); };
  if (v.type == Storage<C>::kOwn)
    load_rows(Constant<Storage<C>::kOwn>{});
  else if (Storage<C>::kOwn == kDouble && v.type == kFloat)
    load_rows(Constant<kFloat>{});
  else
    load_rows(Constant<kBfloat16>{});  // 16 bits, whichever they are
}

template <typename C, int kRows>
FASTASR_DEVICE void stage(const typename Storage<C>::Raw (&raw)[kRows], const ScanView& v, int lane, C* part) {
  constexpr int kPitch = 33;
  C* p = v.along_time ? part + (lane % kRows) * kPitch + lane / kRows : part + lane;
  const int step = v.along_time ? 32 / kRows : kPitch;
  with_storage_type<C>(v.type, [&](auto type) {
#pragma unroll
    for (int i = 0; i < kRows; i++) p[i * step] = Storage<C>::template widen<decltype(type)::value>(raw[i]);
  });
}

template <typename Q, ScanMode mode>
FASTASR_KERNEL((ScanShape<typename StateTraits<Q>::Real, mode>::kThreads), 2)
scan_tiles(ScanParameters<typename StateTraits<Q>::Real> p) {
  using C = typename StateTraits<Q>::Real;
  using Shape = ScanShape<C, mode>;
  constexpr int kWarps = Shape::kWarps, kRows = Shape::kRows, kPitch = Shape::kPitch, kPart = Shape::kPart;
  constexpr int kValues = Shape::kValues, kSums = Shape::kSums;
  constexpr int kStates = StateTraits<Q>::kStates, kParts = StateTraits<Q>::kParts;
  constexpr bool kAdjoins = mode == kAdjoint, kReadsOther = mode != kOutput;
  constexpr bool kDifference = kAdjoins || StateTraits<Q>::kDifference;
  FASTASR_DYNAMIC_SHARED(memory);

  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t channel_blocks = (p.channels + 31) / 32;
  const int64_t channel0 = blockIdx.x % channel_blocks * 32, batch = blockIdx.x / channel_blocks % p.batch;
  const int64_t segment = blockIdx.x / channel_blocks / p.batch;
  const int channels = static_cast<int>(p.channels - channel0 < 32 ? p.channels - channel0 : 32);
  const int64_t channel = channel0 + (lane < channels ? lane : channels - 1);  // surplus lanes: a copy that is dropped
  const bool several = p.groups > 1;

  C* const in = reinterpret_cast<C*>(memory) + warp * kPart;
  C* rest = reinterpret_cast<C*>(memory) + kWarps * kPart;
  C* const other = rest + warp * kPart;
  if (kReadsOther) rest += kWarps * kPart;
  C* const out = several ? rest + warp * kPart : in;
  if (several) rest += kWarps * kPart;
  C* const ends = rest;
  rest += 2 * kWarps * kValues * 32;
  C* const sums = rest;
  if (kAdjoins) rest += 2 * kWarps * kSums * 32;
  C* const slots = rest;

  const int64_t tiles = (p.length + Shape::kTile - 1) / Shape::kTile;
  const int64_t first_tile = segment * p.tiles_per_segment;
  const int64_t count = tiles - first_tile < p.tiles_per_segment ? tiles - first_tile : p.tiles_per_segment;
  const bool backwards = p.reversed & 1u;  // the walk over tiles; with two directions a segment is one tile
  const bool one_tile = p.tiles_per_segment == 1;
  const bool starts = p.carry != nullptr && !p.ends_only;  // from a given state
  const int64_t carried = (segment * p.batch + batch) * p.groups * kValues * p.channels + channel;
  C* const carry = p.carry != nullptr ? p.carry + carried : nullptr;
  if (!one_tile)
    for (int v = warp; v < p.groups * kValues; v += kWarps)
      slots[v * 32 + lane] = starts ? carry[v * p.channels] : C(0);

  const bool reads_other = kReadsOther && !p.ends_only && p.other.data != nullptr;
  const bool sums_up = kAdjoins && !p.ends_only && p.parts != nullptr;
  const C omega = p.residual != nullptr ? p.residual[channel] : C(0);
  const int64_t states_all = static_cast<int64_t>(p.groups) * kStates;
  const int64_t kind_pitch = states_all * p.channels * kParts, part_pitch = states_all * p.channels;

  Q decay[kStates], weight[kStates], q_rows[kStates], slope_rows[kStates];
  double total[kSums / kWarps] = {};
  C total_residual = C(0);

  typename Storage<C>::Raw next[kRows], next_other[kRows];
  unsigned char next_padding = 0;
  const auto row0 = [&](int64_t k) {
    return (backwards ? first_tile + count - 1 - k : first_tile + k) * Shape::kTile + warp * kRows;
  };
  const auto rows_at = [&](int64_t row) {
    const int64_t left = p.length - row;
    return static_cast<int>(left < 0 ? 0 : left < kRows ? left : kRows);
  };
  const auto prefetch = [&](int64_t k) {
    const int64_t row = row0(k);
    const int rows = rows_at(row);
    fetch<C, kRows>(p.in, batch, row, rows, channel0, channels, lane, next);
    if (reads_other) fetch<C, kRows>(p.other, batch, row, rows, channel0, channels, lane, next_other);
    next_padding = p.mask != nullptr && lane < rows ? p.mask[batch * p.length + row + lane] : 0;
  };
  // Adds the warps' sums of one group and tile, in double: thread (warp, lane) owns sums `warp`, `warp` + kWarps, ...
  // of a channel.
  const auto add_sums = [&](int parity, int group, bool first) {
    for (int k = 0; k < kSums / kWarps; k++) {
      const int sum = warp + k * kWarps;
      double v = 0;
      for (int w = 0; w < kWarps; w++)
        v += static_cast<double>(sums[((parity * kWarps + w) * kSums + sum) * 32 + lane]);
      if (!several) {
        total[k] += v;
      } else if (lane < channels) {
        const int64_t row = (segment * p.batch + batch) * (p.groups * kSums + 1) + group * kSums + sum;
        double* const at = p.parts + row * p.channels + channel;
        *at = first ? v : *at + v;
      }
    }
  };

  prefetch(0);
  int iteration = 0, read_slot = 0, write_slot = p.groups;
  for (int64_t k = 0; k < count; k++) {
    const int64_t row = row0(k);
    const int rows = rows_at(row);
    const unsigned inside = rows == 32 ? ~0u : (1u << rows) - 1u;
    const unsigned kept = inside & ~__ballot_sync(~0u, next_padding != 0);
    stage<C, kRows>(next, p.in, lane, in);
    if (reads_other) stage<C, kRows>(next_other, p.other, lane, other);
    if (k + 1 < count) prefetch(k + 1);
    __syncwarp();

    for (int group = 0; group < p.groups; group++, iteration++) {
      const int direction = group / p.groups_each;
      const bool reverse = p.reversed >> direction & 1u;
      // rows in the order of the scan: from the pointer's row on, by `step`; bit i of a row mask is the i-th of them
      const int start = reverse ? kRows - 1 : 0, step = reverse ? -kPitch : kPitch;
      const unsigned in_rows = p.mask_in ? kept : inside;
      const unsigned every = kRows == 32 ? ~0u : (1u << kRows) - 1u;
      const bool plain = kept == every && !p.truncation;  // no row is missing or masked
      unsigned scan_in = reverse ? __brev(in_rows) >> (32 - kRows) : in_rows;
      unsigned scan_out = p.mask_out ? kept : inside;
      scan_out = reverse ? __brev(scan_out) >> (32 - kRows) : scan_out;
      const C* const coefficients = p.coefficients + static_cast<int64_t>(group) * kStates * p.channels + channel;
      const auto coefficient = [&](int kind, int n) {
        return read_state(coefficients + kind * kind_pitch + n * p.channels, part_pitch, Q());
      };
      const auto q_to_the = [&](int n, int64_t steps) {
        return power(coefficient(kLog, n), kParts == 1 ? zero(Q()) : coefficient(kLogLow, n), C(steps));
      };
      if (several || k == 0) {
#pragma unroll
        for (int n = 0; n < kStates; n++) {
          decay[n] = coefficient(kDifference ? kQLessOne : kQ, n);
          weight[n] = coefficient(kWeight, n);
          q_rows[n] = coefficient(kQRows, n);
          slope_rows[n] = kAdjoins ? coefficient(kSlopeRows, n) : zero(Q());
        }
      }
      // s(t - K), from global memory
      const auto delayed = [&](int i) {
        const int64_t t = reverse ? row + (start - i) + p.truncation : row + i - p.truncation;
        if (t < 0 || t >= p.length || (p.mask_in && p.mask != nullptr && p.mask[batch * p.length + t])) return C(0);
        const int64_t at = batch * p.in.batch + t * p.in.time + channel * p.in.channel;
        return load_one<C>(p.in.type, p.in.data, at);
      };
      // one step of the states u and of their derivatives f
      Q u[kStates], f[kStates];
      const auto next_state = [&](Q decay, Q state, Q enters) {
        const Q change = multiply_add(decay, state, enters);
        return kDifference ? add(state, change) : change;
      };
      const auto advance = [&](C s) {
#pragma unroll
        for (int n = 0; n < kStates; n++) {
          if (kAdjoins) f[n] = next_state(decay[n], f[n], u[n]);
          u[n] = next_state(decay[n], u[n], from_real(s, Q()));
        }
      };
      // does the same for the i-th row where the convolution is truncated: it subtracts what leaves from what enters
      const auto advance_truncated = [&](C s, int i) {
        const C late = delayed(i);
#pragma unroll
        for (int n = 0; n < kStates; n++) {
          if (kAdjoins) f[n] = next_state(decay[n], f[n], add_scaled(u[n], -late, coefficient(kDelayedSlope, n)));
          u[n] = next_state(decay[n], u[n], add_scaled(from_real(s, Q()), -late, coefficient(kDelayed, n)));
        }
      };

      // local scan
#pragma unroll
      for (int n = 0; n < kStates; n++) u[n] = f[n] = zero(Q());
      // way is 1 or -1 for all rows, in this direction, with addresses known at compile time; 0 for any rows
      const auto in_a_way = [&](auto f) {
        if (!plain)
          f(Constant<0>{});
        else if (reverse)
          f(Constant<-1>{});
        else
          f(Constant<1>{});
      };
      in_a_way([&](auto way) {
        constexpr int kWay = decltype(way)::value;
        const C* const s = in + (kWay == 0 ? start : kWay > 0 ? 0 : kRows - 1) * kPitch + lane;
#pragma unroll kWay == 0 ? 1 : 16
        for (int i = 0; i < kRows; i++) {
          const C entering = kWay != 0 || (scan_in >> i & 1u) ? s[i * (kWay == 0 ? step : kWay * kPitch)] : C(0);
          kWay == 0 && p.truncation ? advance_truncated(entering, i) : advance(entering);
        }
      });
      C* const end = ends + ((iteration & 1) * kWarps + warp) * kValues * 32 + lane;
#pragma unroll
      for (int n = 0; n < kStates; n++) {
        write_state(end + n * kParts * 32, 32, u[n]);
        if (kAdjoins) write_state(end + (kStates + n) * kParts * 32, 32, f[n]);
      }
      __syncthreads();
      if (sums_up && iteration > 0)
        add_sums((iteration - 1) & 1, (group == 0 ? p.groups : group) - 1, group == 0 ? k == 1 : k == 0);

      // carry
      C* const group_carry = carry != nullptr ? carry + static_cast<int64_t>(group) * kValues * p.channels : nullptr;
      const C* const slot = one_tile ? group_carry : slots + read_slot * kValues * 32 + lane;
      const int64_t slot_pitch = one_tile ? p.channels : 32;
#pragma unroll
      for (int n = 0; n < kStates; n++) {
        u[n] = f[n] = zero(Q());
        if (one_tile && !starts) continue;
        u[n] = read_state(slot + n * kParts * slot_pitch, slot_pitch, Q());
        if (kAdjoins) f[n] = read_state(slot + (kStates + n) * kParts * slot_pitch, slot_pitch, Q());
      }
      const int place = reverse ? kWarps - 1 - warp : warp;
      const auto pass = [&](int w) {
        const C* const e = ends + ((iteration & 1) * kWarps + (reverse ? kWarps - 1 - w : w)) * kValues * 32 + lane;
#pragma unroll
        for (int n = 0; n < kStates; n++) {
          if (kAdjoins) {
            const Q local = read_state(e + (kStates + n) * kParts * 32, 32, Q());
            f[n] = multiply_add(q_rows[n], f[n], multiply_add(slope_rows[n], u[n], local));
          }
          u[n] = multiply_add(q_rows[n], u[n], read_state(e + n * kParts * 32, 32, Q()));
        }
      };
      for (int w = 0; w < place; w++) pass(w);
      const bool keep_end = p.ends_only && k == count - 1;
      if (place == kWarps - 1 && (!one_tile || keep_end)) {
        Q u0[kStates], f0[kStates];
#pragma unroll
        for (int n = 0; n < kStates; n++) u0[n] = u[n], f0[n] = f[n];
        pass(place);
        C* const to = slots + write_slot * kValues * 32 + lane;
#pragma unroll
        for (int n = 0; n < kStates; n++) {
          if (!one_tile) {
            write_state(to + n * kParts * 32, 32, u[n]);
            if (kAdjoins) write_state(to + (kStates + n) * kParts * 32, 32, f[n]);
          }
          if (keep_end && lane < channels) {
            write_state(group_carry + n * kParts * p.channels, p.channels, u[n]);
            if (kAdjoins) write_state(group_carry + (kStates + n) * kParts * p.channels, p.channels, f[n]);
          }
          u[n] = u0[n], f[n] = f0[n];
        }
      }
      read_slot = read_slot == p.groups ? 0 : read_slot + 1;
      write_slot = write_slot == p.groups ? 0 : write_slot + 1;
      if (p.ends_only) continue;

      // replays; rows beyond the length come last in a forward scan and first in a reverse one
      const int skipped = reverse ? kRows - rows : 0;
      Q sum_u[kStates], sum_f[kStates];
#pragma unroll
      for (int n = 0; n < kStates; n++) sum_u[n] = sum_f[n] = zero(Q());
      C sum_residual = C(0);
      in_a_way([&](auto way) {
        constexpr int kWay = decltype(way)::value;
        const int first = (kWay == 0 ? start * kPitch + skipped * step : kWay > 0 ? 0 : (kRows - 1) * kPitch) + lane;
        const C* const value_at = in + first;
        const C* const other_at = other + first;
        C* const out_at = out + first;
        const int count_rows = kWay == 0 ? rows : kRows;
        const bool adds = group > 0, adds_residual = group == p.groups - 1 && p.residual != nullptr;
#pragma unroll kWay == 0 ? 1 : 16
        for (int j = 0; j < count_rows; j++) {
          const int i = j + skipped, at = j * (kWay == 0 ? step : kWay * kPitch);
          const C value = value_at[at];
          const C entering = kWay != 0 || (scan_in >> i & 1u) ? value : C(0);
          kWay == 0 && p.truncation ? advance_truncated(entering, i) : advance(entering);
          C sum = C(0);
#pragma unroll
          for (int n = 0; n < kStates; n++) sum = add_output(sum, weight[n], u[n]);
          if (kAdjoins) {
            const bool open = kWay != 0 || (scan_out >> i & 1u);
            const C raw = other_at[at], factor = open ? raw : C(0);
            sum = open ? sum : C(0);
#pragma unroll
            for (int n = 0; n < kStates; n++) {
              sum_u[n] = add_scaled(sum_u[n], factor, u[n]);
              sum_f[n] = add_scaled(sum_f[n], factor, f[n]);
            }
            sum_residual += raw * value;
          }
          if (adds) sum += out_at[at];
          if (adds_residual) sum += omega * value;
          out_at[at] = sum;
        }
      });
      if (sums_up) {
        C* const to = sums + ((iteration & 1) * kWarps + warp) * kSums * 32 + lane;
#pragma unroll
        for (int n = 0; n < kStates; n++) {
          write_state(to + n * kParts * 32, 32, sum_u[n]);
          write_state(to + (kStates + n) * kParts * 32, 32, sum_f[n]);
        }
        if (group == 0) total_residual += sum_residual;
      }

      const bool last_rows = reverse ? row == 0 : rows > 0 && row + rows == p.length;
      if (last_rows && lane < channels) {
        if (kAdjoins && p.finals != nullptr) {
          C* const to = p.finals + (batch * p.groups + group) * kValues * p.channels + channel;
#pragma unroll
          for (int n = 0; n < kStates; n++) {
            write_state(to + n * kParts * p.channels, p.channels, u[n]);
            write_state(to + (kStates + n) * kParts * p.channels, p.channels, f[n]);
          }
        }
        if (mode == kOutput && p.final_state != nullptr) {
#pragma unroll
          for (int n = 0; n < kStates; n++) {
            const int64_t state = static_cast<int64_t>(group) * kStates + n;
            if (state >= p.states) break;
            const int64_t at = ((batch * p.channels + channel) * p.states + state) * kParts;
            Q h = multiply(coefficient(kIn, n), u[n]);
            if (p.initial != nullptr) h = multiply_add(q_to_the(n, p.length), read_state(p.initial + at, 1, Q()), h);
            write_state(p.final_state + at, 1, h);
          }
        }
      }

      if (p.initial != nullptr) {  // one direction only
        const int64_t done = reverse ? p.length - row - rows : row;
#pragma unroll
        for (int n = 0; n < kStates; n++) {
          const int64_t state = static_cast<int64_t>(group) * kStates + n;
          u[n] = zero(Q());
          if (state < p.states)
            u[n] = read_state(p.initial + ((batch * p.channels + channel) * p.states + state) * kParts, 1, Q());
          if (kAdjoins) u[n] = conjugate(u[n]);  // the final state's gradient
          u[n] = multiply(multiply(coefficient(p.out_coefficient, n), u[n]), q_to_the(n, done + p.first_power));
        }
        int offset = (start * kPitch) + lane + skipped * step;
        for (int j = 0; j < rows; j++) {
          C sum = out[offset];
#pragma unroll
          for (int n = 0; n < kStates; n++) {
            if (!p.mask_out || (scan_out >> (j + skipped) & 1u)) sum += real_part(u[n]);
            u[n] = StateTraits<Q>::kDifference ? multiply_add(coefficient(kQLessOne, n), u[n], u[n])
                                               : multiply(coefficient(kQ, n), u[n]);
          }
          out[offset] = sum;
          offset += step;
        }
      }
    }

    if (p.ends_only || p.out.data == nullptr) {
      __syncwarp();
      continue;
    }
    __syncwarp();
    {
      const bool along = p.out.along_time;
      const int row_in = along ? lane % kRows : 0, column = along ? lane / kRows : lane;
      int64_t at = batch * p.out.batch + (row + row_in) * p.out.time + (channel0 + column) * p.out.channel;
      const int64_t at_step = along ? (32 / kRows) * p.out.channel : p.out.time;
      const int limit = along ? (row_in < rows ? (channels - column + 32 / kRows - 1) / (32 / kRows) : 0)
                              : (column < channels ? rows : 0);
      const int step = along ? 32 / kRows : kPitch;
      constexpr int kBatch = sizeof(C) < 8 ? 8 : mode == kChain ? 2 : 4;  // four slopes in double spill on sm_120
      const C* from = out + row_in * kPitch + column;
      const C* slope = other + row_in * kPitch + column;
      const int64_t bytes = bytes_of(p.out.type), to_step = at_step * bytes;
      char* to = static_cast<char*>(const_cast<void*>(p.out.data)) + at * bytes;
      for (int i = 0; i < limit; i += kBatch) {
        C v[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; j++) v[j] = i + j < limit ? from[j * step] : C(0);
        if (mode == kOutput) activate<kBatch>(p.activation, v);
        if (mode == kChain) {
          C z[kBatch];
#pragma unroll
          for (int j = 0; j < kBatch; j++) z[j] = v[j], v[j] = i + j < limit ? slope[j * step] : C(0);
          chain<kBatch>(p.activation, z, v);
        }
        with_storage_type<C>(p.out.type, [&](auto type) {
#pragma unroll
          for (int j = 0; j < kBatch; j++)
            if (i + j < limit) Storage<C>::template store<decltype(type)::value>(to + j * to_step, v[j]);
        });
        to += kBatch * to_step;
        from += kBatch * step;
        slope += kBatch * step;
      }
    }
    __syncwarp();
  }

  if (sums_up) {
    __syncthreads();
    add_sums((iteration - 1) & 1, p.groups - 1, count == 1);
    sums[((iteration & 1) * kWarps + warp) * kSums * 32 + lane] = total_residual;
    __syncthreads();
    double* const parts = p.parts + (segment * p.batch + batch) * (p.groups * kSums + 1) * p.channels + channel;
    if (lane < channels) {
      if (!several)
        for (int k = 0; k < kSums / kWarps; k++) parts[(warp + k * kWarps) * p.channels] = total[k];
      if (warp == 0) {
        double v = 0;
        for (int w = 0; w < kWarps; w++)
          v += static_cast<double>(sums[((iteration & 1) * kWarps + w) * kSums * 32 + lane]);
        parts[p.groups * kSums * p.channels] = v;
      }
    }
  }
}

}  // namespace fastasr::cuda
