// SPDX-License-Identifier: Apache-2.0
#include "cpu/streaming/mega_step.h"

#include <cstddef>
#include <cstring>
#include <memory>

#include "bindings/packed_weights.h"
#include "cpu/support/history.h"

namespace fastasr::bindings::mega_step {
namespace {

using cpu::MegaLayout;
using cpu::Product;

constexpr int64_t kShape = 8, kParameters = 21, kStates = 3;

MegaLayout layout_of(const std::vector<int64_t>& shape, const char* op) {
  check(static_cast<int64_t>(shape.size()) == kShape, op, "shape has ", shape.size(), " entries");
  for (int64_t i = 0; i < 6; i++) check(shape[i] > 0, op, "shape");
  return MegaLayout({shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]});
}

bool is_plain(const Tensor& t) { return t.is_cpu() && dtype_of(t) == ScalarType::Float; }

// ---- packing -------------------------------------------------------------------------------------------------------
// weights: per block the 21 of cpu::MegaParameters in its order, then weight and bias of the last LayerNorm.
// eps: per block two, then one.
Tensor mega_pack(std::vector<int64_t> shape, std::vector<Tensor> weights, std::vector<double> eps) {
  const MegaLayout l = layout_of(shape, "mega_pack");
  const int64_t d = l.shape.size, n = d * l.shape.orders, k = l.shape.key, v = l.shape.value, f = l.shape.inner;
  const int64_t mx = 2 * d + k + v;
  const int64_t numel[kParameters] = {n,     n,     n, n, d,     v * d, v,     mx * d, mx, d * v, d,
                                      2 * k, 2 * k, d, d, f * d, f,     d * f, d,      d,  d};
  check(static_cast<int64_t>(weights.size()) == l.shape.blocks * kParameters + 2, "mega_pack", "weights");
  check(static_cast<int64_t>(eps.size()) == 2 * l.shape.blocks + 1, "mega_pack", "eps");
  for (size_t i = 0; i < weights.size(); i++) {
    const Tensor& w = weights[i];
    const int64_t expected = i < weights.size() - 2 ? numel[i % kParameters] : d;
    check(is_plain(w) && w.is_contiguous() && w.numel() == expected, "mega_pack", "weight ", i);
  }
  const Tensor packed = on_huge_pages(weights[0], l.total);
  float* arena = mutable_data<float>(packed);
  parallel_range(l.shape.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const float* pointers[kParameters];
      for (int64_t i = 0; i < kParameters; i++)
        pointers[i] = data<float>(weights[static_cast<size_t>(b * kParameters + i)]);
      cpu::MegaParameters p;
      static_assert(offsetof(cpu::MegaParameters, norm_eps) == sizeof(pointers));
      std::memcpy(&p, pointers, sizeof(pointers));
      const auto e = static_cast<size_t>(2 * b);
      p.norm_eps = static_cast<float>(eps[e]), p.outer_norm_eps = static_cast<float>(eps[e + 1]);
      std::memset(arena + b * l.block, 0, static_cast<size_t>(l.weight[0]) * 4);
      cpu::mega_pack_block(l, p, arena + b * l.block);
    }
  });
  cpu::mega_pack_final(l, data<float>(weights[weights.size() - 2]), data<float>(weights[weights.size() - 1]),
                       static_cast<float>(eps.back()), arena);
  return packed;
}

// ---- history -------------------------------------------------------------------------------------------------------
// Attention reads `batch` sequences of `length` rows, of which the last is still to be written.
struct History {
  Tensor view;
  float* data;
  int64_t sequence_stride, row_stride;
};

// Leaves room behind the next row: copies are then rare, and their cost per step is constant.
int64_t capacity_for(int64_t length) { return length + std::max<int64_t>(15, length / 2); }

// Describes rows of t's memory, `offset` floats behind t's first element.
Tensor history_view(const Tensor& t, int64_t offset, int64_t batch, int64_t length, int64_t width,
                    int64_t sequence_stride) {
  const int64_t sizes[3] = {batch, length, width}, strides[3] = {sequence_stride, width, 1};
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 3, sizes, strides, offset, &view));
  return Tensor(view);
}

// Allocates a buffer for `length` rows of which the caller will write the first `taken`.
History new_history(const Tensor& like, int64_t batch, int64_t length, int64_t width, int64_t capacity) {
  const Tensor storage = new_contiguous(like, {cpu::history_size(batch, capacity, width)});
  auto* base = mutable_data<float>(storage);
  cpu::history_begin(base, batch, capacity, width, length);
  const int64_t header = cpu::history_header(batch);
  return {history_view(storage, header, batch, length, width, capacity * width), base + header, capacity * width,
          width};
}

