// Tiles of 128-byte rows in shared memory: how a block fills them, and how a warp multiplies what is in them.
//
// Both products of the operation are of rows with rows (x A^T and v B^T), so every tile is a piece of a row-major matrix and
// every fragment comes from ldmatrix without a transposition. All geometry is in bytes: a row holds 64 values of 16 bits or 32 of
// float32, and four steps of mma.sync either way.
#pragma once

#include "ptx.cuh"

namespace rode::gpu {

constexpr int kThreads = 128, kWarps = 4;
constexpr int kRowBytes = 128, kChunk = 16, kRowSteps = 4;

template <class T>
inline constexpr bool is_wide = sizeof(T) == 4;
template <class T>
inline constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));  // values of a tile's row

// A row of a matrix in global memory; `inside` says whether it exists.
template <class T>
struct Row {
  gmem<const T> at;
  bool inside;
};

// Columns [k, k + kUsed / sizeof(T)) of kRows rows, zeros where row or column (from `columns` on) do not exist. kCopy bytes
// are copied at once. Chunk c of a row stands at place c ^ key(row), so that the rows which one ldmatrix reads meet all banks.
template <int kCopy, int kRows, int kUsed, class T, class Source, class Key>
RODE_DEVICE void load_pieces(smem<T> tile, Source source, Key key, int k, int columns) {
  constexpr int kElements = kCopy / static_cast<int>(sizeof(T)), kPerRow = kUsed / kCopy, kPieces = kRows * kPerRow;
#pragma unroll(kCopy == 16 ? 8 : 2)
  for (int i = 0; i < (kPieces + kThreads - 1) / kThreads; ++i) {
    const int piece = i * kThreads + thread_index();
    if (kPieces % kThreads != 0 && piece >= kPieces) break;
    const int row = piece / kPerRow, byte = piece % kPerRow * kCopy;
    const int column = k + byte / static_cast<int>(sizeof(T)), left = (columns - column) * static_cast<int>(sizeof(T));
    const Row<T> from = source(row);
    const int valid = !from.inside || left <= 0 ? 0 : left < kCopy ? left : kCopy;
    const int place = row * kRowBytes + (byte / kChunk ^ key(row)) * kChunk + byte % kChunk;
    const smem<T> to = tile + place / static_cast<int>(sizeof(T));
    if constexpr (kElements == 1 && !is_wide<T>) {
      store(to, load(from.at + column, valid > 0));  // no asynchronous copy moves 2 bytes
    } else {
      cp_async<kCopy>(to, from.at + column, valid);
    }
  }
}

// `copy` bytes at once, as the matrix's alignment allows: 16, 4, or one value.
template <int kRows, int kUsed, class T, class Source, class Key>
RODE_DEVICE void load_tile(smem<T> tile, Source source, Key key, int k, int columns, int copy) {
  if (copy == 16) {
    load_pieces<16, kRows, kUsed>(tile, source, key, k, columns);
  } else if (is_wide<T> || copy == 4) {
    load_pieces<4, kRows, kUsed>(tile, source, key, k, columns);
  } else {
    load_pieces<static_cast<int>(sizeof(T)), kRows, kUsed>(tile, source, key, k, columns);
  }
}

template <class T>
RODE_DEVICE smem<T> at_chunk(smem<T> tile, int row, int key, int chunk) {
  return tile + (row * kRowBytes + (chunk ^ key) * kChunk) / static_cast<int>(sizeof(T));
}

// ---- Fragments. An accumulator's four values stand at rows fragment_row(0, 0, 1, 1) of 16 and columns fragment_column(0..3) of 8.

RODE_DEVICE int fragment_row(int i) { return lane_index() / 4 + i / 2 * 8; }

// float32: columns t and t + 4, where an operand of mma m16n8k8 wants them, instead of 2 t and 2 t + 1; so an accumulator becomes
// the left operand of the next product in the registers where it stands. tile_row puts the weights' rows accordingly.
template <class T>
RODE_DEVICE int fragment_column(int i) {
  const int t = lane_index() % 4;
  return is_wide<T> ? t + i % 2 * 4 : 2 * t + i % 2;
}
template <class T>
RODE_DEVICE int tile_row(int n) {
  return is_wide<T> ? n / 2 + n % 2 * 4 : n;
}

// A left operand (16 rows, 32 bytes). float32 is the sum of two tf32 values, high and low, unless `fast` leaves out the low one.
template <class T>
struct Left {
  uint32_t high[4], low[4];
};

// An infinity has no remainder, so it becomes NaN: what is not finite stays so.
RODE_DEVICE void split(uint32_t bits, bool fast, uint32_t& high, uint32_t& low) {
  const float x = bits_to_float(bits);
  high = to_tf32(x);
  low = fast ? 0u : to_tf32(x - bits_to_float(high));
}

template <class T>
RODE_DEVICE Left<T> left_operand(const uint32_t (&bits)[4], bool fast) {
  Left<T> a;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (is_wide<T>) {
      split(bits[i], fast, a.high[i], a.low[i]);
    } else {
      a.high[i] = bits[i];
      a.low[i] = 0;
    }
  }
  return a;
}

// c += a b for b of 8 columns. In float32 three tf32 products give all but 2^-22 of the exact one (the product of both low parts).
template <class T>
RODE_DEVICE void multiply(float (&c)[4], const Left<T>& a, uint32_t b0, uint32_t b1, bool fast) {
  if constexpr (is_wide<T>) {
    uint32_t high0, low0, high1, low1;
    split(b0, fast, high0, low0);
    split(b1, fast, high1, low1);
    if (!fast) {
      mma<tf32>(c, a.low, high0, high1);
      mma<tf32>(c, a.high, low0, low1);
    }
    mma<tf32>(c, a.high, high0, high1);
  } else {
    mma<T>(c, a.high, b0, b1);
  }
}

}  // namespace rode::gpu
