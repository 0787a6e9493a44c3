// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) for dropout, and how its bits
// meet a fragment. The layout is the contract's: element e = m K + k uses word e & 3 of counter e >> 2.
#pragma once

#include "tile.cuh"

namespace rode::gpu {

// The words of kCount counters from `counter` on. They go through the rounds together, so that a round's key is made once.
template <int kCount>
RODE_DEVICE void philox(uint64_t counter, uint64_t seed, uint32_t (&c)[kCount][4]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {  // the first round, of a counter whose upper half is 0
    const uint64_t at = counter + static_cast<uint64_t>(i), p0 = wide_product(0xD2511F53u, static_cast<uint32_t>(at));
    c[i][0] = static_cast<uint32_t>(at >> 32) ^ k0;
    c[i][1] = 0;
    c[i][2] = static_cast<uint32_t>(p0 >> 32) ^ k1;
    c[i][3] = static_cast<uint32_t>(p0);
  }
#pragma unroll
  for (int round = 1; round < 10; ++round) {
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint64_t p0 = wide_product(0xD2511F53u, c[i][0]), p1 = wide_product(0xCD9E8D57u, c[i][2]);
      c[i][0] = static_cast<uint32_t>(p1 >> 32) ^ c[i][1] ^ k0;
      c[i][2] = static_cast<uint32_t>(p0 >> 32) ^ c[i][3] ^ k1;
      c[i][1] = static_cast<uint32_t>(p1);
      c[i][3] = static_cast<uint32_t>(p0);
    }
  }
}

// Bit i of the 4 kCount lowest: whether element `first` + i stays. kWhole: `first` is a multiple of 4; otherwise the bits above those
// are not 0.
template <int kCount, bool kWhole>
RODE_DEVICE uint32_t keep_bits(uint64_t first, uint64_t seed, uint32_t threshold) {
  uint32_t word[kCount][4], bits = 0;
  philox(first >> 2, seed, word);
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) bits = set_if_at_least(bits, 1u << i, word[i / 4][i % 4], threshold);
  if constexpr (!kWhole) {
    const int skew = static_cast<int>(first & 3);
    if (skew) {
      uint32_t next[1][4];
      philox((first >> 2) + kCount, seed, next);
#pragma unroll
      for (int i = 0; i < 4; ++i) bits = set_if_at_least(bits, 1u << (4 * kCount + i), next[0][i], threshold);
      bits >>= skew;
    }
  }
  return bits;
}

// The keep bits of kRows rows and kColumns columns of x from column k on, a word for 32 columns: computed once by all kFilling
// threads of a block, read by every warp's fragments. A thread makes 16 bits at a time; where that leaves some idle, several make
// them together. kWhole: K and k are multiples of 4.
template <int kRows, int kColumns, int kFilling, bool kWhole>
RODE_DEVICE void fill_mask(smem<uint16_t> mask, int m0, int k, int K, uint64_t seed, uint32_t threshold, bool drop_all) {
  constexpr int kPerRow = kColumns / 16, kHalves = kRows * kPerRow;
  constexpr int kParts = kFilling > kHalves ? kFilling / kHalves : 1, kCount = 4 / kParts;
  static_assert(kCount * kParts == 4 && kHalves * kParts % kFilling == 0);
#pragma unroll 1
  for (int i = thread_index(); i < kHalves * kParts; i += kFilling) {
    const int half = i / kParts, column = k + half % kPerRow * 16 + i % kParts * 4 * kCount;
    const int64_t first = offset(m0 + half / kPerRow, K) + column;
    uint32_t bits = drop_all ? 0u : keep_bits<kCount, kWhole>(static_cast<uint64_t>(first), seed, threshold);
    if constexpr (!kWhole && kParts > 1) bits &= (1u << 4 * kCount) - 1;
#pragma unroll
    for (int n = 1; n < kParts; n *= 2) bits |= shuffle_xor(bits, n) << 4 * kCount * n;
    store(mask + half, static_cast<uint16_t>(bits), i % kParts == 0);
  }
}

// 32 columns of a row of a mask that has `words` of them, turned so that column `column` is at the top of the lowest byte, and the
// columns 8, 16 and 24 after it at the top of the others.
RODE_DEVICE uint32_t turned_bits(smem<uint16_t> mask, int words, int row, int column) {
  return rotate_right(load<uint32_t>(mask + 2 * (row * words + column / 32)), column - 7);
}

// Clears what was dropped from the fragment of rows row0 .. row0 + 15 at mma step `step`: by selection, so an infinity is gone too.
template <class T>
RODE_DEVICE void drop(uint32_t (&a)[4], smem<uint16_t> mask, int row0, int step) {
  constexpr int kWords = kDepth<T> / 32, kStep = 32 / static_cast<int>(sizeof(T));
  const int row = row0 + lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (is_fp32<T>) {  // columns t and t + 4
      const uint32_t bits = turned_bits(mask, kWords, row + 8 * i, step * kStep + t);
      a[i] &= pick_bytes(bits, 0, 0x8888);
      a[i + 2] &= pick_bytes(bits >> 4, 0, 0x8888);
    } else {  // 2 t and 2 t + 1, and those 8 on
      const uint32_t odd = turned_bits(mask, kWords, row + 8 * i, step * kStep + 2 * t + 1), even = odd << 1;
      a[i] &= pick_bytes(even, odd, 0xcc88);
      a[i + 2] &= pick_bytes(even, odd, 0xdd99);
    }
  }
}

// Clears what was dropped, row by row of the mask: from right operands of x (rows run along the sum), and from sums that become dx.
// A warp's columns stand in one word.
template <class T, int kCount>
RODE_DEVICE void drop_b(uint32_t (&b)[kCount][2], smem<uint16_t> mask, int words, int row0, int column0) {
  const int t = lane_index() % 4, column = column0 + lane_index() / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (is_fp32<T>) {
      const uint32_t bits = turned_bits(mask, words, row0 + t + 4 * i, column);
#pragma unroll
      for (int j = 0; j < kCount; ++j) b[j][i] &= pick_bytes(bits, 0, 0x8888u + 0x1111u * static_cast<uint32_t>(j));
    } else {
      const int row = row0 + 2 * t + 8 * i;
      const uint32_t even = turned_bits(mask, words, row, column), odd = turned_bits(mask, words, row + 1, column);
#pragma unroll
      for (int j = 0; j < kCount; ++j) b[j][i] &= pick_bytes(even, odd, 0xcc88u + 0x1111u * static_cast<uint32_t>(j));
    }
  }
}
// A lane's columns of dx are neighbours: `column` is its first one.
template <int kTiles>
RODE_DEVICE void drop_sums(float (&c)[kTiles][4], smem<uint16_t> mask, int words, int row0, int column) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + lane_index() / 4 + 8 * half;
    const uint32_t bits = load<uint32_t>(mask + 2 * (row * words + column / 32)) >> (column % 32);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i)
      if (!(bits >> i & 1)) c[i / 2][2 * half + i % 2] = 0.0f;
  }
}
// c += piece, where the mask keeps it: by selection, too.
template <int kTiles>
RODE_DEVICE void add_kept(float (&c)[kTiles][4], const float (&piece)[kTiles][4], smem<uint16_t> mask, int words, int row0,
                          int column) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + lane_index() / 4 + 8 * half;
    const uint32_t bits = load<uint32_t>(mask + 2 * (row * words + column / 32)) >> (column % 32);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i)
      if (bits >> i & 1) c[i / 2][2 * half + i % 2] += piece[i / 2][2 * half + i % 2];
  }
}

}  // namespace rode::gpu
