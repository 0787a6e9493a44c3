// grad_input_pass reads x for dA = du^T drop(x) and dWr = dh^T x, and writes dx = drop'(du A) + dh Wr. reduce_partials adds up
// ranges.
#pragma once

#include "backward_params.cuh"
#include "dropout.cuh"

namespace rode::gpu {

// A block takes 256 bytes of x's rows, its 4 warps a quarter each, and kGroups groups of D's columns.
template <class T, int kGroups>
struct ColumnShape {
  static constexpr int kSize = static_cast<int>(sizeof(T)), kTokens = 64, kColumns = 2 * kDepth<T>;
  static constexpr int kTiles = kColumns / kWarps / 8, kSteps = 16 * kSize / 32;  // n-tiles of a warp; mma steps of a group
  static constexpr int kTileBytes = kTokens * kRowBytes;
  static constexpr int kParts = (16 * kGroups * kSize + kRowBytes - 1) / kRowBytes;  // tiles of D
  static constexpr int kStageBytes = (2 + kParts) * kTileBytes, kStages = kParts <= 2 ? 3 : 2;
  static constexpr int kMaskWords = kColumns / 32, kMaskBytes = kTokens * kMaskWords * 4;
  static constexpr int kFlags = kStages * kStageBytes;
  // Dropout's masks, each twice, stand behind the flags of so many tiles of tokens.
  RODE_HOST_DEVICE static constexpr int masks(int count) { return kFlags + (count + 7) / 8 * 16; }
};

// In dx a lane owns 16 bytes of consecutive columns: n of tile j is this one of a warp's. Only which weights stand in which
// registers depends on it.
template <int kTiles>
RODE_DEVICE int dx_column(int j, int n) {
  return n / 2 * 2 * kTiles + 2 * j + n % 2;
}

// dx of 16 tokens and a warp's columns, 16 bytes a lane where rows allow it.
template <class T, bool kAligned, int kTiles>
RODE_DEVICE void store_dx(const BackwardParams<T>& p, int m0, int k0, const float (&c)[kTiles][4]) {
  const int k = k0 + lane_index() % 4 * 2 * kTiles;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = m0 + fragment_row(2 * half);
    const gmem<T> to = p.dx + (static_cast<int64_t>(m) * p.K + k);
    if constexpr (kAligned) {
      static_assert(2 * kTiles == kChunkValues<T>);
      store(to, pack_words<T, 4>([&](int i) { return c[i / 2][2 * half + i % 2]; }), m < p.M && k < p.K);
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) store(to + i, from_float<T>(c[i / 2][2 * half + i % 2]), m < p.M && k + i < p.K);
    }
  }
}

