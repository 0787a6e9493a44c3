// All inline PTX, and the only ways in which a kernel touches memory or another thread. Kernels hold no raw pointers.
// With RODE_EMULATE the same names come from csrc/emulator, which checks and counts every use: see docs/emulator.md.
#pragma once

#ifdef RODE_EMULATE
#include "../emulator/primitives.h"
#else

#include <cuda_runtime.h>

#include "types.cuh"

#define RODE_DEVICE __device__ __forceinline__
#define RODE_HOST_DEVICE __host__ __device__
#define RODE_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)

namespace rode::gpu {

// ---- Where am I

RODE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
RODE_DEVICE int lane_index() { return static_cast<int>(threadIdx.x & 31u); }
RODE_DEVICE int warp_index() { return static_cast<int>(threadIdx.x >> 5); }
RODE_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
RODE_DEVICE Dim block_index() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }

// ---- Memory: addresses that only the functions below follow

template <class T>
class gmem {
 public:
  gmem() = default;
  // `count` elements stand at `data`; only the emulator looks at it.
  __host__ __device__ gmem(T* data, int64_t /*count*/) : data_(data) {}
  template <class U>
    requires std::is_same_v<T, const U>
  __host__ __device__ gmem(gmem<U> other) : data_(other.data_) {}
  __host__ __device__ explicit operator bool() const { return data_ != nullptr; }
  RODE_DEVICE gmem operator+(int64_t n) const { return gmem(data_ + n, 0); }
  template <class V>
  RODE_DEVICE V* at() const {  // for this header only
    return reinterpret_cast<V*>(data_);
  }

 private:
  template <class U>
  friend class gmem;
  T* data_ = nullptr;
};

extern __shared__ __align__(1024) unsigned char dynamic_shared[];

// A 32-bit offset into the block's dynamic shared memory, the only kind that kernels use.
template <class T>
class smem {
 public:
  RODE_DEVICE explicit smem(unsigned offset) : offset_(offset) {}
  RODE_DEVICE smem operator+(int n) const { return smem(offset_ + static_cast<unsigned>(n) * unsigned{sizeof(T)}); }
  RODE_DEVICE smem operator^(unsigned bytes) const { return smem(offset_ ^ bytes); }
  template <class V>
  RODE_DEVICE V* at() const {  // for this header only
    return reinterpret_cast<V*>(dynamic_shared + offset_);
  }
  RODE_DEVICE unsigned address() const {  // in the shared window, for this header only
    return static_cast<unsigned>(__cvta_generic_to_shared(dynamic_shared)) + offset_;
  }

 private:
  unsigned offset_;
};

// `count` elements from byte `offset` of dynamic shared memory; the emulator holds every access to that range.
template <class T>
RODE_DEVICE smem<T> shared_array(int offset, int /*count*/) {
  return smem<T>(static_cast<unsigned>(offset));
}

template <class V = void, class T>
RODE_DEVICE moved<V, T> load(gmem<T> from) {
  using R = moved<V, T>;
  static_assert(movable<R, std::remove_const_t<T>>);
  return *from.template at<const R>();
}
// Zero unless `when`. The load itself has the predicate: the compiler turns an if into a branch, and then loads wait for one
// another. Volatile and with a clobber: otherwise the compiler takes a load out of a loop, past the barriers behind which other
// threads write there. It costs no instruction.
template <class V = void, class T>
RODE_DEVICE moved<V, T> load(gmem<T> from, bool when) {
  using R = moved<V, T>;
  static_assert(movable<R, std::remove_const_t<T>>);
  const auto address = __cvta_generic_to_global(from.template at<const void>());
  const int p = when;
  R value{};
  if constexpr (sizeof(R) == 2) {
    unsigned short w;
    asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; mov.b16 %0, 0; @p ld.global.b16 %0, [%1];}"
                 : "=&h"(w)
                 : "l"(address), "r"(p)
                 : "memory");
    memcpy(&value, &w, sizeof(R));
  } else {
    unsigned w[sizeof(R) / 4];
    if constexpr (sizeof(R) == 4) {
      asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; mov.b32 %0, 0; @p ld.global.b32 %0, [%1];}"
                   : "=&r"(w[0])
                   : "l"(address), "r"(p)
                   : "memory");
    } else if constexpr (sizeof(R) == 8) {
      asm volatile("{.reg .pred p; setp.ne.s32 p, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0; @p ld.global.v2.b32 {%0, %1}, [%2];}"
                   : "=&r"(w[0]), "=&r"(w[1])
                   : "l"(address), "r"(p)
                   : "memory");
    } else {
      asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0; "
                   "@p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];}"
                   : "=&r"(w[0]), "=&r"(w[1]), "=&r"(w[2]), "=&r"(w[3])
                   : "l"(address), "r"(p)
                   : "memory");
    }
    memcpy(&value, w, sizeof(R));
  }
  return value;
}

template <class T, class V>
RODE_DEVICE void store(gmem<T> to, V value, bool when = true) {
  static_assert(movable<V, T>);
  if (!when) return;
  if constexpr (sizeof(V) == 16 || sizeof(V) == 8) {  // the compiler does not always join what stands side by side
    unsigned w[sizeof(V) / 4];
    memcpy(w, &value, sizeof(V));
    const auto address = __cvta_generic_to_global(to.template at<void>());
    if constexpr (sizeof(V) == 16) {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
    } else {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(w[0]), "r"(w[1]) : "memory");
    }
  } else {
    *to.template at<V>() = value;
  }
}

