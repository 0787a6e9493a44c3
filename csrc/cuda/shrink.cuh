// shrink: a tile of x times tiles of columns, over a part of K.
#pragma once

#include "dropout.cuh"
#include "params.cuh"

namespace rode::gpu {

template <class T, int kRows, int kTiles>
struct ShrinkStages {
  static constexpr int kTileBytes = kRows * kRowBytes, kBytes = kTileBytes + 8 * kTiles * kRowBytes;
  static constexpr int kCount = kTiles <= 5 ? 4 : 3;
};

// sums[j] = x tile times column tile first_tile + j, over `count` stages of K from stage `first` on. Tiles below kExpertTiles (or,
// if that is negative, below p.expert_tiles) are experts' and see x after dropout. Warps share the rows, or the steps of a stage.
template <class T, int kRows, int kTiles, int kExpertTiles>
RODE_DEVICE void shrink(const ForwardParams<T>& p, int m0, int first_tile, int first, int count, unsigned mask_at,
                        float (&sums)[kTiles][4]) {
  using Stages = ShrinkStages<T, kRows, kTiles>;
  constexpr int kWarpsM = kRows / 16, kWarpsK = kWarps / kWarpsM;
  const int lane = lane_index(), row0 = warp_index() % kWarpsM * 16, warp_k = warp_index() / kWarpsM;
  const uint64_t seed = p.dropout ? static_cast<uint64_t>(load(p.seed)) : 0;
  const int tiles = p.expert_tiles + p.router_tiles - first_tile;  // that exist

  const auto x_tile = [](int stage) { return shared_array<T>(static_cast<unsigned>(stage * Stages::kBytes), kRows * kDepth<T>); };
  const auto weight_tile = [](int stage) {
    return shared_array<T>(static_cast<unsigned>(stage * Stages::kBytes + Stages::kTileBytes), 8 * kTiles * kDepth<T>);
  };
  const auto mask_of = [&](int tile) {
    return shared_array<uint32_t>(mask_at + static_cast<unsigned>(tile % 2 * kMaskBytes), kMaskBytes / 4);
  };
  const auto x_row = [&](int row) { return Row<T>{p.x + offset(m0 + row, p.ld_x), m0 + row < p.M}; };
  const auto weight_row = [&](int row) {
    const int column = 8 * first_tile + row, router = column - 8 * p.expert_tiles;
    return router < 0 ? Row<T>{p.A + offset(column, p.ld_A), column < p.R}
                      : Row<T>{p.router + offset(router, p.ld_A), p.routed && router < p.N};
  };
  const auto key = [](unsigned row) { return row % 8; };
  const auto issue = [&](int tile, int stage) {
    const int k = (first + tile) * kDepth<T>;
    load_tile<kRows, kRowBytes>(x_tile(stage), x_row, key, k, p.K, p.copy_x);
    load_tile<8 * kTiles, kRowBytes>(weight_tile(stage), weight_row, key, k, p.K, p.copy_weights);
  };
  // kWhole: every one of kTiles exists and belongs to experts.
  const auto compute = [&]<bool kWhole>(int stage, int tile, float (&c)[kTiles][4]) {
#pragma unroll
    for (int i = 0; i < kRowSteps / kWarpsK; ++i) {
      const int step = i * kWarpsK + warp_k, row = row0 + lane % 16;
      uint32_t bits[4];
      ldmatrix<4>(bits, at_chunk(x_tile(stage), row, key(row), 2 * step + lane / 16));
      const Left<T> a = left_operand<T>(bits, p.fast);
      Left<T> kept = a;  // the experts' x
      if (p.dropout) {
        drop<T>(bits, mask_of(tile), row0, step);
        kept = left_operand<T>(bits, p.fast);
      }
      const auto add = [&](int j, uint32_t b0, uint32_t b1) {
        if (kWhole || (kExpertTiles < 0 ? first_tile + j < p.expert_tiles : j < kExpertTiles)) {
          multiply(c[j], kept, b0, b1, p.fast);
        } else {
          multiply(c[j], a, b0, b1, p.fast);
        }
      };
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        if (!kWhole && kTiles > 5 && kExpertTiles < 0 && j >= tiles) break;
        const int n = 8 * j + tile_row<T>(lane % 8), chunk = 2 * step + lane / 8 % 2;
        if (j + 1 < kTiles) {
          uint32_t b[4];
          ldmatrix<4>(b, at_chunk(weight_tile(stage), n + lane / 16 * 8, key(n), chunk));
          add(j, b[0], b[1]);
          add(j + 1, b[2], b[3]);
        } else {
          uint32_t b[2];
          ldmatrix<2>(b, at_chunk(weight_tile(stage), n, key(n), chunk));
          add(j, b[0], b[1]);
        }
      }
    }
  };
  const auto mask = [&](int tile) {
    if (p.dropout && tile < count)
      fill_mask<kRows, T>(mask_of(tile), m0, (first + tile) * kDepth<T>, p.K, seed, p.threshold, p.drop_all);
  };

  for (int tile = 0; tile < Stages::kCount - 1; ++tile) {
    if (tile < count) issue(tile, tile);
    cp_async_commit();
  }
  mask(0);
  const bool whole = first_tile + kTiles <= p.expert_tiles;
  for (int tile = 0, stage = 0, free = Stages::kCount - 1; tile < count; ++tile) {
    cp_async_wait<Stages::kCount - 2>();
    sync_threads();
    if (tile + Stages::kCount - 1 < count) issue(tile + Stages::kCount - 1, free);
    cp_async_commit();
    mask(tile + 1);  // beside the products
    accumulate<T, kTiles>(sums, [&](float (&c)[kTiles][4]) {
      if constexpr (kTiles > 5 && kExpertTiles < 0) {
        if (whole) return compute.template operator()<true>(stage, tile, c);
      }
      compute.template operator()<false>(stage, tile, c);
    });
    stage = stage + 1 == Stages::kCount ? 0 : stage + 1;
    free = free + 1 == Stages::kCount ? 0 : free + 1;
  }
}

}  // namespace rode::gpu
