// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) for dropout, and how its bits
// meet a fragment. The layout is the contract's: element e = m K + k uses word e & 3 of counter e >> 2.
#pragma once

#include "tile.cuh"

namespace rode::gpu {

RODE_DEVICE void philox(uint64_t counter, uint64_t seed, uint32_t (&c)[4]) {
  c[0] = static_cast<uint32_t>(counter);
  c[1] = static_cast<uint32_t>(counter >> 32);
  c[2] = c[3] = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = wide_product(0xD2511F53u, c[0]), p1 = wide_product(0xCD9E8D57u, c[2]);
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[1] = static_cast<uint32_t>(p1);
    c[3] = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Bit i: whether element `first` + i stays. Four elements a counter, so 8 counters, or 9 where `first` is not a multiple of 4.
RODE_DEVICE uint32_t keep_bits(uint64_t first, uint64_t seed, uint32_t threshold) {
  const int skew = static_cast<int>(first & 3);
  const auto four = [&](uint64_t counter) {
    uint32_t word[4], bits = 0;
    philox(counter, seed, word);
#pragma unroll
    for (int j = 0; j < 4; ++j) bits |= word[j] >= threshold ? 1u << j : 0u;
    return bits;
  };
  uint32_t low = 0, high = 0;
#pragma unroll 2
  for (int i = 0; i < 8; ++i) low |= four((first >> 2) + static_cast<uint64_t>(i)) << (4 * i);
  if (skew) high = four((first >> 2) + 8);
  return skew ? low >> skew | high << (32 - skew) : low;
}

// The keep bits of a tile of kRows rows of x, a word for 32 columns: computed once a block, read by every warp's fragments.
template <int kRows, class T>
RODE_DEVICE void fill_mask(smem<uint32_t> mask, int64_t m0, int k, int64_t K, uint64_t seed, uint32_t threshold, bool drop_all) {
  constexpr int kPerRow = kDepth<T> / 32;
  for (int i = thread_index(); i < kRows * kPerRow; i += block_threads()) {
    const int64_t element = (m0 + i / kPerRow) * K + k + i % kPerRow * 32;
    store(mask + i, drop_all ? 0u : keep_bits(static_cast<uint64_t>(element), seed, threshold));
  }
}

// Clears what was dropped from the fragment of rows row0 .. row0 + 15 at mma step `step`: by selection, so an infinity is gone too.
template <class T>
RODE_DEVICE void drop(uint32_t (&a)[4], smem<uint32_t> mask, int row0, int step) {
  constexpr int kPerRow = kDepth<T> / 32, kStep = 32 / static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = row0 + lane_index() / 4 + i % 2 * 8, column = step * kStep + i / 2 * (kStep / 2);
    const uint32_t word = load(mask + (row * kPerRow + column / 32)) >> (column % 32);
    const int t = lane_index() % 4;
    if constexpr (is_fp32<T>) {
      a[i] &= word >> t & 1 ? 0xffffffffu : 0u;
    } else {
      a[i] &= (word >> 2 * t & 1 ? 0xffffu : 0u) | (word >> (2 * t + 1) & 1 ? 0xffff0000u : 0u);
    }
  }
}

}  // namespace rode::gpu