// Returns `previous` (batch, length, width) with one more row.
History grow(const Tensor& previous, int64_t batch, int64_t width) {
  const int64_t length = previous.numel() == 0 ? 0 : previous.size(1);
  if (length) {
    int64_t offset, bytes;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(previous.get(), &offset));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(previous.get(), &bytes));
    const auto* first = data<float>(previous);
    auto* storage = const_cast<float*>(first) - offset;
    if (cpu::history_claim(
            {storage, bytes / 4, offset, batch, length, width, previous.stride(0), previous.stride(1)})) {
      const int64_t stride = batch > 1 ? previous.stride(0) : length > 1 ? previous.stride(0) : (length + 1) * width;
      return {history_view(previous, 0, batch, length + 1, width, stride), const_cast<float*>(first), stride, width};
    }
  }
  History h = new_history(previous, batch, length + 1, width, capacity_for(length + 1));
  for (int64_t b = 0; length && b < batch; b++)
    for (int64_t t = 0; t < length; t++)
      std::memcpy(h.data + b * h.sequence_stride + t * width,
                  data<float>(previous) + b * previous.stride(0) + t * previous.stride(1),
                  static_cast<size_t>(width) * 4);
  return h;
}

// Returns the state once the last row has been written. At the end of a chunk it is the last row (`phantom`), or none.
Tensor after(const History& h, int64_t batch, int64_t length, int64_t width, bool chunk_ends, bool phantom) {
  if (!chunk_ends) return h.view;
  if (!phantom) return new_contiguous(h.view, {batch, 0, width});
  return history_view(h.view, (length - 1) * width, batch, 1, width, h.sequence_stride);
}

// ---- the step ------------------------------------------------------------------------------------------------------
// Below 256 KB of weights a thread costs more than it saves.
void run(const Product* products, int64_t count, int64_t rows) {
  int64_t panels = 0, floats = 0;
  for (int64_t i = 0; i < count; i++) {
    panels += products[i].panels;
    floats += products[i].panels * cpu::kPanelColumns * products[i].inputs;
  }
  parallel_range(panels, std::max<int64_t>(1, panels * 65536 / floats), [&](int64_t begin, int64_t end) {
    cpu::kernels<cpu::MegaKernels>().products(products, count, rows, begin, end);
  });
}

// Lays out the rows of every intermediate result, one behind the other.
struct Scratch {
  std::unique_ptr<float[]> memory;
  int64_t size = 0;
  int64_t take(int64_t floats) {
    const int64_t at = size;
    size += (floats + 15) / 16 * 16;
    return at;
  }
};

