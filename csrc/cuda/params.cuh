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
  gmem<const int64_t> seed;             // (masks)
  int ld_x, ld_A, ld_B, ld_base, ld_y;  // distance of rows, in elements: 32 bits, for an address is then one instruction
  uint32_t threshold;                   // of dropout: floor(p 2^32), but for p = 1, which is drop_all
  int M, K, O, R, N;
  int expert_tiles, router_tiles;                         // columns in tiles of 8
  int splits;                                             // of K
  int columns, first_column, router_gap, masks;           // of partial, and of dropout, see `ForwardLayout`
  int out_tiles;                                          // of y that a block of forward_expand goes through
  int copy_x, copy_weights, copy_B;                       // bytes that rows can be copied by: 16, 4 or one value
  bool routed, dropout, drop_all, dense, in_place, fast;  // fast: tf32 products for float32
  float scaling[kMaxExperts];
  uint8_t expert[kMaxRank];  // of each column
};

// Shared memory: a pipeline of stages, then the gates of 64 tokens, then dropout's masks, each twice.
constexpr int kMaskBytes = 64 * 2 * 4;
RODE_HOST_DEVICE constexpr int gates_bytes(int experts) { return 64 * experts * 4; }
constexpr int masks_bytes(bool dropout, int masks = 1) { return dropout ? 2 * masks * kMaskBytes : 0; }

// Whether all experts see one mask of dropout, or mixtures that stand side by side one each. Then `expert` holds, for each column,
// the mixture, and `seed` one seed for each.
enum class Masks { kOne, kOwn };
constexpr int kMaxMasks = 4;  // each mixture has at least 16 columns of kMaxExperts in backward
constexpr int kNoMask = 15;   // of a router's columns

// The masks that kCount tiles of `width` columns from tile `first` on see, counted from mask `from` on, 4 bits each. Tiles from `end`
// on are routers'.
template <int kCount, class Params>
RODE_DEVICE uint32_t masks_of(const Params& p, int first, int width, int end, int from) {
  static_assert(kCount <= 8 && kMaxMasks < kNoMask);
  uint32_t found = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int mask = first + i < end ? p.expert[(first + i) * width] - from : kNoMask;
    found |= static_cast<uint32_t>(mask) << 4 * i;
  }
  return found;
}

}  // namespace rode::gpu
