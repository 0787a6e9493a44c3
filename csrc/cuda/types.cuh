// Types that the device header and its emulation share: values without behaviour.
#pragma once

#include <cstdint>
#include <type_traits>

namespace rode::gpu {

// 16-bit floats as bits: arithmetic is in float32, and cuda_fp16.h does not exist on the host.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct tf32;  // names an mma shape; its values stand in 32-bit registers

// N values that one 4, 8 or 16-byte instruction moves.
template <class T, int N>
struct alignas(sizeof(T) * N) vec {
  T v[N];
};

// The type that a load or store of V through an address of T moves: a T, or a vec of several.
template <class V, class T>
using moved = std::conditional_t<std::is_void_v<V>, std::remove_const_t<T>, V>;
template <class V, class T>
inline constexpr bool movable = (std::is_same_v<V, T> || sizeof(V) > sizeof(T)) && sizeof(V) % sizeof(T) == 0 &&
                                sizeof(V) <= 16 && alignof(V) == sizeof(V);

// Shared memory that a block may ask for on every device of compute capability 8.0 and newer. Kernels without an
// alternative plan ask for no more.
constexpr int kMaxShared = 99 * 1024;

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// One launch in stream order. Blocks are one-dimensional and whole warps; `kernel` names it in errors.
struct Launch {
  const char* kernel;
  Dim grid;
  unsigned threads;
  unsigned shared_bytes = 0;
  void* stream = nullptr;
};

}  // namespace rode::gpu
