// Operands from tiles whose rows run along the sum: tokens, where weights' gradients are summed over them.
#pragma once

#include "tile.cuh"

namespace rode::gpu {

// Rows of a tile that one mma sums over; 32 bytes of a row are as many columns.
template <class T>
inline constexpr int kStepRows = is_fp32<T> ? 8 : 16;

// Different for the 8 rows that an ldmatrix reads. float32 has no transposed ldmatrix: there lanes read single values of 4 rows and
// 8 columns, two chunks, so the swizzles of rows 0 .. 3 (and 4 .. 7) differ in more than the last bit.
template <class T>
RODE_DEVICE unsigned tile_swizzle(unsigned row) {
  return is_fp32<T> ? (2 * row + row / 4 % 2) % 8 : row % 8;
}

// Rows row0 .. of 16 columns from chunk `chunk` on, as a left operand with these columns as its rows.
template <class T>
RODE_DEVICE void load_a_transposed(uint32_t (&a)[4], smem<T> tile, int row0, int chunk) {
  const int lane = lane_index();
  if constexpr (is_fp32<T>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + lane % 4 + i / 2 * 4, column = lane / 4 + i % 2 * 8;
      a[i] = float_to_bits(load(at_chunk(tile, row, tile_swizzle<T>(row), chunk + column / 4) + column % 4));
    }
  } else {
    const int row = row0 + lane % 8 + lane / 16 * 8;
    ldmatrix<4, true>(a, at_chunk(tile, row, tile_swizzle<T>(row), chunk + lane / 8 % 2));
  }
}

// Rows row0 .. of 8 kCount columns from chunk `chunk` on, as kCount right operands of 8 columns each.
template <class T, int kCount>
RODE_DEVICE void load_b_transposed(uint32_t (*b)[2], smem<T> tile, int row0, int chunk) {
  const int lane = lane_index();
  if constexpr (is_fp32<T>) {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = row0 + lane % 4 + i * 4, column = lane / 4;
        b[j][i] = float_to_bits(load(at_chunk(tile, row, tile_swizzle<T>(row), chunk + 2 * j + column / 4) + column % 4));
      }
  } else {
    static_assert(kCount % 2 == 0);
#pragma unroll
    for (int j = 0; j < kCount; j += 2) {
      const int row = row0 + lane % 8 + lane / 8 % 2 * 8;
      uint32_t r[4];
      ldmatrix<4, true>(r, at_chunk(tile, row, tile_swizzle<T>(row), chunk + j + lane / 16));
      b[j][0] = r[0];
      b[j][1] = r[1];
      b[j + 1][0] = r[2];
      b[j + 1][1] = r[3];
    }
  }
}

// The plain left operand: 16 rows, and 32 bytes of columns from chunk `chunk` on.
template <class T>
RODE_DEVICE void load_a(uint32_t (&a)[4], smem<T> tile, int row0, int chunk) {
  const int row = row0 + lane_index() % 16;
  ldmatrix<4>(a, at_chunk(tile, row, tile_swizzle<T>(row), chunk + lane_index() / 16));
}

// A right operand of one mma, read from where `value(k, n)` says.
template <class T, class Value>
RODE_DEVICE void gather_b(uint32_t (&b)[2], Value value) {
  const int t = lane_index() % 4, n = lane_index() / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (is_fp32<T>) {
      b[i] = float_to_bits(value(t + 4 * i, n));
    } else {
      const T low = value(2 * t + 8 * i, n), high = value(2 * t + 8 * i + 1, n);
      b[i] = low.bits | static_cast<uint32_t>(high.bits) << 16;
    }
  }
}

// Sums of these kernels stand in columns 2 t and 2 t + 1, whatever the type: they become no operand.
RODE_DEVICE int sum_column(int i) { return 2 * (lane_index() % 4) + i % 2; }

RODE_DEVICE bool warp_any(const uint32_t (&a)[4]) { return ballot((a[0] | a[1] | a[2] | a[3]) != 0) != 0; }

}  // namespace rode::gpu
