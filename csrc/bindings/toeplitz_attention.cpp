// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/toeplitz_attention.h"

#include <tuple>
#include <vector>

#include "bindings/pooled.h"
#include "cpu/math/activation.h"

namespace fastasr::bindings::toeplitz_attention {
namespace {

// As many units as fit share memory for their packed operands: these stay in the last cache, and long sequences of
// large batches need no more than one.
constexpr int64_t kWorkspaceBytes = int64_t{16} << 20;

struct Inputs {
  const Tensor &query_key, &gate, &value, &qk_weight, &qk_bias, &position_bias;
  const Optional &padding, &dropout;
  bool causal;
  int64_t chunk_size, activation;
  bool activate_value;
};

template <typename T>
cpu::Sequence<const T> sequence(const Tensor& t, const Tensor& like, const char* op, const char* name) {
  check(t.dim() == 3 && dtype_of(t) == dtype_of(like) && t.size(0) == like.size(0) && t.size(1) == like.size(1) &&
            (t.size(2) == 1 || t.stride(2) == 1 || t.numel() == 0),
        op, name, " is not (time, batch, dense channels) like query_key");
  return {data<T>(t), t.stride(0), t.stride(1)};
}

template <typename T>
cpu::ToeplitzAttention<T> checked(const Inputs& in, const char* op) {
  using C = cpu::compute_t<T>;
  cpu::ToeplitzAttention<T> p{};
  check(in.query_key.dim() == 3 && in.query_key.size(2) > 0, op, "query_key");
  p.query_key = sequence<T>(in.query_key, in.query_key, op, "query_key");
  p.gate = sequence<T>(in.gate, in.query_key, op, "gate");
  p.value = sequence<T>(in.value, in.query_key, op, "value");
  check(in.gate.size(2) == in.value.size(2), op, "gate and value differ in width");
  p.length = in.query_key.size(0), p.batch = in.query_key.size(1), p.d = in.query_key.size(2), p.v = in.gate.size(2);
  p.size = std::max<int64_t>(1, in.chunk_size > 0 ? std::min(in.chunk_size, p.length) : p.length);
  p.count = (p.length + p.size - 1) / p.size;
  for (const Tensor* t : {&in.qk_weight, &in.qk_bias})
    check(is_dense(*t, kComputeType<T>, {2, p.d}), op, "qk_weight and qk_bias");
  p.reach = (in.position_bias.numel() - 1) / 2;
  check(dtype_of(in.position_bias) == kComputeType<T> && in.position_bias.is_contiguous() &&
            in.position_bias.dim() == 1 && in.position_bias.numel() % 2 == 1 && p.reach + 1 >= p.size,
        op, "position_bias");
  p.qk_weight = data<C>(in.qk_weight), p.qk_bias = data<C>(in.qk_bias);
  p.position_bias = data<C>(in.position_bias) + p.reach;
  if (in.padding) {
    check(is_dense(*in.padding, ScalarType::Bool, {p.batch, p.length}), op, "padding_mask");
    p.padding = data<uint8_t>(*in.padding);
  }
  if (in.dropout) {
    check(is_dense(*in.dropout, kComputeType<T>, {p.batch, p.count, p.size, p.size}), op, "dropout");
    p.dropout = data<C>(*in.dropout);
  }
  check(in.activation >= 0 && in.activation < cpu::kActivations, op, "activation");
  p.causal = in.causal, p.activate_value = in.activate_value, p.activation = static_cast<int>(in.activation);
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
    const int64_t grain = std::max<int64_t>(1, 16 * kGrain / std::max<int64_t>(1, work));
    parallel_range(units * tasks, grain, [&](int64_t begin, int64_t end) {
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
  const int64_t panels = p.v_panels();
  all.run(units, panels + 1, p.rows() * cpu::kPanel * 16, [&](int64_t u, int64_t task, auto* scratch) {
    if (task == panels)
      kernel.pack(p, first + u, backward, operands[u], scratch);
    else
      kernel.pack_value(p, first + u, task, operands[u]);
  });
}

std::tuple<Tensor, Tensor> toeplitz_attention_forward(const Tensor& query_key, const Tensor& gate, const Tensor& value,
                                                      const Tensor& qk_weight, const Tensor& qk_bias,
                                                      const Tensor& position_bias, const Optional& padding_mask,
                                                      const Optional& dropout, bool causal, int64_t chunk_size,
                                                      int64_t activation, bool activate_value, bool need_gradients) {
  const char* op = "toeplitz_attention_forward";
  const Inputs in{query_key,    gate,    value,  qk_weight,  qk_bias,    position_bias,
                  padding_mask, dropout, causal, chunk_size, activation, activate_value};
  check(gate.dim() == 3, op, "gate");
  Tensor y = new_contiguous(gate), mixed = need_gradients ? new_contiguous(gate) : new_without_elements(gate);
  with_kernel_type(dtype_of(query_key), op, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    const auto& kernel = cpu::kernels<cpu::ToeplitzAttentionKernels<T>>();
    const auto p = checked<T>(in, op);
    T *yp = mutable_data<T>(y), *hp = need_gradients ? mutable_data<T>(mixed) : nullptr;
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
    const Tensor& grad, const Tensor& query_key, const Tensor& gate, const Tensor& value, const Tensor& qk_weight,
    const Tensor& qk_bias, const Tensor& position_bias, const Optional& padding_mask, const Optional& dropout,
    const Tensor& mixed, bool causal, int64_t chunk_size, int64_t activation, bool activate_value) {
  const char* op = "toeplitz_attention_backward";
  const Inputs in{query_key,    gate,    value,  qk_weight,  qk_bias,    position_bias,
                  padding_mask, dropout, causal, chunk_size, activation, activate_value};
  Tensor dquery_key = new_contiguous(query_key), dgate = new_contiguous(gate), dvalue = new_contiguous(value);
  Tensor dqk_weight = new_like(qk_weight), dqk_bias = new_like(qk_bias), dposition_bias = new_like(position_bias);
  with_kernel_type(dtype_of(query_key), op, [&]<typename T>() {
    using C = cpu::compute_t<T>;
    const auto& kernel = cpu::kernels<cpu::ToeplitzAttentionKernels<T>>();
    const auto p = checked<T>(in, op);
    check_same_size(mixed, gate, op, "mixed");
    cpu::ToeplitzGradients<T> g{sequence<T>(grad, query_key, op, "grad"), sequence<T>(mixed, query_key, op, "mixed"),
                                mutable_data<T>(dquery_key), mutable_data<T>(dgate), mutable_data<T>(dvalue)};
    check(grad.size(2) == p.v && mixed.size(2) == p.v, op, "grad and mixed differ from gate");
    const int64_t blocks = p.blocks(), panels = p.v_panels() + p.d_panels(), distances = 2 * p.size - 1;
    const int64_t width = 4 * p.d + distances;
    std::vector<double> parts(p.units() * width);
    for_groups(p, true, [&](int64_t first, int64_t units, const cpu::ToeplitzUnit<C>* operands, const Tasks<T>& all) {
      pack_units(all, true, first, units, operands);
      all.run(units, blocks, cpu::kPanel * p.rows() * (2 * p.d + p.v), [&](int64_t u, int64_t task, C* scratch) {
        kernel.backward(p, g, first + u, folded(task, blocks), operands[u], scratch);
      });
      all.run(units, panels, cpu::kPanel * p.rows() * p.rows(), [&](int64_t u, int64_t task, C* scratch) {
        kernel.backward_keys(p, g, first + u, task, operands[u], scratch);
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

FASTASR_OPERATORS({"toeplitz_attention_forward(Tensor query_key, Tensor gate, Tensor value, Tensor qk_weight, "
                   "Tensor qk_bias, Tensor position_bias, Tensor? padding_mask, Tensor? dropout, bool causal, "
                   "int chunk_size, int activation, bool activate_value, bool need_gradients) -> (Tensor, Tensor)",
                   Boxed<toeplitz_attention_forward>::call},
                  {"toeplitz_attention_backward(Tensor grad, Tensor query_key, Tensor gate, Tensor value, "
                   "Tensor qk_weight, Tensor qk_bias, Tensor position_bias, Tensor? padding_mask, Tensor? dropout, "
                   "Tensor mixed, bool causal, int chunk_size, int activation, bool activate_value) -> (Tensor, "
                   "Tensor, Tensor, Tensor, Tensor, Tensor)",
                   Boxed<toeplitz_attention_backward>::call})

}  // namespace fastasr::bindings::toeplitz_attention