// states: per block the moving average (B, D, N) or (D, N), keys (B, T, k) and values (B, T, v), each without elements
// where there is none. lengths: nothing, or per block how many of the T rows each sequence has, the last ones; then the
// caller handles the chunk's end. Returns (B, 1, D), then per block the new average, keys and values; nothing if this
// step does not serve the arguments (the caller then takes the other path, which reports errors).
std::vector<Tensor> mega_step(const Tensor& packed, std::vector<int64_t> shape, const Tensor& bias, const Tensor& embed,
                              const Tensor& labels, std::vector<Tensor> states, std::vector<Tensor> lengths) {
  const MegaLayout l = layout_of(shape, "mega_step");
  const auto [size, orders, key, value, inner, blocks] = l.shape;
  const int64_t chunk = shape[6];
  const bool phantom = shape[7] != 0;
  check(is_plain(packed) && packed.numel() == l.total && packed.is_contiguous(), "mega_step", "packed");
  check(is_plain(bias) && bias.dim() == 2 && bias.size(0) == blocks && bias.is_contiguous(), "mega_step", "bias");
  check(is_plain(embed) && embed.dim() == 2 && embed.size(1) == size && embed.is_contiguous(), "mega_step", "embed");
  check(static_cast<int64_t>(states.size()) == kStates * blocks, "mega_step", "states");
  check(lengths.empty() || static_cast<int64_t>(lengths.size()) == blocks, "mega_step", "lengths");

  if (!labels.is_cpu() || dtype_of(labels) != ScalarType::Long || labels.dim() != 2 || labels.size(1) != 1 ||
      labels.size(0) == 0)
    return {};
  const int64_t rows = labels.size(0), symbols = embed.size(0), label_stride = labels.stride(0);
  const auto* label = data<int64_t>(labels);
  for (int64_t r = 0; r < rows; r++)
    if (label[r * label_stride] < 0 || label[r * label_stride] >= symbols) return {};
  int64_t longest = 0;
  for (int64_t b = 0; b < blocks; b++) {
    const Tensor &ema = states[kStates * b], &k = states[kStates * b + 1], &v = states[kStates * b + 2];
    if (!is_plain(ema) || !is_plain(k) || !is_plain(v)) return {};
    if (ema.numel() != 0) {
      if (ema.dim() < 2 || ema.dim() > 3 || ema.numel() != rows * size * orders || ema.size(ema.dim() - 1) != orders ||
          ema.size(ema.dim() - 2) != size)
        return {};
      if (!ema.is_contiguous()) states[kStates * b] = torch::stable::contiguous(ema);
    }
    const int64_t length = k.numel() == 0 ? 0 : k.dim() == 3 ? k.size(1) : -1;
    const int64_t others = v.numel() == 0 ? 0 : v.dim() == 3 ? v.size(1) : -1;
    if (length < 0 || length != others || length + 1 > bias.size(1)) return {};
    if (chunk > 0 && length + 1 > chunk) return {};
    if (length && (k.size(0) != rows || v.size(0) != rows || k.size(2) != key || v.size(2) != value)) return {};
    for (int64_t i = 1; i < kStates; i++)
      if (length && states[kStates * b + i].stride(2) != 1)
        states[kStates * b + i] = torch::stable::contiguous(states[kStates * b + i]);
    longest = std::max(longest, length + 1);
    if (lengths.empty()) continue;
    const Tensor& own = lengths[static_cast<size_t>(b)];
    if (!own.is_cpu() || dtype_of(own) != ScalarType::Long || own.numel() != rows || !own.is_contiguous()) return {};
    for (int64_t r = 0; r < rows; r++)
      if (data<int64_t>(own)[r] < 0 || data<int64_t>(own)[r] > length) return {};
  }

  const auto& kernel = cpu::kernels<cpu::MegaKernels>();
  Scratch s;
  const int64_t e = s.take(rows * size), query = s.take(rows * key), attended = s.take(rows * value);
  int64_t y[cpu::kMegaProducts];
  for (int i = 0; i < cpu::kMegaProducts; i++) y[i] = s.take(rows * l.stride[i]);
  const int64_t scores = s.take(rows * longest);
  s.memory.reset(new float[static_cast<size_t>(s.size)]);
  float* const m = s.memory.get();

  std::vector<Tensor> results;
  results.reserve(static_cast<size_t>(1 + kStates * blocks));
  results.push_back(new_contiguous(embed, {rows, 1, size}));
  auto* x = mutable_data<float>(results[0]);
  const auto* table = data<float>(embed);
  for (int64_t r = 0; r < rows; r++)
    std::memcpy(x + r * size, table + label[r * label_stride] * size, static_cast<size_t>(size) * 4);

  const float* const arena = data<float>(packed);
  for (int64_t b = 0; b < blocks; b++) {
    const float* block = arena + b * l.block;
    const auto product = [&](cpu::MegaProduct which, const float* from, int64_t from_stride, bool silu) -> Product {
      return {from,
              from_stride,
              l.inputs[which],
              block + l.weight[which],
              block + l.bias[which],
              m + y[which],
              l.stride[which],
              l.stride[which] / cpu::kPanelColumns,
              silu};
    };
    const Tensor& ema = states[static_cast<size_t>(kStates * b)];
    Tensor next = new_contiguous(embed, {rows, size, orders});
    kernel.average(l, block, x, ema.numel() ? data<float>(ema) : nullptr, mutable_data<float>(next), m + e, size, rows);
    const Product first[] = {product(cpu::kMegaV, x, size, true), product(cpu::kMegaU, m + e, size, false),
                             product(cpu::kMegaZ, m + e, size, true), product(cpu::kMegaR, m + e, size, true),
                             product(cpu::kMegaHx, m + e, size, false)};
    run(first, 5, rows);

    History keys = grow(states[static_cast<size_t>(kStates * b + 1)], rows, key);
    History values = grow(states[static_cast<size_t>(kStates * b + 2)], rows, value);
    const int64_t length = keys.view.size(1);
    const float* offsets = data<float>(bias) + (b + 1) * bias.size(1);  // behind the entry of distance 0
    const int64_t* own = lengths.empty() ? nullptr : data<int64_t>(lengths[static_cast<size_t>(b)]);
    const int64_t work = length * (key + value);
    parallel_range(rows, std::max<int64_t>(1, 8 * kGrain / work), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        float* k = keys.data + r * keys.sequence_stride;
        float* v = values.data + r * values.sequence_stride;
        std::memcpy(v + (length - 1) * values.row_stride, m + y[cpu::kMegaV] + r * l.stride[cpu::kMegaV],
                    static_cast<size_t>(value) * 4);
        kernel.query_key(l, block, m + y[cpu::kMegaZ] + r * l.stride[cpu::kMegaZ], m + query + r * key,
                         k + (length - 1) * keys.row_stride);
        const int64_t seen = own ? own[r] + 1 : length, from = length - seen;
        kernel.attention(l, m + query + r * key, k + from * keys.row_stride, keys.row_stride,
                         v + from * values.row_stride, values.row_stride, seen, offsets - seen,
                         m + y[cpu::kMegaR] + r * l.stride[cpu::kMegaR], m + scores + r * longest,
                         m + attended + r * value);
      }
    });

    const Product hidden = product(cpu::kMegaH, m + attended, value, false);
    run(&hidden, 1, rows);
    for (int64_t r = 0; r < rows; r++)
      kernel.gated_norm(x + r * size, m + y[cpu::kMegaU] + r * l.stride[cpu::kMegaU],
                        m + y[cpu::kMegaHx] + r * l.stride[cpu::kMegaHx],
                        m + y[cpu::kMegaH] + r * l.stride[cpu::kMegaH], block + l.vector[cpu::kMegaNormScale],
                        block + l.vector[cpu::kMegaNormBias], block[l.vector[cpu::kMegaNormEps]], size);
    const Product in = product(cpu::kMegaI, x, size, true);
    run(&in, 1, rows);
    const Product back = product(cpu::kMegaO, m + y[cpu::kMegaI], l.stride[cpu::kMegaI], false);
    run(&back, 1, rows);
    for (int64_t r = 0; r < rows; r++)
      kernel.norm(x + r * size, m + y[cpu::kMegaO] + r * l.stride[cpu::kMegaO],
                  block + l.vector[cpu::kMegaOuterNormScale], block + l.vector[cpu::kMegaOuterNormBias],
                  block[l.vector[cpu::kMegaOuterNormEps]], x + r * size, size);

    const bool ends = chunk > 0 && length == chunk && lengths.empty();
    results.push_back(next);
    results.push_back(after(keys, rows, length, key, ends, phantom));
    results.push_back(after(values, rows, length, value, ends, phantom));
  }
  for (int64_t r = 0; r < rows; r++)
    kernel.norm(x + r * size, nullptr, arena + l.final_scale, arena + l.final_bias, arena[l.final_eps], x + r * size,
                size);
  return results;
}

