// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/toeplitz_attention.h"

#include "bindings/scratch.h"
#include "bindings/written/toeplitz_attention.h"

namespace fastasr::bindings::toeplitz_attention {
namespace {

// As many units as fit share memory for their packed operands: these stay in the last cache, and long sequences of
// large batches need no more than one.
constexpr int64_t kWorkspaceBytes = int64_t{16} << 20;

template <typename T>
cpu::ToeplitzAttention<T> problem(const auto& a) {
  using C = cpu::compute_t<T>;
  cpu::ToeplitzAttention<T> p{};
  p.query_key = sequence<T>(a.query_key), p.gate = sequence<T>(a.gate), p.value = sequence<T>(a.value);
  p.length = a.L, p.batch = a.B, p.d = a.D, p.v = a.V, p.size = a.size, p.count = a.count, p.reach = a.P - 1;
  p.qk_weight = data<C>(a.qk_weight), p.qk_bias = data<C>(a.qk_bias);
  p.position_bias = data<C>(a.position_bias) + p.reach;
  p.padding = data_or_null<uint8_t>(a.padding_mask), p.dropout = data_or_null<C>(a.weights_dropout);
  p.causal = a.causal, p.activate_value = a.activate_value, p.activation = static_cast<int>(a.activation);
  return p;
}

// The tasks of a group of units, which one thread has for itself or the threads share.
template <typename T>
struct Tasks {
  using C = cpu::compute_t<T>;
  const cpu::ToeplitzAttention<T>& p;
  C* own;  // the thread's scratch, or null