// grid (256 bytes of x's rows, ranges of tokens, chunks of kGroups groups). Where there may be several (kManyColumns) dx has
// blocks and ranges of its own, the first ones, for they have the most to do.
template <class T, int kGroups, bool kManyColumns, Masks kMasks, bool kAligned>
RODE_KERNEL(kThreads, kGroups == 3 ? 3 : 2)
grad_input_pass(BackwardParams<T> p) {
  using Shape = ColumnShape<T, kGroups>;
  constexpr int kTiles = Shape::kTiles, kSteps = Shape::kSteps, kSize = Shape::kSize;
  const int warp = warp_index(), range = static_cast<int>(block_index().y);
  const int k0 = static_cast<int>(block_index().x) * Shape::kColumns, warp_k = warp * kTiles * 8;
  const int of_dx = kManyColumns && p.need_x ? 1 : 0, chunk = static_cast<int>(block_index().z) - of_dx;
  const bool writes = kManyColumns ? chunk < 0 : p.need_x, sums_up = (p.need_A || p.need_router) && chunk >= 0;
  const int most = kManyColumns && writes ? p.plan.tokens_per_split_dx : p.plan.tokens_per_split_x, first = range * most, left = p.M - first;
  if (left <= 0) return;  // the other kind has more ranges
  const int tokens = left < most ? left : most, count = (tokens + Shape::kTokens - 1) / Shape::kTokens;
  const int groups = p.expert_groups + p.router_groups, pitch = 16 * groups;
  // In dx of several chunks tiles are gone through once a chunk.
  const int turns = kManyColumns && writes ? p.chunks : 1, group0 = kManyColumns && !writes ? chunk * kGroups : 0;
  constexpr bool kOwn = kMasks == Masks::kOwn;
  [[maybe_unused]] const uint64_t seed = !kOwn && p.dropout ? static_cast<uint64_t>(load(p.seed)) : 0;
  // kOwn: this block's groups see `masks` masks, from mask `first_mask` on; of a chunk's groups each sees one of them.
  [[maybe_unused]] int first_mask = 0, masks = 1;
  [[maybe_unused]] uint32_t own_masks = 0;
  if constexpr (kOwn) {
    const int end = group0 + kGroups < p.expert_groups ? group0 + kGroups : p.expert_groups;
    const bool all = !kManyColumns || writes;
    first_mask = all || group0 >= end ? 0 : p.expert[16 * group0];
    masks = all ? p.masks : group0 >= end ? 0 : p.expert[16 * (end - 1)] - first_mask + 1;
    own_masks = masks_of<kGroups>(p, group0, 16, p.expert_groups, first_mask);
  }

  const auto flags = shared_array<uint16_t>(Shape::kFlags, count);
  for (int tile = thread_index(); tile < count; tile += kThreads) {
    uint32_t open = 0;
#pragma unroll
    for (int i = 0; i < Shape::kTokens / 16; ++i) {
      const int tile16 = first / 16 + tile * (Shape::kTokens / 16) + i;
      for (int part = 0; part < p.open_parts; ++part)
        open |= load(p.open + (part * ((p.M + 15) / 16) + tile16), 16 * tile16 < p.M);
    }
    store(flags + tile, static_cast<uint16_t>(open));
  }
  const auto x_tile = [](int stage, int tile) {
    return shared_array<T>(stage * Shape::kStageBytes + tile * Shape::kTileBytes,
                           Shape::kTokens * kDepth<T>);
  };
  const auto D_tile = [&](int stage, int part) { return x_tile(stage, 2 + part); };
  const auto mask_of = [&](int tile, int mask = 0) {
    return shared_array<uint16_t>(Shape::masks(count) + (tile % 2 * masks + mask) * Shape::kMaskBytes, Shape::kMaskBytes / 2);
  };
  const auto swizzle = [](unsigned row) { return tile_swizzle<T>(row); };
  const auto x_row = [&](int i) { return Row<T>{p.x + offset(i, p.ld_x), true}; };
  const auto D_row = [&](int i) { return Row<T>{p.D + offset(i, pitch), true}; };
  const TileCopy<T, 16, Shape::kTokens, kRowBytes, kThreads, true> x_copy(x_row, swizzle), D_copy(D_row, swizzle);
  const auto load_stage = [&](int turn, int stage) {
    const int m0 = first + turn / turns * Shape::kTokens, group = group0 + turn % turns * kGroups;
    const unsigned inside = m0 + Shape::kTokens <= p.M ? D_copy.inside() : D_copy.below(p.M - m0);
    if (sums_up) {
      const int64_t distance = offset(m0, p.ld_x);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int k = k0 + i * kDepth<T>;
        if constexpr (kAligned) {
          x_copy.copy(x_tile(stage, i), distance + k, inside, p.K - k, swizzle, p.ld_x);
        } else {
          const auto row = [&](int r) { return Row<T>{p.x + offset(m0 + r, p.ld_x), m0 + r < p.M}; };
          load_tile<Shape::kTokens, kRowBytes>(x_tile(stage, i), row, swizzle, k, p.K, p.copy_x);
        }
      }
    }
    const int64_t distance = offset(m0, pitch);
#pragma unroll
    for (int i = 0; i < Shape::kParts; ++i) {
      const int column = 16 * group + i * kDepth<T>;
      D_copy.copy(D_tile(stage, i), distance + column, inside, pitch - column, swizzle, pitch);
    }
  };
  const auto mask = [&](int tile) {
    if ((!kOwn && !p.dropout) || tile >= count || load(flags + tile) == 0) return;
    if constexpr (kOwn) {
#pragma unroll 1
      for (int i = 0; i < masks; ++i)
        fill_mask<Shape::kTokens, Shape::kColumns, kThreads, kAligned>(mask_of(tile, i), first + tile * Shape::kTokens, k0, p.K,
                                                                       static_cast<uint64_t>(load(p.seed + (first_mask + i))),
                                                                       p.threshold, p.drop_all);
    } else {
      fill_mask<Shape::kTokens, Shape::kColumns, kThreads, kAligned>(mask_of(tile), first + tile * Shape::kTokens, k0, p.K, seed,
                                                                     p.threshold, p.drop_all);
    }
  };
  uint32_t weight[kManyColumns ? 1 : kGroups][kSteps][kTiles][2];
  // A lane's columns of dx are 16 bytes of each of the rows of [A; Wr] that an mma asks of it.
  constexpr int kEach = is_fp32<T> ? 2 : 4;
  using Raw = vec<uint32_t, 4>[kSteps][kEach];
  const int lane_n = lane_index() / 4, lane_t = lane_index() % 4, lane_k = k0 + warp_k + dx_column<kTiles>(0, lane_n & ~1),
            lane_dx = warp_k + dx_column<kTiles>(0, sum_column(0));
  const auto fetch_weights = [&](Raw& raw, int group) {
    if constexpr (kAligned) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const int k = is_fp32<T> ? lane_t + 4 * i : 2 * lane_t + i % 2 + i / 2 * 8;
          const Row<T> row = weight_row(p, 16 * group + step * 32 / kSize + k, 16 * p.expert_groups);
          raw[step][i] = load<vec<uint32_t, 4>>(row.at + lane_k, row.inside && lane_k < p.K);
        }
    }
  };
  const auto arrange_weights = [&](uint32_t (&to)[kSteps][kTiles][2], const Raw& raw, int group) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if constexpr (!kAligned) {
          gather_b<T>(to[step][j], [&](int k, int n) {
            const Row<T> row = weight_row(p, 16 * group + step * 32 / kSize + k, 16 * p.expert_groups);
            const int column = k0 + warp_k + dx_column<kTiles>(j, n);
            return load(row.at + column, row.inside && column < p.K);
          });
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if constexpr (is_fp32<T>) {
              to[step][j][i] = lane_n % 2 ? raw[step][i].v[2 * j + 1] : raw[step][i].v[2 * j];
            } else {
              to[step][j][i] = halves(raw[step][2 * i].v[j], raw[step][2 * i + 1].v[j], lane_n % 2);
            }
        }
      }
  };
  [[maybe_unused]] Raw ahead_weights;  // with kManyColumns of group `fetched`
  [[maybe_unused]] int fetched = -1;
  if constexpr (!kManyColumns) {
    if (writes) {
      Raw raw[kGroups];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) fetch_weights(raw[group], group);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) arrange_weights(weight[group], raw[group], group);
    }
  }

  float sums[kGroups][kTiles][4] = {};  // of dA and dWr
  uint32_t wanted = 0;  // a bit for each group whose sums are
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
    wanted |= (group0 + group < p.expert_groups ? p.need_A : p.need_router) ? 1u << group : 0u;
  const auto add_up = [&]<bool kDrop>(int stage, int tile, float (&c)[kGroups][Shape::kTiles][4]) {
#pragma unroll 1
    for (int row0 = 0; row0 < Shape::kTokens; row0 += kStepRows<T>) {
      uint32_t b[kTiles][2], kept[kTiles][2];
      load_b_transposed<T, kTiles>(b, x_tile(stage, warp / 2), row0, warp % 2 * 4);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) kept[j][0] = b[j][0], kept[j][1] = b[j][1];
      [[maybe_unused]] int seen = kNoMask;  // the mask that `kept` has gone through
      if constexpr (kDrop && !kOwn) drop_b<T, kTiles>(kept, mask_of(tile), Shape::kMaskWords, row0, warp_k);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const bool of_experts = !kDrop || kOwn || group0 + group < p.expert_groups;
        if (!(wanted >> group & 1)) continue;
        const int at = group * 16 * kSize / kChunk;
        uint32_t bits[4];
        load_a_transposed<T>(bits, D_tile(stage, at / 8), row0, at % 8);
        if (!warp_any(bits)) continue;  // nothing open
        if constexpr (kOwn) {
          const int own = static_cast<int>(own_masks >> 4 * group & 15u);
          if (own != seen) {
#pragma unroll
            for (int j = 0; j < kTiles; ++j) kept[j][0] = b[j][0], kept[j][1] = b[j][1];
            if (own != kNoMask) drop_b<T, kTiles>(kept, mask_of(tile, own), Shape::kMaskWords, row0, warp_k);
            seen = own;
          }
        }
        const FragmentA<T> a = fragment_a<T>(bits, p.fast);
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          multiply(c[group][j], a, of_experts ? kept[j][0] : b[j][0], of_experts ? kept[j][1] : b[j][1], p.fast);
      }
    }
  };
  // Adds a group's part of dx of 16 tokens: experts' first, then what dropout leaves of it, then the router's. With masks of their
  // own, what each leaves of each group's part. i: its index in D's tile.
  const auto go_back = [&](int stage, int tile, int row0, int i, int group, const uint32_t (&w)[kSteps][kTiles][2],
                           float (&c)[kTiles][4]) {
    const auto products = [&](float (&part)[kTiles][4]) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int at = (i * kSteps + step) * 2;
        uint32_t bits[4];
        load_a<T>(bits, D_tile(stage, at / 8), row0, at % 8);
        if (!warp_any(bits)) continue;
        const FragmentA<T> a = fragment_a<T>(bits, p.fast);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) multiply(part[j], a, no_hoist(w[step][j][0]), no_hoist(w[step][j][1]), p.fast);
      }
    };
    if constexpr (kOwn) {
      if (group < p.expert_groups) {
        float part[kTiles][4] = {};
        products(part);
        return add_kept(c, part, mask_of(tile, p.expert[16 * group]), Shape::kMaskWords, row0, lane_dx);
      }
    } else if (p.dropout && group == p.expert_groups) {
      drop_sums(c, mask_of(tile), Shape::kMaskWords, row0, lane_dx);
    }
    accumulate<T>(c, products);
  };
  const auto epilogue = [&](int tile, int row0, int m0, bool open, float (&c)[kTiles][4]) {
    if (!kOwn && p.dropout && open && p.router_groups == 0) drop_sums(c, mask_of(tile), Shape::kMaskWords, row0, lane_dx);
    store_dx<T, kAligned, kTiles>(p, m0 + row0, k0 + warp_k, c);
  };

  sync_threads();
  const auto is_open = [&](int turn) { return load(flags + turn / turns) != 0; };
  const int all = count * turns;
  for (int turn = 0; turn < Shape::kStages - 1; ++turn) {
    if (turn < all && is_open(turn)) load_stage(turn, turn);
    cp_async_commit();
  }
  mask(0);
  [[maybe_unused]] float dx[kManyColumns ? 4 : 1][kTiles][4];
  for (int turn = 0, stage = 0, free = Shape::kStages - 1; turn < all; ++turn) {
    const int tile = turn / turns, step = turn % turns, ahead = turn + Shape::kStages - 1, m0 = first + tile * Shape::kTokens;
    cp_async_wait<Shape::kStages - 2>();
    sync_threads();
    if (ahead < all && is_open(ahead)) load_stage(ahead, free);
    cp_async_commit();
    if (step == turns - 1) mask(tile + 1);
    const bool open = is_open(turn);
    if (sums_up && open) {
      accumulate<T>(sums, [&](float (&c)[kGroups][kTiles][4]) {
        if (kOwn || p.dropout) return add_up.template operator()<true>(stage, tile, c);
        if constexpr (!kOwn) add_up.template operator()<false>(stage, tile, c);
      });
    }
    if constexpr (kManyColumns) {
      if (writes) {
        if (step == 0)
          for (int i = 0; i < 4; ++i)
            for (int j = 0; j < kTiles; ++j)
              for (int l = 0; l < 4; ++l) dx[i][j][l] = 0.0f;
#pragma unroll 1
        for (int i = 0; i < kGroups && open && step * kGroups + i < groups; ++i) {
          const int group = step * kGroups + i, next = group + 1 == groups ? 0 : group + 1;
          if (fetched != group) fetch_weights(ahead_weights, group);
          arrange_weights(weight[0], ahead_weights, group);
          if (next > 0 || tile + 1 < count) fetch_weights(ahead_weights, fetched = next);
#pragma unroll
          for (int rows = 0; rows < 4; ++rows) go_back(stage, tile, 16 * rows, i, group, weight[0], dx[rows]);
        }
        if (step == turns - 1) {
#pragma unroll
          for (int rows = 0; rows < 4; ++rows) epilogue(tile, 16 * rows, m0, open, dx[rows]);
        }
      }
    } else if (writes) {
#pragma unroll 1
      for (int row0 = 0; row0 < Shape::kTokens; row0 += 16) {
        float c[kTiles][4] = {};
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
          if (open) go_back(stage, tile, row0, group, group, weight[group], c);
        epilogue(tile, row0, m0, open, c);
      }
    }
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    free = free + 1 == Shape::kStages ? 0 : free + 1;
  }
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * (group0 + group) + fragment_row(2 * half);
      const gmem<float> to = p.dA_partial + ((static_cast<int64_t>(range) * pitch + row) * p.pitch + k0 + warp_k);
      const bool exists = sums_up && weight_row(p, row, 16 * p.expert_groups).inside && (group0 + group < p.expert_groups ? p.need_A : p.need_router);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int k = 8 * j + sum_column(0);
        store(to + k, vec<float, 2>{{sums[group][j][2 * half], sums[group][j][2 * half + 1]}}, exists && k0 + warp_k + k < p.K);
      }
    }
}

