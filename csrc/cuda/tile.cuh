// Tiles of 128-byte rows in shared memory: how a block fills them, and how a warp multiplies what is in them.
//
// Both products of the operation are of rows with rows (x A^T and v B^T), so every tile is a piece of a row-major matrix and
// every fragment comes from ldmatrix without a transposition. All geometry is in bytes: a row holds 64 values of 16 bits or 32 of
// float32, and four steps of mma.sync either way.
#pragma once

#include "ptx.cuh"

namespace rode::gpu {

constexpr int kThreads = 128, kWarps = 4;
// Threads of a forward block of kRows tokens: two warps for each 16 of 64 tokens, four warps for 16 tokens.
template <int kRows>
inline constexpr int kBlock = kRows == 64 ? 256 : 128;
constexpr int kRowBytes = 128, kChunk = 16, kRowSteps = 4;

template <class T>
inline constexpr bool is_fp32 = sizeof(T) == 4;
template <class T>
inline constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));  // values of a tile's row
template <class T>
inline constexpr int kChunkValues = kChunk / static_cast<int>(sizeof(T));

// Neither is negative.
RODE_DEVICE int64_t offset(int row, int distance) {
  return static_cast<int64_t>(wide_product(static_cast<uint32_t>(row), static_cast<uint32_t>(distance)));
}

// A row of a matrix in global memory; `inside` says whether it exists.
template <class T>
struct Row {
  gmem<const T> at;
  bool inside;
};

// The address of row `row` of A, or of the router, whose rows begin at `first_router`.
template <class T, template <class> class Params>
RODE_DEVICE Row<T> weight_row(const Params<T>& p, int row, int first_router) {
  const int router = row - first_router;
  return router < 0 ? Row<T>{p.A + offset(row, p.ld_A), row < p.R}
                    : Row<T>{p.router_weight + offset(router, p.ld_A), p.routed && router < p.N};
}

// Columns [k, k + kUsed / sizeof(T)) of kRows rows, zeros where row or column (from `columns` on) do not exist. kCopy bytes
// are copied at once by kFilling threads. Chunk c of a row stands at chunk c ^ swizzle(row), so that the rows which one ldmatrix
// reads meet all banks.
template <int kCopy, int kRows, int kUsed, int kFilling, class T, class Source, class Swizzle>
RODE_DEVICE void load_tile_by(smem<T> tile, Source source, Swizzle swizzle, int k, int columns) {
  constexpr int kSize = static_cast<int>(sizeof(T)), kPerRow = kUsed / kCopy;
  constexpr int kStep = kFilling / kPerRow, kPieces = (kRows + kStep - 1) / kStep;  // rows between a thread's pieces; how many
  static_assert(kFilling % kPerRow == 0, "so a thread's pieces all stand in the same columns");
  // Unsigned: divisions and remainders are then shifts and masks.
  const unsigned thread = static_cast<unsigned>(thread_index()) % kFilling;
  const int row0 = static_cast<int>(thread / kPerRow), byte = static_cast<int>(thread % kPerRow * kCopy);
  const int column = k + byte / kSize, left = (columns - column) * kSize;
  const int wanted = left <= 0 ? 0 : left < kCopy ? left : kCopy;
  const unsigned chunk = thread % kPerRow * kCopy / kChunk, rest = thread % kPerRow * kCopy % kChunk;
  const auto at = [&](int row) {
    const unsigned r = static_cast<unsigned>(row);
    return tile + static_cast<int>((r * kRowBytes + (chunk ^ swizzle(r)) * kChunk + rest) / unsigned{kSize});
  };
  if constexpr (kCopy < 4) {  // no asynchronous copy moves 2 bytes: some loads, then their stores, so that they overlap
    constexpr int kBatch = 4;
#pragma unroll 1
    for (int first = 0; first < kPieces; first += kBatch) {
      T value[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const Row<T> from = source(row0 + (first + i) * kStep);
        value[i] = load(from.at + column, from.inside && wanted > 0 && first + i < kPieces);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int row = row0 + (first + i) * kStep;
        store(at(row), value[i], row < kRows);
      }
    }
  } else {
#pragma unroll(kCopy == 16 ? kPieces : 4)
    for (int i = 0; i < kPieces; ++i) {
      const int row = row0 + i * kStep;
      if (kRows % kStep != 0 && row >= kRows) break;
      const Row<T> from = source(row);
      cp_async<kCopy>(at(row), from.at + column, from.inside ? wanted : 0);
    }
  }
}

