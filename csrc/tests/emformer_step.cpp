// SPDX-License-Identifier: Apache-2.0
#include "cpu/streaming/emformer_step.h"

#include "tests/check.h"

// Values are compared with the model's own operations in tests/models/test_emformer_streaming.py. These tests check
// what is read and written, the states that are handed on, and that a stream's bits depend on nothing but the stream.
namespace fastasr::test {
namespace {

struct Shape {
  int64_t frames, right, left, memory;
};

// The inputs or outputs, (rows, streams, dim) each.
struct Tensors {
  std::vector<float> utterance, right_context, mems, memory, key, value;
  static constexpr std::vector<float> Tensors::* kAll[] = {
      &Tensors::utterance, &Tensors::right_context, &Tensors::mems, &Tensors::memory, &Tensors::key, &Tensors::value};
};

bool same(const Tensors& a, const Tensors& b) {
  for (const auto t : Tensors::kAll)
    if ((a.*t).size() != (b.*t).size() ||
        (!(a.*t).empty() && std::memcmp((a.*t).data(), (b.*t).data(), (a.*t).size() * sizeof(float)) != 0))
      return false;
  return true;
}

Tensors one_of(const Tensors& all, int64_t dim, int64_t streams, int64_t index) {
  Tensors one;
  for (const auto t : Tensors::kAll)
    for (size_t at = static_cast<size_t>(index * dim); at < (all.*t).size(); at += static_cast<size_t>(streams * dim))
      (one.*t).insert((one.*t).end(), (all.*t).begin() + static_cast<ptrdiff_t>(at),
                      (all.*t).begin() + static_cast<ptrdiff_t>(at) + dim);
  return one;
}

struct Layer {
  cpu::EmformerLayout layout;
  Buffer<float> arena;

  explicit Layer(const cpu::EmformerShape& shape) : layout(shape), arena(layout.total) {
    Random random(5);
    for (int i = 0; i < cpu::kEmformerProducts; i++) {
      Buffer<float> w(layout.outputs[i] * layout.inputs[i], 0, random,
                      1 / std::sqrt(static_cast<double>(layout.inputs[i]))),
          bias(layout.outputs[i], 0, random, 0.3);
      cpu::emformer_pack_product(layout, static_cast<cpu::EmformerProduct>(i), w, bias, arena);
    }
    for (int i = 0; i < cpu::kEmformerNorms; i++) {
      Buffer<float> w(shape.dim, 0, random, 0.3, 1), bias(shape.dim, 0, random, 0.3);
      cpu::emformer_pack_norm(layout, static_cast<cpu::EmformerNorm>(i), w, bias, arena);
    }
  }

