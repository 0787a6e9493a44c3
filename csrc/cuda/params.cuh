// Parameters of every kernel of the forward pass, and what other kernels' parameters are made of.
#pragma once

#include "ptx.cuh"

namespace rode::gpu {

constexpr int kMaxExperts = 64, kMaxRank = 1024;

// A parameter or its gradient: T is x's type, and beside 16 bits the elements may be float32 instead.
template <class T, class Float>
struct Parameter {
  gmem<T> narrow;
  gmem<Float> fp32;
};

template <class T>
struct ForwardParams {
  gmem<const T> x, A, router_weight, B, base;  // (M, K), (R, K), (N, K), (O, R), (M, O)
  gmem<const float> bias, gates;        // (N), and (M, N) where gates are given
  gmem<T> y;                            // (M, O)
  gmem<float> u, g;                     // (M, R), (M, N)
  gmem<float> partial;                  // (splits, M, columns): sums over parts of K; columns in tiles of 8, experts first
  gmem<const int64_t> seed;
  int ld_x, ld_A, ld_B, ld_base, ld_y;  // distance of rows, in elements: 32 bits, for an address is then one instruction
  uint32_t threshold;                   // of dropout: floor(p 2^32), but for p = 1, which is drop_all
  int M, K, O, R, N;
  int expert_tiles, router_tiles;                         // columns in tiles of 8
  int splits;                                             // of K
  int columns, first_column, router_gap;                  // of partial, see `ForwardLayout`
  int out_tiles;                                          // of y that a block of forward_expand goes through
  int copy_x, copy_weights, copy_B;                       // bytes that rows can be copied by: 16, 4 or one value
  bool routed, dropout, drop_all, dense, in_place, fast;  // fast: tf32 products for float32
  float scaling[kMaxExperts];
  uint8_t expert[kMaxRank];  // of each column
};

// Shared memory: a pipeline of stages, then the gates of 64 tokens, then two masks of dropout.
constexpr int kMaskBytes = 64 * 2 * 4;
RODE_HOST_DEVICE constexpr int gates_bytes(int experts) { return 64 * experts * 4; }
constexpr int masks_bytes(bool dropout) { return dropout ? 2 * kMaskBytes : 0; }

}  // namespace rode::gpu