// `copy` bytes at once, as the matrix's alignment allows: 16, 4, or one value.
template <int kRows, int kUsed, int kFilling = kThreads, class T, class Source, class Swizzle>
RODE_DEVICE void load_tile(smem<T> tile, Source source, Swizzle swizzle, int k, int columns, int copy) {
  if (copy == 16) {
    load_tile_by<16, kRows, kUsed, kFilling>(tile, source, swizzle, k, columns);
  } else if (is_fp32<T> || copy == 4) {
    load_tile_by<4, kRows, kUsed, kFilling>(tile, source, swizzle, k, columns);
  } else {
    load_tile_by<static_cast<int>(sizeof(T)), kRows, kUsed, kFilling>(tile, source, swizzle, k, columns);
  }
}

// A thread's part of copying tile after tile of one matrix, kCopy bytes at once. Its rows and its offsets in a tile are the same in
// each, so they are worked out once: a copy then costs few instructions beside itself. `swizzle` must be linear: swizzle(a ^ b) is
// swizzle(a) ^ swizzle(b).
// kAffine: rows are equally far apart, and one address is kept instead of one for each piece.
template <class T, int kCopy, int kRows, int kUsed, int kFilling, bool kAffine = false>
class TileCopy {
  static constexpr int kSize = static_cast<int>(sizeof(T)), kPerRow = kUsed / kCopy, kStep = kFilling / kPerRow;
  static constexpr int kCount = (kRows + kStep - 1) / kStep;
  static_assert(kFilling % kPerRow == 0 && (kStep & (kStep - 1)) == 0 && kCopy % kSize == 0);

 public:
  template <class Source, class Swizzle>
  RODE_DEVICE TileCopy(Source source, Swizzle swizzle) {
    const unsigned thread = static_cast<unsigned>(thread_index()) % kFilling, byte = thread % kPerRow * kCopy;
    row_ = static_cast<int>(thread / kPerRow);
    column_ = static_cast<int>(byte / kSize);
    const unsigned row = static_cast<unsigned>(row_), chunk = (byte / kChunk) ^ swizzle(row);
    smem_offset_ = static_cast<int>((row * kRowBytes + chunk * kChunk + byte % kChunk) / kSize);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Row<T> from = source(row_ + i * kStep);
      if (!kAffine || i == 0) at_[kAffine ? 0 : i] = from.at + column_;
      inside_ |= from.inside && row_ + i * kStep < kRows ? 1u << i : 0u;
    }
  }
  // A bit for each piece: whether its row is inside, or below `rows`.
  RODE_DEVICE unsigned inside() const { return inside_; }
  RODE_DEVICE unsigned below(int rows) const {
    unsigned found = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) found |= row_ + i * kStep < rows ? 1u << i : 0u;
    return found;
  }
  // Copies the elements `distance` further on, or zeros where `inside` has no bit or the matrix ends: it has `columns` columns
  // left. `stride`: elements from row to row, if kAffine.
  template <class Swizzle>
  RODE_DEVICE void copy(smem<T> tile, int64_t distance, unsigned inside, int columns, Swizzle swizzle, int stride = 0) const {
    const smem<T> to = tile + smem_offset_;
    const bool exists = column_ < columns;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (kRows % kStep != 0 && i == kCount - 1 && row_ + i * kStep >= kRows) break;
      const gmem<const T> from = kAffine ? at_[0] + (distance + offset(i * kStep, stride)) : at_[kAffine ? 0 : i] + distance;
      cp_async<kCopy>((to ^ swizzle(static_cast<unsigned>(i * kStep)) * kChunk) + i * kStep * (kRowBytes / kSize), from,
                      (inside >> i & 1) && exists ? kCopy : 0);
    }
  }

 private:
  gmem<const T> at_[kAffine ? 1 : kCount];
  unsigned inside_ = 0;
  int row_, column_, smem_offset_;
};

template <class T>
RODE_DEVICE smem<T> at_chunk(smem<T> tile, int row, unsigned swizzle, int chunk) {
  const unsigned smem_offset = static_cast<unsigned>(row) * kRowBytes + (static_cast<unsigned>(chunk) ^ swizzle) * kChunk;
  return tile + static_cast<int>(smem_offset / unsigned{sizeof(T)});
}

