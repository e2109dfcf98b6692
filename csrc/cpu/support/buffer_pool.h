// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

// Buffers from 64 KiB on are reused. The allocator returns blocks above 32 MiB to the system at each release, and the
// end of its heap whenever enough of it is free. Writing fresh memory costs a page fault every 4 KiB: 10 to 15 ms for
// the attention weights of one layer (40 MB), three times as long as computing them.
namespace fastasr::cpu {

// Returns at least `bytes`, aligned to 64, or null when there is no memory. It reuses the released buffer that fits
// best and is at most twice as large.
void* acquire_buffer(size_t bytes);

// The pool keeps released buffers up to a sixteenth of the machine's memory in all; beyond it the oldest are freed.
void release_buffer(void* buffer);

size_t idle_buffer_bytes();
void free_idle_buffers();

}  // namespace fastasr::cpu
