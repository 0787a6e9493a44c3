// shrink: a tile of x times tiles of columns, over a part of K.
#pragma once

#include "dropout.cuh"
#include "params.cuh"

namespace rode::gpu {

// Warps that share rows share the steps of a stage, and add up at the end (`add_up`); or, with many tiles, the tiles.
template <class T, int kRows, int kTiles>
struct ShrinkStages {
  static constexpr int kTileBytes = kRows * kRowBytes, kBytes = kTileBytes + 8 * kTiles * kRowBytes;
  static constexpr int kCount = kTiles <= 5 ? 7 : kTiles <= 10 ? 4 : 3;
  static constexpr int kWarpsM = kRows / 16, kPeers = kBlock<kRows> / 32 / kWarpsM;
  static constexpr int kWarpsK = kTiles == 16 ? 1 : kPeers, kMine = kTiles / (kPeers / kWarpsK);  // tiles of a warp
  static constexpr int kPartials = kWarpsK == 1 ? 0 : kBlock<kRows> / 32 * kTiles * 512;              // bytes that add_up takes
  static constexpr int kPipeline = kBytes * kCount > kPartials ? kBytes * kCount : kPartials;
};

// sums[j] = x tile times column tile first_tile + j, over `count` stages of K from stage `first` on; with 16 tiles, those of this
// warp. Tiles below kExpertTiles (or, if that is negative, below p.expert_tiles) are experts' and see x after dropout.
template <class T, int kRows, int kTiles, int kExpertTiles, bool kAligned, Masks kMasks = Masks::kOne>
RODE_DEVICE void shrink(const ForwardParams<T>& p, int m0, int first_tile, int first, int count, int mask_at,
                        float (&sums)[ShrinkStages<T, kRows, kTiles>::kMine][4]) {
  using Stages = ShrinkStages<T, kRows, kTiles>;
  constexpr int kWarpsM = Stages::kWarpsM, kWarpsK = Stages::kWarpsK, kMine = Stages::kMine;
  const int lane = lane_index(), row0 = warp_index() % kWarpsM * 16, peer = warp_index() / kWarpsM;
  const int warp_k = kWarpsK == 1 ? 0 : peer, warp_tile = kWarpsK == 1 ? peer * kMine : 0;
  constexpr bool kOwn = kMasks == Masks::kOwn;
  [[maybe_unused]] const uint64_t seed = !kOwn && p.dropout ? static_cast<uint64_t>(load(p.seed)) : 0;
  const int tile0 = first_tile + warp_tile, tiles = p.expert_tiles + p.router_tiles - tile0;  // that exist

  const auto x_tile = [](int stage) { return shared_array<T>(stage * Stages::kBytes, kRows * kDepth<T>); };
  const auto weight_tile = [](int stage) {
    return shared_array<T>(stage * Stages::kBytes + Stages::kTileBytes, 8 * kTiles * kDepth<T>);
  };
  // kOwn: this block's tiles see `masks` masks, from mask `first_mask` on; of this warp's tiles each sees one of them.
  [[maybe_unused]] int first_mask = 0, masks = 1;
  [[maybe_unused]] uint32_t own_masks = 0;
  if constexpr (kOwn) {
    const int end = first_tile + kTiles < p.expert_tiles ? first_tile + kTiles : p.expert_tiles;
    first_mask = first_tile < end ? p.expert[8 * first_tile] : 0;
    masks = first_tile < end ? p.expert[8 * (end - 1)] - first_mask + 1 : 0;
    own_masks = masks_of<kMine>(p, tile0, 8, p.expert_tiles, first_mask);
  }
  const auto mask_of = [&](int tile, int mask = 0) {
    return shared_array<uint16_t>(mask_at + (tile % 2 * masks + mask) * kMaskBytes, kMaskBytes / 2);
  };
  const auto x_row = [&](int row) { return Row<T>{p.x + offset(m0 + row, p.ld_x), m0 + row < p.M}; };
  const auto weight_at = [&](int row) { return weight_row(p, 8 * first_tile + row, 8 * p.expert_tiles); };
  const auto swizzle = [](unsigned row) { return row % 8; };
  const TileCopy<T, 16, kRows, kRowBytes, kBlock<kRows>> x_copy(x_row, swizzle);
  const TileCopy<T, 16, 8 * kTiles, kRowBytes, kBlock<kRows>> weights_copy(weight_at, swizzle);
  const auto load_stage = [&](int tile, int stage) {
    const int k = (first + tile) * kDepth<T>;
    if constexpr (kAligned) {
      x_copy.copy(x_tile(stage), k, x_copy.inside(), p.K - k, swizzle);
      weights_copy.copy(weight_tile(stage), k, weights_copy.inside(), p.K - k, swizzle);
    } else {
      load_tile<kRows, kRowBytes, kBlock<kRows>>(x_tile(stage), x_row, swizzle, k, p.K, p.copy_x);
      load_tile<8 * kTiles, kRowBytes, kBlock<kRows>>(weight_tile(stage), weight_at, swizzle, k, p.K, p.copy_weights);
    }
  };
  // Where this lane's rows for ldmatrix stand in a stage, but for the step, which is a flip of bits that are 0 there.
  const auto chunk_of = [](int row, unsigned chunk) { return row * kRowBytes + static_cast<int>(chunk ^ (row % 8u)) * kChunk; };
  const int of_lane = chunk_of(row0 + lane % 16, static_cast<unsigned>(lane) / 16);
  const int n = tile_row<T>(lane % 8) + 8 * warp_tile, of_pair = chunk_of(n + lane / 16 * 8, static_cast<unsigned>(lane) / 8 % 2),
            of_single = chunk_of(n, static_cast<unsigned>(lane) / 8 % 2);
  // kWhole: every one of kTiles exists and belongs to experts. kDrop: there is dropout.
  // (Stages::kMine: nvcc 13.0 crashes on a local constant in the parameters of such a lambda.)
  const auto compute = [&]<bool kWhole, bool kDrop>(int stage, int tile, float (&c)[Stages::kMine][4]) {
#pragma unroll
    for (int i = 0; i < kRowSteps / kWarpsK; ++i) {
      const int step = i * kWarpsK + warp_k;
      const unsigned flip = static_cast<unsigned>(step) * 2 * kChunk;
      uint32_t bits[4];
      ldmatrix<4>(bits, (x_tile(stage) + of_lane / static_cast<int>(sizeof(T))) ^ flip);
      const FragmentA<T> a = fragment_a<T>(bits, p.fast);
      FragmentA<T> kept = a;  // the experts' x
      if constexpr (kDrop && !kOwn) {
        drop<T>(bits, mask_of(tile), row0, step);
        kept = fragment_a<T>(bits, p.fast);
      }
      [[maybe_unused]] int seen = kNoMask;  // the mask that `kept` has gone through
      const auto add = [&](int j, uint32_t b0, uint32_t b1) {
        if constexpr (kOwn) {
          const int own = static_cast<int>(own_masks >> 4 * j & 15u);
          if (own != seen) {
            uint32_t left[4] = {bits[0], bits[1], bits[2], bits[3]};
            if (own != kNoMask) drop<T>(left, mask_of(tile, own), row0, step);
            kept = fragment_a<T>(left, p.fast);
            seen = own;
          }
          multiply(c[j], kept, b0, b1, p.fast);
        } else if (!kDrop || kWhole || (kExpertTiles < 0 ? tile0 + j < p.expert_tiles : j < kExpertTiles)) {
          multiply(c[j], kept, b0, b1, p.fast);
        } else {
          multiply(c[j], a, b0, b1, p.fast);
        }
      };
      const auto weights = [&](int at, int j) {
        return ((weight_tile(stage) + at / static_cast<int>(sizeof(T))) ^ flip) + 8 * j * kDepth<T>;
      };
#pragma unroll
      for (int j = 0; j < kMine; j += 2) {
        if (!kWhole && kTiles == 16 && j >= tiles) break;
        if (j + 1 < kMine) {
          uint32_t b[4];
          ldmatrix<4>(b, weights(of_pair, j));
          add(j, b[0], b[1]);
          add(j + 1, b[2], b[3]);
        } else {
          uint32_t b[2];
          ldmatrix<2>(b, weights(of_single, j));
          add(j, b[0], b[1]);
        }
      }
    }
  };
  const auto mask = [&](int tile) {
    if constexpr (kOwn) {
#pragma unroll 1
      for (int i = 0; i < (tile < count ? masks : 0); ++i)
        fill_mask<kRows, kDepth<T>, kBlock<kRows>, kAligned>(mask_of(tile, i), m0, (first + tile) * kDepth<T>, p.K,
                                                             static_cast<uint64_t>(load(p.seed + (first_mask + i))), p.threshold,
                                                             p.drop_all);
    } else if (p.dropout && tile < count)
      fill_mask<kRows, kDepth<T>, kBlock<kRows>, kAligned>(mask_of(tile), m0, (first + tile) * kDepth<T>, p.K, seed, p.threshold,
                                                           p.drop_all);
  };

  for (int tile = 0; tile < Stages::kCount - 1; ++tile) {
    if (tile < count) load_stage(tile, tile);
    cp_async_commit();
  }
  mask(0);
  const bool whole = tile0 + kMine <= p.expert_tiles;
  for (int tile = 0, stage = 0, free = Stages::kCount - 1; tile < count; ++tile) {
    cp_async_wait<Stages::kCount - 2>();
    sync_threads();
    if (tile + Stages::kCount - 1 < count) load_stage(tile + Stages::kCount - 1, free);
    cp_async_commit();
    mask(tile + 1);  // beside the products
    accumulate<T>(sums, [&](float (&c)[kMine][4]) {
      if (kOwn || p.dropout) return compute.template operator()<false, true>(stage, tile, c);
      if constexpr (kTiles == 16 && !kOwn) {
        if (whole) return compute.template operator()<true, false>(stage, tile, c);
      }
      if constexpr (!kOwn) compute.template operator()<false, false>(stage, tile, c);
    });
    stage = stage + 1 == Stages::kCount ? 0 : stage + 1;
    free = free + 1 == Stages::kCount ? 0 : free + 1;
  }
}

// Adds up, in order, what the warps that share rows have summed over their steps: tiles first, first + by, .. of each. Stages are
// no longer needed.
template <class T, int kRows, int kTiles>
RODE_DEVICE void add_up(int first, int by, float (&sums)[kTiles][4]) {
  using Stages = ShrinkStages<T, kRows, kTiles>;
  static_assert(Stages::kMine == kTiles);
  const int warp = warp_index(), warp_m = warp % Stages::kWarpsM, lane = lane_index();
  const auto partials = [&](int from, int j) {
    return shared_array<float>(0, Stages::kPartials / 4) + ((from * kTiles + j) * 32 + lane) * 4;
  };
  sync_threads();
#pragma unroll
  for (int j = 0; j < kTiles; ++j) store(partials(warp, j), vec<float, 4>{{sums[j][0], sums[j][1], sums[j][2], sums[j][3]}});
  sync_threads();
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    if (j % by != first) continue;
    for (int i = 0; i < 4; ++i) sums[j][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < Stages::kWarpsK; ++k) {
      const vec<float, 4> part = load<vec<float, 4>>(partials(k * Stages::kWarpsM + warp_m, j));
      for (int i = 0; i < 4; ++i) sums[j][i] += part.v[i];
    }
  }
}

}  // namespace rode::gpu