  Tensors run(const Shape& s, const Tensors& in, const std::vector<int64_t>& lengths, int64_t streams,
              const std::vector<int64_t>& kept, int64_t threads) {
    const int64_t dim = layout.shape.dim, row = streams * dim;
    const int64_t history[2] = {s.left / 2, s.memory / 2};
    const auto rows = [&](const std::vector<float>& t) { return cpu::Sequence<const float>{t.data(), row, dim}; };
    Buffer<float> y((s.right + s.frames) * row), mems(s.memory ? row : 0);
    Buffer<float> memory(s.memory * row), key(s.left * row), value(s.left * row);
    cpu::EmformerSegment segment{layout,
                                 arena,
                                 streams,
                                 s.frames,
                                 s.right,
                                 s.left,
                                 s.memory,
                                 rows(in.utterance),
                                 rows(in.right_context),
                                 rows(in.mems),
                                 in.memory.data(),
                                 in.key.data(),
                                 in.value.data(),
                                 lengths.empty() ? nullptr : lengths.data(),
                                 history,
                                 kept.data(),
                                 y,
                                 mems,
                                 memory,
                                 key,
                                 value,
                                 nullptr,
                                 {threads, run_threads}};
    const auto& kernel = cpu::kernels<cpu::EmformerKernels>();
    Buffer<float> scratch(kernel.scratch_floats(segment));
    scratch.set(std::numeric_limits<double>::quiet_NaN());
    segment.scratch = scratch;
    kernel.step(segment);
    const auto all = [](Buffer<float>& t) { return std::vector<float>(t.data(), t + t.size()); };
    return {
        {y + s.right * row, y + y.size()}, {y.data(), y + s.right * row}, all(mems), all(memory), all(key), all(value)};
  }
};

void streams(const cpu::EmformerShape& shape, const Shape& s, bool ragged) {
  constexpr int64_t kStreams = 3;
  Layer layer(shape);
  Random random(static_cast<uint64_t>(s.frames * 31 + s.left));
  Tensors in;
  const int64_t rows[] = {s.frames, s.right, s.memory ? 1 : 0, s.memory, s.left, s.left};
  for (size_t i = 0; i < 6; i++) {
    std::vector<float>& t = in.*Tensors::kAll[i];
    t.resize(static_cast<size_t>(rows[i] * kStreams * shape.dim));
    for (float& v : t) v = static_cast<float>(random.normal());
  }
  const std::vector<int64_t> lengths =
      ragged ? std::vector<int64_t>{s.frames, 1, s.frames / 2} : std::vector<int64_t>{};
  std::vector<int64_t> kept;
  for (int64_t i = 0; i < s.left; i++) kept.push_back((i * 7 + 3) % (s.left + s.frames));
  const Tensors together = layer.run(s, in, lengths, kStreams, kept, 1);
  CHECK(same(together, layer.run(s, in, lengths, kStreams, kept, 3)), "threads changed bits, %ld frames",
        long(s.frames));
  for (int64_t i = 0; i < kStreams; i++) {
    const std::vector<int64_t> own(ragged ? 1 : 0, ragged ? lengths[i] : 0);
    const Tensors alone = layer.run(s, one_of(in, shape.dim, kStreams, i), own, 1, kept, 1);
    CHECK(same(one_of(together, shape.dim, kStreams, i), alone), "stream %ld of %ld frames differs alone", long(i),
          long(s.frames));
    for (const float v : alone.utterance) CHECK(std::isfinite(v), "read what was not written");
  }
  // the left context is the rows that were picked, the memory moves up by the input memory
  const auto row = static_cast<size_t>(kStreams * shape.dim);
  for (size_t i = 0; i < kept.size(); i++)
    if (kept[i] < s.left)
      for (const auto t : {&Tensors::key, &Tensors::value})
        CHECK(std::memcmp((together.*t).data() + i * row, (in.*t).data() + static_cast<size_t>(kept[i]) * row,
                          row * sizeof(float)) == 0,
              "left context, row %zu", i);
  if (!s.memory) return;
  std::vector<float> memory(in.memory.begin() + static_cast<ptrdiff_t>(row), in.memory.end());
  memory.insert(memory.end(), in.mems.begin(), in.mems.end());
  CHECK(memory == together.memory, "memory of %ld", long(s.memory));
  for (const float v : together.mems)
    CHECK(std::fabs(v) <= (shape.tanh_memory ? 1 : 10), "memory out of bounds: %g", v);
}

}  // namespace

TEST_CASE("emformer_step") {
  const cpu::EmformerShape odd{42, 3, 70, 4, true, {1e-5, 1e-5, 1e-5}}, even{64, 2, 128, 2, false, {1e-5, 1e-3, 1e-12}};
  for (const bool ragged : {false, true}) {
    for (const Shape& s : {Shape{4, 2, 6, 3}, Shape{1, 0, 5, 1}, Shape{9, 1, 0, 0}, Shape{3, 4, 2, 0}})
      streams(odd, s, ragged);
    streams(even, {16, 4, 30, 4}, ragged);
  }
}

}  // namespace fastasr::test