// Sums of ranges, in order, in the parameters' types: dB (O, R), dA (R, K), dWr (N, K), dbr (N), those that are asked for.
template <class T>
struct ReduceParams {
  gmem<const float> dB_partial, dA_partial, dbias_partial;
  Parameter<T, float> dB, dA, drouter_weight;
  gmem<float> dbias;
  int size_B, size_A, size_router, size_bias;  // 0: not asked for
  int parts_bias;                              // of 16 tokens
  int ranges_y, ranges_x, K, O, R, N, pitch_B, rows_A, pitch_A, first_A, first_router;
};

template <class T>
RODE_KERNEL(kThreads, 8)
reduce_partials(ReduceParams<T> p) {
  int i = static_cast<int>(block_index().x) * kThreads + thread_index();
  const auto sum = [&](gmem<const float> from, int64_t at, int64_t stride, int ranges) {
    float total = 0.0f;
#pragma unroll 4
    for (int range = 0; range < ranges; ++range) total += load(from + (at + range * stride));
    return total;
  };
  const auto put = [&](const Parameter<T, float>& to, float value) {
    if (to.fp32) {
      store(to.fp32 + i, value);
    } else {
      store(to.narrow + i, from_float<T>(value));
    }
  };
  if (i < p.size_B) {
    const int row = i / p.R, column = i % p.R;
    return put(p.dB, sum(p.dB_partial, offset(row, p.pitch_B) + column, static_cast<int64_t>(p.O) * p.pitch_B, p.ranges_y));
  }
  i -= p.size_B;
  const int64_t range_size = static_cast<int64_t>(p.rows_A) * p.pitch_A;
  if (i < p.size_A + p.size_router) {
    const bool router = i >= p.size_A;
    if (router) i -= p.size_A;
    const int row = i / p.K + (router ? p.first_router : p.first_A), column = i % p.K;
    const float value = sum(p.dA_partial, offset(row, p.pitch_A) + column, range_size, p.ranges_x);
    return router ? put(p.drouter_weight, value) : put(p.dA, value);
  }
  // dbr by whole warps, from where one begins: there are many parts, and few sums.
  i -= (p.size_B + p.size_A + p.size_router + 31) / 32 * 32 - p.size_B;
  const int n = i / 32;
  if (i < 0 || n >= p.size_bias) return;
  float total = 0.0f;
#pragma unroll 4
  for (int part = lane_index(); part < p.parts_bias; part += 32) total += load(p.dbias_partial + (offset(part, p.N) + n));
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  store(p.dbias + n, total, lane_index() == 0);
}

}  // namespace rode::gpu
