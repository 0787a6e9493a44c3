#include "scratch.h"

#include <atomic>
#include <cstdlib>

namespace rode {
namespace {

constexpr std::size_t kMost = 32u << 20;

std::atomic<std::size_t> total{0};

struct Arena {
  char* data = nullptr;
  std::size_t size = 0, used = 0, wanted = 0, most = 0;
  ~Arena() {
    std::free(data);
    total -= most;
  }
};
thread_local Arena arena;

}  // namespace

void* take_scratch(std::size_t bytes) {
  Arena& a = arena;
  a.wanted += bytes;
  if (a.wanted > a.most) {
    total += a.wanted - a.most;
    a.most = a.wanted;
  }
  if (a.used + bytes > a.size) return nullptr;
  void* taken = a.data + a.used;
  a.used += bytes;
  return taken;
}

void give_back_scratch(std::size_t bytes, bool kept) {
  Arena& a = arena;
  a.wanted -= bytes;
  if (kept) a.used -= bytes;
  const std::size_t size = a.most < kMost ? a.most : kMost;
  if (a.wanted > 0 || size <= a.size) return;
  std::free(a.data);
  a.data = static_cast<char*>(std::aligned_alloc(64, size));
  a.size = a.data == nullptr ? 0 : size;
}

std::size_t scratch_bytes() { return total; }

}  // namespace rode
