// The host's implementation of csrc/cuda/ptx.cuh: the same names and signatures, and a hidden source location.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "machine.h"

#define RODE_DEVICE inline
#define RODE_HOST_DEVICE
#define RODE_KERNEL(max_threads, min_blocks) void

namespace rode::gpu {

using emulator::At;
using emulator::machine;

inline int thread_index() { return machine().thread(); }
inline int lane_index() { return thread_index() % 32; }
inline int warp_index() { return thread_index() / 32; }
inline int block_threads() { return static_cast<int>(machine().current().threads); }
inline Dim block_index() { return machine().block(); }

// ---- Memory

template <class T>
class gmem {
 public:
  gmem() = default;
  gmem(T* data, int64_t count)
      : address(reinterpret_cast<uintptr_t>(data)),
        buffer(data ? machine().buffer(data, static_cast<size_t>(count) * sizeof(T)) : nullptr) {}
  template <class U>
    requires std::is_same_v<T, const U>
  gmem(gmem<U> other) : address(other.address), buffer(other.buffer) {}
  explicit operator bool() const { return address != 0; }
  gmem operator+(int64_t n) const {
    gmem other = *this;
    other.address += static_cast<uintptr_t>(n) * sizeof(T);
    return other;
  }

  uintptr_t address = 0;  // these two for this header only
  emulator::Buffer* buffer = nullptr;
};

template <class T>
class smem {
 public:
  smem(int64_t offset, int64_t low, int64_t high) : address(offset), low(low), high(high) {}
  smem operator+(int n) const { return {address + n * static_cast<int64_t>(sizeof(T)), low, high}; }
  smem operator^(unsigned bytes) const { return {address ^ static_cast<int64_t>(bytes), low, high}; }

