// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

// Large buffers that are used again. The allocator returns blocks above 32 MiB to the system at each release, and
// writing fresh memory costs a page fault every 4 KiB: 10 to 15 ms for the attention weights of one layer (40 MB),
// three times what computing them takes.
namespace fastasr::cpu {

// At least `bytes`, aligned to 64; null when there is no memory. A buffer that was released and is at most twice as
// large is taken again, the one that fits best.
void* acquire_buffer(size_t bytes);

// Buffers released are kept up to a sixteenth of the machine's memory in all; beyond it the oldest are freed.
void release_buffer(void* buffer);

size_t idle_buffer_bytes();
void free_idle_buffers();

}  // namespace fastasr::cpu