// ---- Fragments. An accumulator's four values stand at rows fragment_row(0, 0, 1, 1) of 16 and columns fragment_column(0..3) of 8.

RODE_DEVICE int fragment_row(int i) { return lane_index() / 4 + i / 2 * 8; }

// float32: columns t and t + 4, where an operand of mma m16n8k8 wants them, instead of 2 t and 2 t + 1; so an accumulator becomes
// the left operand of the next product in the registers where it stands. tile_row puts the weights' rows accordingly.
template <class T>
RODE_DEVICE int fragment_column(int i) {
  const int t = lane_index() % 4;
  return is_fp32<T> ? t + i % 2 * 4 : 2 * t + i % 2;
}
template <class T>
RODE_DEVICE int tile_row(int n) {
  return is_fp32<T> ? n / 2 + n % 2 * 4 : n;
}

// The values of 4 bytes: one float32, or two of 16 bits, the first in the lower half.
template <class T>
RODE_DEVICE float unpack(uint32_t word, int i) {
  if constexpr (is_fp32<T>) {
    return bits_to_float(word);
  } else {
    return to_float(T{static_cast<uint16_t>(i == 0 ? word : word >> 16)});
  }
}
// The other way: words of the values that value(i) gives.
template <class T, int kWords, class Value>
RODE_DEVICE vec<uint32_t, kWords> pack_words(Value value) {
  vec<uint32_t, kWords> out;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    if constexpr (is_fp32<T>) {
      out.v[w] = float_to_bits(value(w));
    } else {
      out.v[w] = pack2<T>(value(2 * w), value(2 * w + 1));
    }
  }
  return out;
}

// The left operand of an mma (16 rows, 32 bytes). float32 is the sum of two tf32 values, high and low, unless `fast` does without
// the low one.
template <class T>
struct FragmentA {
  uint32_t high[4], low[4];
};

// x = high + low to 2^-21 of x, high rounded, the low one's last bits left for the tensor core to ignore. An infinity has no
// remainder, so it becomes NaN, which here lives in the low part: what is not finite stays so.
RODE_DEVICE void split(uint32_t bits, uint32_t& high, uint32_t& low) {
  high = (bits + 0x1000u) & ~0x1fffu;
  low = float_to_bits(bits_to_float(bits) - bits_to_float(high));
}

template <class T>
RODE_DEVICE FragmentA<T> fragment_a(const uint32_t (&bits)[4], bool fast) {
  FragmentA<T> a;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (!is_fp32<T>) {
      a.high[i] = bits[i];
      a.low[i] = 0;
    } else if (fast) {
      a.high[i] = to_tf32(bits_to_float(bits[i]));
      a.low[i] = 0;
    } else {
      split(bits[i], a.high[i], a.low[i]);
    }
  }
  return a;
}

// c += a b for b of 8 columns. In float32 three tf32 products give all but the product of both low parts, 2^-22 of the exact one.
// That one would make the error larger: tensor cores truncate once for every product (docs/cuda.md).
template <class T>
RODE_DEVICE void multiply(float (&c)[4], const FragmentA<T>& a, uint32_t b0, uint32_t b1, bool fast) {
  if constexpr (!is_fp32<T>) {
    mma<T>(c, a.high, b0, b1);
  } else if (fast) {
    mma<tf32>(c, a.high, to_tf32(bits_to_float(b0)), to_tf32(bits_to_float(b1)));
  } else {
    uint32_t high0, low0, high1, low1;
    split(b0, high0, low0);
    split(b1, high1, low1);
    mma<tf32>(c, a.low, high0, high1);
    mma<tf32>(c, a.high, low0, low1);
    mma<tf32>(c, a.high, high0, high1);
  }
}

// c += piece, for arrays of any shape.
template <class V, int kCount>
RODE_DEVICE void add_to(V (&c)[kCount], const V (&piece)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if constexpr (std::is_array_v<V>) {
      add_to(c[i], piece[i]);
    } else {
      c[i] += piece[i];
    }
}

// Sums over 128 bytes, added to c. Tensor cores truncate when they add: float32 keeps its accuracy by adding up such pieces itself.
template <class T, class Sums, class Products>
RODE_DEVICE void accumulate(Sums& c, Products products) {
  if constexpr (is_fp32<T>) {
    Sums piece = {};
    products(piece);
    add_to(c, piece);
  } else {
    products(c);
  }
}

}  // namespace rode::gpu