// Joins histories of different lengths (T_i, width) into one batch (B, max T, width) with room to grow: the shorter
// ones end where the longest does, with zeros in front.
Tensor mega_stack(std::vector<Tensor> states) {
  check(!states.empty(), "mega_stack", "no states");
  int64_t length = 0;
  const int64_t width = states[0].dim() == 2 ? states[0].size(1) : -1;
  for (const Tensor& t : states) {
    check(is_plain(t) && t.dim() == 2 && t.size(1) == width && (t.numel() == 0 || t.stride(1) == 1), "mega_stack",
          "states");
    length = std::max(length, t.size(0));
  }
  const auto batch = static_cast<int64_t>(states.size());
  if (length == 0) return new_contiguous(states[0], {batch, 0, width});
  const History h = new_history(states[0], batch, length, width, length + 1 + length / 8);
  for (int64_t b = 0; b < batch; b++) {
    const Tensor& t = states[static_cast<size_t>(b)];
    const int64_t taken = t.size(0), zeros = length - taken;
    float* row = h.data + b * h.sequence_stride;
    std::memset(row, 0, static_cast<size_t>(zeros * width) * 4);
    if (taken == 0) continue;
    const auto* from = data<float>(t);
    if (taken == 1 || t.stride(0) == width)
      std::memcpy(row + zeros * width, from, static_cast<size_t>(taken * width) * 4);
    else
      for (int64_t i = 0; i < taken; i++)
        std::memcpy(row + (zeros + i) * width, from + i * t.stride(0), static_cast<size_t>(width) * 4);
  }
  return h.view;
}

}  // namespace

FASTASR_UNDECLARED("fastasr/models/mega/decoding.py calls it under no_grad, with tensors of a decoder that it checked",
                   FASTASR_TYPED(mega_pack), FASTASR_TYPED(mega_step), FASTASR_TYPED(mega_stack))

}  // namespace fastasr::bindings::mega_step
