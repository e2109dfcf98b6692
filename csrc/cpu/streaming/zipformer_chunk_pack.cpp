// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "cpu/streaming/zipformer_chunk.h"

namespace fastasr::cpu {

void chunk_pack_product(const ChunkPlan& plan, int64_t index, const float* w, const float* bias, char* weights,
                        float* vectors) {
  const ChunkProduct& p = plan.products[static_cast<size_t>(index)];
  const int64_t padded = p.stride();
  if (vectors)
    for (int64_t i = 0; i < padded; i++) vectors[p.bias + i] = bias && i < p.outputs ? bias[i] : 0;
  if (weights && p.rounds_inputs)
    pack_reduced(w, p.outputs, p.inputs, p.inputs, p.format, reinterpret_cast<int32_t*>(weights + p.weight),
                 vectors + p.scale, reinterpret_cast<int32_t*>(vectors + p.sums()), 0, padded / kReducedColumns);
  else if (weights)
    pack_panels(w, p.outputs, p.inputs, p.inputs, p.format, weights + p.weight, vectors ? vectors + p.scale : nullptr,
                0, panel_count(p.outputs));
}

void chunk_pack_table(const ChunkTable& table, const float* values, float* vectors) {
  for (int64_t r = 0; r < table.rows; r++) {
    float* const to = vectors + table.at + r * table.stride;
    std::memcpy(to, values + r * table.columns, static_cast<size_t>(table.columns) * 4);
    std::memset(to + table.columns, 0, static_cast<size_t>(table.stride - table.columns) * 4);
  }
}

}  // namespace fastasr::cpu
