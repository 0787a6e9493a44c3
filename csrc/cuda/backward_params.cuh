// Backward, from dy (M, O) and, where gates were returned, their gradient dgates (M, N):
//
//   t = dy B      du = scaling g t     dg_i = scaling_i <t_i, u_i>     dh = (dg + dgates) [g != 0]
//   dB = dy^T v   dA = du^T drop(x)    dWr = dh^T x, dbr = sum dh      dx = drop'(du A) + dh Wr
//
//   grad_output_pass  reads dy: t, summed over a tile of O, and dB of a range of tokens. One reading of 16 tokens serves both;
//                     B's part stands in registers, and so do dB's sums.
//   gate_backward     adds up t in order, for du, dg and dh; they go to D, side by side, as x's type. dbr of 16 tokens. It also
//                     records which tokens have anything open.
//   grad_input_pass   reads x and D: dA and dWr of a range of tokens, whose sums stand in registers, as [A; Wr] does, and dx.
//   reduce_partials   adds up the ranges in order.
//
// Tiles of O are wide, so that t has few parts; those of K are narrow, so that ranges are few. No atomics: the same bits on every
// run. Where 16 tokens (64 of x) have nothing open, dy (x) is not read; where 8 columns (16 of du) have not, products are left out.
//
// Blocks that a multiprocessor holds at once, at least, for any type and without dropout (own: two mixtures with masks of their own),
// as in forward.cuh:
//   grad_output_pass 4: 1, 1
//   grad_output_pass 8: 1, 1
//   gate_backward: 4, 4
//   grad_input_pass 3: 1, 1
//   grad_input_pass 4: 1, 1
//   grad_input_pass 5: 1, 1
//   grad_input_pass 4 own: 1, 1
//   grad_input_pass 5 own: 1, 0
//   reduce_partials: 8, 8
#pragma once

#include "backward.h"
#include "params.cuh"
#include "transposed.cuh"

namespace rode::gpu {

// Parameters of every kernel. D (M, 16 groups): du, then the logits' gradients, each padded with zeros to groups of 16 columns.
template <class T>
struct BackwardParams {
  gmem<const T> dy, x, A, router_weight, B;  // (M, O), (M, K), (R, K), (N, K), (O, R)
  gmem<const float> u, g, dgates;     // (M, R), (M, N), (M, N)
  gmem<const int64_t> seed;         // (masks)
  gmem<T> D, dx;                    // (M, 16 groups), (M, K)
  gmem<float> dh;                   // (M, N): of the logits, or of given gates
  gmem<uint32_t> open;              // (open_parts, M / 16): whether any gate of these tokens is
  gmem<float> t;                    // (o_tiles, M / 16, expert_tiles, 32 lanes, 4): parts over tiles of O, as fragments have them
  gmem<float> dB_partial, dA_partial,
      dbias_partial;                // (ranges of y, O, 8 expert_tiles), (ranges of x, 16 groups, pitch), (M / 16, N)
  int64_t ld_dy, dy_column;         // distances of dy, in elements
  int ld_x, ld_A, ld_B, pitch;
  uint32_t threshold;
  int M, K, O, R, N;
  int expert_tiles;                  // of 8 columns
  int expert_groups, router_groups;  // of 16 columns
  int chunks;                        // of groups that a block has
  int D_pitch, D_first, D_router, open_part, open_parts, masks;  // see `BackwardLayout`
  cuda::BackwardPlan plan;
  int copy_dy, copy_x;
  bool routed, dropout, drop_all, dense, fast;
  bool need_t, need_B, need_A, need_router, need_x;
  float scaling[kMaxExperts];
  uint16_t offset[kMaxExperts + 1];  // first column of each expert
  uint8_t expert[kMaxRank];
};

// For each of `count` tiles of kRows tokens from `first` on a word: `bits(expert)` of every expert that is open for one of them.
// Lanes are experts, several rows of g at once where there are few.
template <int kRows, class T, class Bits>
RODE_DEVICE void scan_gates(const BackwardParams<T>& p, int first, int count, smem<uint16_t> flags, Bits bits) {
  int width = 1;
  while (width < p.N && width < 32) width *= 2;
  const int lane = lane_index(), n = lane % width, at_once = 32 / width, warps = block_threads() / 32;
  const uint32_t low = n < p.N ? bits(n) : 0u, high = n + 32 < p.N ? bits(n + 32) : 0u;
  for (int tile = warp_index(); tile < count; tile += warps) {
    const int m0 = first + tile * kRows;
    uint32_t open = 0;
#pragma unroll 8
    for (int row = lane / width; row < kRows; row += at_once) {
      const bool inside = m0 + row < p.M;
      const gmem<const float> from = p.g + (offset(m0 + row, p.N) + n);
      open |= load(from, inside && n < p.N) != 0.0f ? low : 0u;
      if (p.N > 32) open |= load(from + 32, inside && n + 32 < p.N) != 0.0f ? high : 0u;
    }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) open |= shuffle_xor(open, mask);
    store(flags + tile, static_cast<uint16_t>(open), lane == 0);
  }
}

RODE_DEVICE int next_open(smem<uint16_t> flags, int tile, int count) {
  while (tile < count && load(flags + tile) == 0) ++tile;
  return tile;
}

}  // namespace rode::gpu