  int64_t address, low, high;  // for this header only
};

template <class T>
smem<T> shared_array(int offset, int count, At at = At::current()) {
  const int64_t end = offset + static_cast<int64_t>(count) * static_cast<int64_t>(sizeof(T));
  if (end > machine().current().shared_bytes)
    machine().fail("shared_array ends at byte " + std::to_string(end) + " of " +
                       std::to_string(machine().current().shared_bytes),
                   at);
  return {offset, offset, end};
}

template <class V = void, class T>
moved<V, T> load(gmem<T> from, bool when = true, At at = At::current()) {
  using R = moved<V, T>;
  static_assert(movable<R, std::remove_const_t<T>>);
  R value{};
  machine().global(from.address, sizeof(R), from.buffer, false, when, at);
  if (when) std::memcpy(&value, reinterpret_cast<const void*>(from.address), sizeof(R));
  return value;
}

template <class T, class V>
void store(gmem<T> to, V value, bool when = true, At at = At::current()) {
  static_assert(movable<V, T>);
  machine().global(to.address, sizeof(V), to.buffer, true, when, at);
  if (when) std::memcpy(reinterpret_cast<void*>(to.address), &value, sizeof(V));
}

template <class V = void, class T>
moved<V, T> load(smem<T> from, bool when = true, At at = At::current()) {
  using R = moved<V, T>;
  static_assert(movable<R, T>);
  R value{};
  const void* data = machine().shared(from.address, sizeof(R), from.low, from.high, false, when, at);
  if (when) std::memcpy(&value, data, sizeof(R));
  return value;
}

template <class T, class V>
void store(smem<T> to, V value, bool when = true, At at = At::current()) {
  static_assert(movable<V, T>);
  void* data = machine().shared(to.address, sizeof(V), to.low, to.high, true, when, at);
  if (when) std::memcpy(data, &value, sizeof(V));
}

// ---- Asynchronous copies

template <int kBytes, class T, class U>
void cp_async(smem<T> to, gmem<U> from, int valid = kBytes, At at = At::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  static_assert(std::is_same_v<T, std::remove_const_t<U>>);
  machine().copy(to.address, to.low, to.high, from.address, from.buffer, kBytes, valid, at);
}
inline void cp_async_commit() { machine().commit(); }
template <int kPending>
void cp_async_wait() {
  machine().wait(kPending);
}

// ---- Order between threads

inline void sync_threads(At at = At::current()) { machine().barrier("sync_threads", false, at); }
inline bool sync_threads_or(bool mine, At at = At::current()) { return machine().barrier("sync_threads_or", mine, at); }
inline void sync_warp(At at = At::current()) { machine().sync_warp(at); }

// A value of every lane, and where the result goes.
template <class T>
struct Exchange {
  T value;
  int from;
  mutable T result;
};
template <class T>
T shuffle_xor(T value, int mask, At at = At::current()) {
  static_assert(sizeof(T) == 4);
  const int from = lane_index() ^ mask;
  if (from < 0 || from > 31) machine().fail("shuffle_xor from lane " + std::to_string(from), at);
  const Exchange<T> mine{value, from, value};
  machine().collect(
      "shuffle_xor", &mine,
      [](emulator::Warp&, const void* const* lanes) {
        const auto lane = [&](int i) { return static_cast<const Exchange<T>*>(lanes[i]); };
        for (int i = 0; i < 32; ++i) lane(i)->result = lane(lane(i)->from)->value;
      },
      at);
  return mine.result;
}
inline unsigned ballot(bool mine, At at = At::current()) {
  const Exchange<unsigned> vote{mine ? 1u << lane_index() : 0u, 0, 0};
  machine().collect(
      "ballot", &vote,
      [](emulator::Warp&, const void* const* lanes) {
        unsigned all = 0;
        for (int i = 0; i < 32; ++i) all |= static_cast<const Exchange<unsigned>*>(lanes[i])->value;
        for (int i = 0; i < 32; ++i) static_cast<const Exchange<unsigned>*>(lanes[i])->result = all;
      },
      at);
  return vote.result;
}

// ---- Conversions

inline uint32_t no_hoist(uint32_t x) { return x; }
inline uint32_t halves(uint32_t low, uint32_t high, bool upper) {
  return upper ? low >> 16 | (high & 0xffff0000u) : (low & 0xffffu) | high << 16;
}
inline uint32_t rotate_right(uint32_t x, int n) { return std::rotr(x, n); }
inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> 4 * i & 15u, byte = static_cast<uint32_t>(bytes >> 8 * (digit & 7u)) & 0xffu;
    y |= (digit < 8 ? byte : byte & 0x80u ? 0xffu : 0u) << 8 * i;
  }
  return y;
}
inline uint32_t set_if_at_least(uint32_t bits, uint32_t bit, uint32_t a, uint32_t b) { return a >= b ? bits | bit : bits; }
inline float bits_to_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t float_to_bits(float x) { return std::bit_cast<uint32_t>(x); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Exponent and mantissa moved into place are 2^112 too small, subnormals included.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}
template <class T>
T from_float(float x) {
  const uint32_t bits = float_to_bits(x);
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, bf16>) {
    if (std::isnan(x)) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else {
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t rest = bits & 0x7fffffff;
    const auto of = [&](uint32_t value) { return T{static_cast<uint16_t>(sign | value)}; };
    if (std::isnan(x)) return {0x7fff};
    if (rest >= 0x477ff000) return of(0x7c00);  // 65520 and above round to infinity
    if (rest < 0x38800000)                      // below 2^-14: a multiple of 2^-24, rounded by the addition
      return of(float_to_bits(bits_to_float(rest) + 0.5f) - float_to_bits(0.5f));
    return of((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
  }
}
template <class T>
uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
inline uint64_t wide_product(uint32_t a, uint32_t b) { return uint64_t{a} * b; }
inline uint32_t to_tf32(float x) { return std::isfinite(x) ? (float_to_bits(x) + 0x1000) & ~0x1fffu : float_to_bits(x); }

// ---- Tensor cores; fragments as in the PTX ISA manual, "Matrix multiply-accumulate operation using mma instruction"

template <int N, bool kTranspose = false, class T>
void ldmatrix(uint32_t (&r)[N], smem<T> row, At at = At::current()) {
  static_assert(N == 4 || (N == 2 && !kTranspose), "what kernels use");
  static_assert(sizeof(T) == 2 || !kTranspose, "transposing moves 16-bit values");
  struct Mine {
    int64_t address, low, high;
    uint32_t* r;
    At at;
  };
  const Mine mine{row.address, row.low, row.high, r, at};
  machine().collect(
      kTranspose ? "ldmatrix.trans" : "ldmatrix", &mine,
      [](emulator::Warp&, const void* const* lanes) {
        uintptr_t rows[32] = {};
        const auto lane = [&](int i) { return static_cast<const Mine*>(lanes[i]); };
        for (int i = 0; i < N; ++i) {
          uint16_t matrix[8][8];
          for (int j = 0; j < 8; ++j) {
            const Mine& from = *lane(8 * i + j);
            rows[8 * i + j] = static_cast<uintptr_t>(from.address);
            std::memcpy(matrix[j], machine().matrix_row(from.address, from.low, from.high, from.at), 16);
          }
          for (int j = 0; j < 32; ++j) {
            const int group = j / 4, pair = j % 4 * 2;
            const uint16_t low = kTranspose ? matrix[pair][group] : matrix[group][pair];
            const uint16_t high = kTranspose ? matrix[pair + 1][group] : matrix[group][pair + 1];
            lane(j)->r[i] = low | static_cast<uint32_t>(high) << 16;
          }
        }
        machine().count_matrix_rows(rows, 8 * N);
      },
      at);
}

// To float32, towards zero: tensor cores do not round to nearest when they add, and here never by luck.
inline float truncated(double x) {
  const float nearest = static_cast<float>(x);
  return std::isfinite(nearest) && std::abs(static_cast<double>(nearest)) > std::abs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

// The products of one instruction are added exactly, then the sum is truncated.
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, At at = At::current()) {
  constexpr bool kTf32 = std::is_same_v<T, tf32>;
  struct Mine {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  };
  const Mine mine{c, a, {b0, b1}};
  machine().collect(
      "mma", &mine,
      [](emulator::Warp&, const void* const* lanes) {
        constexpr int kDepth = kTf32 ? 8 : 16;
        double left[16][kDepth], right[kDepth][8], sum[16][8];
        const auto lane = [&](int i) { return static_cast<const Mine*>(lanes[i]); };
        // One register: a tf32 value at column t, or two 16-bit values at columns 2 t and 2 t + 1, of its half.
        const auto spread = [](uint32_t r, int t, int half, auto put) {
          if constexpr (kTf32) {
            put(t + 4 * half, bits_to_float(r & ~0x1fffu));  // the hardware does not look at the low bits
          } else {
            put(2 * t + 8 * half, to_float(T{static_cast<uint16_t>(r)}));
            put(2 * t + 1 + 8 * half, to_float(T{static_cast<uint16_t>(r >> 16)}));
          }
        };
        for (int i = 0; i < 32; ++i) {
          const int g = i / 4, t = i % 4;
          for (int half = 0; half < 2; ++half) {
            spread(lane(i)->a[2 * half], t, half, [&](int k, float x) { left[g][k] = x; });
            spread(lane(i)->a[2 * half + 1], t, half, [&](int k, float x) { left[g + 8][k] = x; });
            spread(lane(i)->b[half], t, half, [&](int k, float x) { right[k][g] = x; });
            for (int j = 0; j < 2; ++j) sum[g + 8 * half][2 * t + j] = lane(i)->c[2 * half + j];
          }
        }
        for (int m = 0; m < 16; ++m)
          for (int k = 0; k < kDepth; ++k)
            for (int n = 0; n < 8; ++n) sum[m][n] += left[m][k] * right[k][n];
        for (int i = 0; i < 32; ++i)
          for (int j = 0; j < 4; ++j) lane(i)->c[j] = truncated(sum[i / 4 + 8 * (j / 2)][i % 4 * 2 + j % 2]);
      },
      at);
}

// ---- Launch: runs to the end here; what a kernel does wrong is thrown as emulator::Error

template <class... P, class... A>
int launch(const Launch& l, void (*kernel)(P...), A... args) {
  machine().launch(l, [&] { kernel(args...); });
  return 0;
}
template <class... P>
int load_kernel(void (*)(P...), int) {
  return 0;
}
inline int enter_device(int) { return 0; }

}  // namespace rode::gpu