  // Runs f(unit in the group, task of the unit, scratch); `work` counts multiplications per task.
  template <typename F>
  void run(int64_t units, int64_t tasks, int64_t work, const F& f) const {
    const auto some = [&](int64_t begin, int64_t end, C* scratch) {
      for (int64_t t = begin; t < end; t++) f(t / tasks, t % tasks, scratch);
    };
    if (own) return some(0, units * tasks, own);
    parallel_tasks(units * tasks, work / 16, [&](int64_t begin, int64_t end) {
      const Scratch<C> scratch(cpu::toeplitz_scratch_elements(p));
      some(begin, end, scratch.data());
    });
  }
};

// Runs the units in groups that share a workspace: f(first unit, units, unit's operands by index, tasks). If there are
// enough units, each thread takes whole ones: their operands stay in its own caches.
template <typename T, typename F>
void for_groups(const cpu::ToeplitzAttention<T>& p, bool backward, const F& f) {
  using C = cpu::compute_t<T>;
  const int64_t units = p.units(), elements = (cpu::toeplitz_unit_elements(p, backward) + 15) / 16 * 16;
  if (units == 0) return;
  if (units >= 2 * torch::stable::get_num_threads()) {
    const int64_t work = p.rows() * (p.rows() + cpu::kPanel) / 16 * (p.d + p.v);
    parallel_tasks(units, work, [&](int64_t begin, int64_t end) {
      const Scratch<C> memory(elements), scratch(cpu::toeplitz_scratch_elements(p));
      const auto operands = cpu::toeplitz_unit(p, backward, memory.data());
      for (int64_t unit = begin; unit < end; unit++) f(unit, 1, &operands, Tasks<T>{p, scratch.data()});
    });
    return;
  }
  const int64_t most = kWorkspaceBytes / (elements * static_cast<int64_t>(sizeof(C)));
  const int64_t group = std::clamp<int64_t>(most, 1, units);
  const Scratch<C> memory(group * elements);
  std::vector<cpu::ToeplitzUnit<C>> operands;
  for (int64_t i = 0; i < group; i++) operands.push_back(cpu::toeplitz_unit(p, backward, memory.data() + i * elements));
  for (int64_t first = 0; first < units; first += group)
    f(first, std::min(group, units - first), operands.data(), Tasks<T>{p, nullptr});
}

// Early and late blocks alternate: causal ones differ in cost, and a thread gets neighbours.
int64_t folded(int64_t task, int64_t tasks) { return task % 2 ? tasks - 1 - task / 2 : task / 2; }

template <typename T>
void pack_units(const Tasks<T>& all, bool backward, int64_t first, int64_t units,
                const cpu::ToeplitzUnit<cpu::compute_t<T>>* operands) {
  const cpu::ToeplitzAttention<T>& p = all.p;
  const auto& kernel = cpu::kernels<cpu::ToeplitzAttentionKernels<T>>();
  const int64_t blocks = p.blocks();
  all.run(units, blocks + 1, cpu::kPanel * p.v * 16, [&](int64_t u, int64_t task, auto* scratch) {
    if (task == blocks)
      kernel.pack(p, first + u, backward, operands[u], scratch);
    else
      kernel.pack_value(p, first + u, task, operands[u]);
  });
}

std::tuple<Tensor, Tensor> toeplitz_attention_forward(const ToeplitzAttentionForward& a) {
  Tensor y = new_contiguous(a.gate), mixed = a.keep ? new_contiguous(a.gate) : new_without_elements(a.gate);
  with_kernels<cpu::ToeplitzAttentionKernels>(a.query_key, a.kName, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const auto p = problem<T>(a);
    T *yp = mutable_data<T>(y), *hp = a.keep ? mutable_data<T>(mixed) : nullptr;
    const int64_t blocks = p.blocks();
    for_groups(p, false, [&](int64_t first, int64_t units, const cpu::ToeplitzUnit<C>* operands, const Tasks<T>& all) {
      pack_units(all, false, first, units, operands);
      all.run(units, blocks, cpu::kPanel * p.rows() * (p.d + p.v), [&](int64_t u, int64_t task, C* scratch) {
        kernel.forward(p, first + u, folded(task, blocks), operands[u], yp, hp, scratch);
      });
    });
  });
  return {y, mixed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> toeplitz_attention_backward(
    const ToeplitzAttentionBackward& a) {
  Tensor dquery_key = new_contiguous(a.query_key), dgate = new_contiguous(a.gate), dvalue = new_contiguous(a.value);
  Tensor dqk_weight = new_like(a.qk_weight), dqk_bias = new_like(a.qk_bias), dposition_bias = new_like(a.position_bias);
  with_kernels<cpu::ToeplitzAttentionKernels>(a.query_key, a.kName, [&]<typename T>(const auto& kernel) {
    using C = cpu::compute_t<T>;
    const auto p = problem<T>(a);
    cpu::ToeplitzGradients<T> g{sequence<T>(a.grad_y), sequence<T>(a.mixed), mutable_data<T>(dquery_key),
                                mutable_data<T>(dgate), mutable_data<T>(dvalue)};
    const int64_t blocks = p.blocks(), distances = 2 * p.size - 1;
    const int64_t width = 4 * p.d + distances;
    std::vector<double> parts(p.units() * width);
    for_groups(p, true, [&](int64_t first, int64_t units, const cpu::ToeplitzUnit<C>* operands, const Tasks<T>& all) {
      pack_units(all, true, first, units, operands);
      all.run(units, blocks, cpu::kPanel * p.rows() * (2 * p.d + p.v), [&](int64_t u, int64_t task, C* scratch) {
        kernel.backward(p, g, first + u, folded(task, blocks), operands[u], scratch);
      });
      all.run(units, blocks, cpu::kPanel * p.rows() * (p.d + p.v), [&](int64_t u, int64_t task, C* scratch) {
        kernel.backward_keys(p, g, first + u, folded(task, blocks), operands[u], scratch);
      });
      all.run(units, 1, p.rows() * (16 * p.d + 4 * p.rows()), [&](int64_t u, int64_t, C* scratch) {
        double* part = parts.data() + (first + u) * width;
        kernel.backward_parameters(p, g, first + u, operands[u], part, part + 4 * p.d, scratch);
      });
    });
    std::vector<double> sums(width);
    for (int64_t u = 0; u < p.units(); u++)
      for (int64_t j = 0; j < width; j++) sums[j] += parts[u * width + j];
    C *dw = mutable_data<C>(dqk_weight), *db = mutable_data<C>(dqk_bias), *dp = mutable_data<C>(dposition_bias);
    for (int64_t j = 0; j < 2 * p.d; j++) dw[j] = static_cast<C>(sums[j]), db[j] = static_cast<C>(sums[2 * p.d + j]);
    std::fill_n(dp, dposition_bias.numel(), C(0));
    for (int64_t j = 0; j < distances; j++) dp[p.reach + 1 - p.size + j] = static_cast<C>(sums[4 * p.d + j]);
  });
  return {dquery_key, dgate, dvalue, dqk_weight, dqk_bias, dposition_bias};
}

}  // namespace

template <typename A>
void find_sizes(A& a) {
  a.size = std::max<int64_t>(1, a.chunk_size > 0 ? std::min(a.chunk_size, a.L) : a.L);
  a.count = (a.L + a.size - 1) / a.size;
}

FASTASR_OPERATORS(written<toeplitz_attention_forward>, written<toeplitz_attention_backward>)

}  // namespace fastasr::bindings::toeplitz_attention