template <class V = void, class T>
RODE_DEVICE moved<V, T> load(smem<T> from, bool when = true) {
  using R = moved<V, T>;
  static_assert(movable<R, T>);
  R value{};
  if (when) value = *from.template at<const R>();
  return value;
}

template <class T, class V>
RODE_DEVICE void store(smem<T> to, V value, bool when = true) {
  static_assert(movable<V, T>);
  if (when) *to.template at<V>() = value;
}

// ---- Asynchronous copies: the first `valid` of kBytes come from global memory, the rest become 0

template <int kBytes, class T, class U>
RODE_DEVICE void cp_async(smem<T> to, gmem<U> from, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  static_assert(std::is_same_v<T, std::remove_const_t<U>>);
  if constexpr (kBytes == 16) {  // .cg: past L1, which only 16 bytes can
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address()),
                 "l"(__cvta_generic_to_global(from.template at<const void>())), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to.address()),
                 "l"(__cvta_generic_to_global(from.template at<const void>())), "n"(kBytes), "r"(valid)
                 : "memory");
  }
}
RODE_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's newest groups are still on their way.
template <int kPending>
RODE_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Order between threads; every one below is called by all 32 lanes of a warp

RODE_DEVICE void sync_threads() { __syncthreads(); }
RODE_DEVICE bool sync_threads_or(bool mine) { return __syncthreads_or(mine) != 0; }
RODE_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
RODE_DEVICE T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4);
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
RODE_DEVICE unsigned ballot(bool mine) { return __ballot_sync(0xffffffffu, mine); }

// ---- Tensor cores

// N 8x8 matrices of 16-bit values; lane 8 i + j holds the address of row j of matrix i.
template <int N, bool kTranspose = false, class T>
RODE_DEVICE void ldmatrix(uint32_t (&r)[N], smem<T> row) {
  static_assert(N == 4 || (N == 2 && !kTranspose), "what kernels use");
  if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row.address())
                 : "memory");
  } else if constexpr (!kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row.address())
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row.address())
                 : "memory");
  }
}

// c += a b: m16n8k16 for bf16 and f16, m16n8k8 for tf32 (whose operands come from to_tf32).
template <class T>
RODE_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define RODE_MMA(instruction)                                                                                            \
  asm volatile("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"        \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, bf16>) {
    RODE_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (std::is_same_v<T, f16>) {
    RODE_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    static_assert(std::is_same_v<T, tf32>);
    RODE_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef RODE_MMA
}

// ---- Conversions, round to nearest even (tf32: ties away from zero)

RODE_DEVICE float to_float(float x) { return x; }
RODE_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
RODE_DEVICE float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <class T>
RODE_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    T y;
    if constexpr (std::is_same_v<T, bf16>) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    }
    return y;
  }
}
// Two 16-bit floats in a register, `low` in the lower half, as fragments hold them.
template <class T>
RODE_DEVICE uint32_t pack2(float low, float high) {
  uint32_t y;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  }
  return y;
}
RODE_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
// Keeps the compiler from computing what follows from x once before a loop: registers are scarcer than instructions.
RODE_DEVICE uint32_t no_hoist(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
// The upper, or lower, halves of two words in one.
RODE_DEVICE uint32_t halves(uint32_t low, uint32_t high, bool upper) { return __byte_perm(low, high, upper ? 0x7632 : 0x5410); }
RODE_DEVICE float bits_to_float(uint32_t x) { return __uint_as_float(x); }
RODE_DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }

RODE_DEVICE uint32_t rotate_right(uint32_t x, int n) { return __funnelshift_r(x, x, static_cast<unsigned>(n)); }  // by n % 32
// Bytes of two words, which `selector` names by hexadecimal digits: 0 to 3 of `low`, 4 to 7 of `high`; plus 8: eight times its top bit.
RODE_DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(low), "r"(high), "r"(selector));
  return y;
}
// bits | bit where a >= b, in two instructions.
RODE_DEVICE uint32_t set_if_at_least(uint32_t bits, uint32_t bit, uint32_t a, uint32_t b) {
  asm("{.reg .pred p; setp.hs.u32 p, %1, %2; @p or.b32 %0, %0, %3;}" : "+r"(bits) : "r"(a), "r"(b), "r"(bit));
  return bits;
}

// 32 by 32 to 64 bits in one instruction, which the compiler does not always see.
RODE_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) {
  uint64_t y;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(y) : "r"(a), "r"(b));
  return y;
}

// ---- Launch. The caller has set the device and loaded the kernel; returns a cudaError_t, 0 when queued.

template <class... P, class... A>
int launch(const Launch& l, void (*kernel)(P...), A... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(l.grid.x, l.grid.y, l.grid.z);
  config.blockDim = dim3(l.threads);
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = static_cast<cudaStream_t>(l.stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);  // not the thread's last error, which may be an old one
}

// The most bytes of shared memory that a block may ask for on `device`.
inline int max_shared(int device, int& bytes) {
  return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Makes the driver load a kernel on the current device now, because its first launch may be inside a stream capture, and lets the
// kernel ask for as much shared memory as there is. This is set once, because threads launch at the same time.
template <class... P>
int load_kernel(void (*kernel)(P...), int device) {
  int bytes = 0;
  if (const int error = max_shared(device, bytes)) return error;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  return error;
}

// Makes `device` current, to which the stream and every pointer belong.
inline int enter_device(int device) {
  int current = -1;
  const cudaError_t error = cudaGetDevice(&current);
  return error == cudaSuccess && current != device ? cudaSetDevice(device) : error;
}

}  // namespace rode::gpu
#endif
