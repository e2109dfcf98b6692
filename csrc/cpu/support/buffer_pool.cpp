// SPDX-License-Identifier: Apache-2.0
#include "cpu/support/buffer_pool.h"

#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastasr::cpu {
namespace {

constexpr size_t kSmall = size_t{1} << 16;  // below this size memory comes from the allocator
constexpr size_t kHugePage = size_t{2} << 20;

struct Block {
  void* data;
  size_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> idle;                     // oldest first
  std::unordered_map<void*, size_t> borrowed;  // large ones
  size_t idle_bytes = 0;
};

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: tensors may outlive static objects
  return *instance;
}

size_t limit() {
#if defined(__linux__)
  static const size_t bytes =
      static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE)) / 16;
  return bytes;
#else
  return size_t{512} << 20;
#endif
}

void* allocate(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  void* data = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
#if defined(__linux__)
  if (data && bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

}  // namespace

void* acquire_buffer(size_t bytes) {
  if (bytes < kSmall) return allocate(bytes ? bytes : 64);
  Pool& p = pool();
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    size_t best = p.idle.size();
    for (size_t i = 0; i < p.idle.size(); i++)
      if (p.idle[i].bytes >= bytes && p.idle[i].bytes / 2 <= bytes &&
          (best == p.idle.size() || p.idle[i].bytes <= p.idle[best].bytes))
        best = i;
    if (best < p.idle.size()) {
      const Block block = p.idle[best];
      p.idle.erase(p.idle.begin() + static_cast<std::ptrdiff_t>(best));
      p.idle_bytes -= block.bytes;
      p.borrowed[block.data] = block.bytes;
      return block.data;
    }
  }
  void* data = allocate(bytes);
  if (!data) {
    free_idle_buffers();
    data = allocate(bytes);
  }
  if (data) {
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.borrowed[data] = bytes;
  }
  return data;
}

void release_buffer(void* buffer) {
  if (!buffer) return;
  Pool& p = pool();
  std::vector<void*> unwanted;
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    const auto found = p.borrowed.find(buffer);
    if (found == p.borrowed.end()) {
      unwanted.push_back(buffer);
    } else {
      p.idle.push_back({buffer, found->second});
      p.idle_bytes += found->second;
      p.borrowed.erase(found);
      size_t oldest = 0;
      while (p.idle_bytes > limit()) {
        unwanted.push_back(p.idle[oldest].data);
        p.idle_bytes -= p.idle[oldest++].bytes;
      }
      p.idle.erase(p.idle.begin(), p.idle.begin() + static_cast<std::ptrdiff_t>(oldest));
    }
  }
  for (void* data : unwanted) std::free(data);
}

size_t idle_buffer_bytes() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().idle_bytes;
}

void free_idle_buffers() {
  std::vector<Block> idle;
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    idle.swap(pool().idle);
    pool().idle_bytes = 0;
  }
  for (const Block& block : idle) std::free(block.data);
}

}  // namespace fastasr::cpu
