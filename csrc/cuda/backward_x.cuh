// backward_x reads x for dA = du^T drop(x) and dWr = dh^T x, and writes dx = drop'(du A) + dh Wr. backward_add adds up ranges.
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
  static constexpr int kMasks = kStages * kStageBytes, kFlags = kMasks + 2 * kMaskBytes;
};

// Where a row of [A; Wr] padded as D's columns are stands, if it exists.
template <class T>
RODE_DEVICE Row<T> weight_row(const BackwardParams<T>& p, int row) {
  const int router = row - 16 * p.expert_groups;
  return router < 0 ? Row<T>{p.A + offset(row, p.ld_A), row < p.R}
                    : Row<T>{p.router + offset(router, p.ld_A), p.routed && router < p.N};
}

// dx of 16 tokens and a warp's columns, 16 bytes a lane where rows allow it.
template <class T, int kTiles>
RODE_DEVICE void store_dx(const BackwardParams<T>& p, int m0, int k0, const float (&c)[kTiles][4]) {
  const int t = lane_index() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = m0 + fragment_row(2 * half);
    const gmem<T> row = p.dx + (static_cast<int64_t>(m) * p.K + k0);
    if (!p.vectors) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int k = 8 * j + sum_column(i);
          store(row + k, from_float<T>(c[j][2 * half + i]), m < p.M && k0 + k < p.K);
        }
    } else if constexpr (is_wide<T>) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int k = 8 * j + sum_column(0);
        store(row + k, vec<float, 2>{{c[j][2 * half], c[j][2 * half + 1]}}, m < p.M && k0 + k < p.K);
      }
    } else {
      // Lane t has columns 2 t, 2 t + 1 of four tiles: the four lanes of a row exchange them, so that lane t has all of tile t.
      static_assert(kTiles == 4);
      uint32_t word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) word[j] = pack2<T>(c[j][2 * half], c[j][2 * half + 1]);
#pragma unroll
      for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j & bit) continue;
          const bool upper = t & bit;
          const uint32_t got = shuffle_xor(upper ? word[j] : word[j | bit], bit);
          word[j] = upper ? got : word[j];
          word[j | bit] = upper ? word[j | bit] : got;
        }
      store(row + 8 * t, vec<uint32_t, 4>{{word[0], word[1], word[2], word[3]}}, m < p.M && k0 + 8 * t < p.K);
    }
  }
}

// Clears what was dropped, row by row of the mask: from right operands of x (rows run along the sum), and from sums that become dx.
template <class T, int kCount>
RODE_DEVICE void drop_right(uint32_t (&b)[kCount][2], smem<uint32_t> mask, int words, int row0, int column0) {
  const int t = lane_index() % 4;
#pragma unroll
  for (int j = 0; j < kCount; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = column0 + 8 * j + lane_index() / 4;
      const auto kept = [&](int row) { return load(mask + (row * words + column / 32)) >> (column % 32) & 1; };
      if constexpr (is_wide<T>) {
        b[j][i] &= kept(row0 + t + 4 * i) ? ~0u : 0u;
      } else {
        const int row = row0 + 2 * t + 8 * i;
        b[j][i] &= (kept(row) ? 0xffffu : 0u) | (kept(row + 1) ? 0xffff0000u : 0u);
      }
    }
}
template <int kTiles>
RODE_DEVICE void drop_sums(float (&c)[kTiles][4], smem<uint32_t> mask, int words, int row0, int column0) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = column0 + 8 * j + sum_column(i);
      if (!(load(mask + ((row0 + fragment_row(i)) * words + column / 32)) >> (column % 32) & 1)) c[j][i] = 0.0f;
    }
}

// grid (256 bytes of x's rows, ranges of tokens, chunks of kGroups groups). Where there may be several (kWide) dx has blocks and
// ranges of its own, the first ones, for they have the most to do.
template <class T, int kGroups, bool kWide>
RODE_KERNEL(kThreads, 2)
backward_x(BackwardParams<T> p) {
  using Shape = ColumnShape<T, kGroups>;
  constexpr int kTiles = Shape::kTiles, kSteps = Shape::kSteps, kSize = Shape::kSize;
  const int warp = warp_index(), range = static_cast<int>(block_index().y);
  const int k0 = static_cast<int>(block_index().x) * Shape::kColumns, warp_k = warp * kTiles * 8;
  const int of_dx = kWide && p.need_x ? 1 : 0, chunk = static_cast<int>(block_index().z) - of_dx;
  const bool writes = kWide ? chunk < 0 : p.need_x, sums_up = (p.need_A || p.need_W) && chunk >= 0;
  const int share = kWide && writes ? p.share_dx : p.share_x, first = range * share, left = p.M - first;
  if (left <= 0) return;  // the other kind has more ranges
  const int tokens = left < share ? left : share, count = (tokens + Shape::kTokens - 1) / Shape::kTokens;
  const int groups = p.expert_groups + p.router_groups, pitch = 16 * groups;
  // In dx of several chunks tiles are gone through once a chunk.
  const int turns = kWide && writes ? p.chunks : 1, group0 = kWide && !writes ? chunk * kGroups : 0;
  const uint64_t seed = p.dropout ? static_cast<uint64_t>(load(p.seed)) : 0;

  const auto flags = shared_array<uint16_t>(Shape::kFlags, count);
  scan_gates<Shape::kTokens>(p, first, count, flags, [](int) { return 1u; });
  const auto x_tile = [](int stage, int tile) {
    return shared_array<T>(static_cast<unsigned>(stage * Shape::kStageBytes + tile * Shape::kTileBytes),
                           Shape::kTokens * kDepth<T>);
  };
  const auto D_tile = [&](int stage, int part) { return x_tile(stage, 2 + part); };
  const auto mask_of = [&](int tile) {
    return shared_array<uint32_t>(static_cast<unsigned>(Shape::kMasks + tile % 2 * Shape::kMaskBytes), Shape::kMaskBytes / 4);
  };
  const auto key = [](unsigned row) { return tile_key<T>(row); };
  const auto issue = [&](int turn, int stage) {
    const int m0 = first + turn / turns * Shape::kTokens, group = group0 + turn % turns * kGroups;
    if (sums_up) {
      const auto row = [&](int i) { return Row<T>{p.x + offset(m0 + i, p.ld_x), m0 + i < p.M}; };
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load_tile<Shape::kTokens, kRowBytes>(x_tile(stage, i), row, key, k0 + i * kDepth<T>, p.K, p.copy_x);
    }
    const auto row = [&](int i) { return Row<T>{p.D + offset(m0 + i, pitch), m0 + i < p.M}; };
#pragma unroll
    for (int i = 0; i < Shape::kParts; ++i)
      load_tile<Shape::kTokens, kRowBytes>(D_tile(stage, i), row, key, 16 * group + i * kDepth<T>, pitch, 16);
  };
  const auto mask = [&](int tile) {
    if (!p.dropout || tile >= count || load(flags + tile) == 0) return;
    for (int i = thread_index(); i < Shape::kMaskBytes / 4; i += kThreads) {
      const int64_t element =
          static_cast<int64_t>(first + tile * Shape::kTokens + i / Shape::kMaskWords) * p.K + k0 + i % Shape::kMaskWords * 32;
      store(mask_of(tile) + i, p.drop_all ? 0u : keep_bits(static_cast<uint64_t>(element), seed, p.threshold));
    }
  };
  uint32_t weight[kWide ? 1 : kGroups][kSteps][kTiles][2];
  const auto read_weights = [&](uint32_t (&to)[kSteps][kTiles][2], int group) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        right_values<T>(to[step][j], [&](int k, int n) {
          const Row<T> row = weight_row(p, 16 * group + step * 32 / kSize + k);
          const int column = k0 + warp_k + 8 * j + n;
          return load(row.at + column, row.inside && column < p.K);
        });
  };
  if constexpr (!kWide) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      if (writes) read_weights(weight[group], group);
  }

  float sums[kGroups][kTiles][4] = {};  // of dA and dWr
  const auto add_up = [&](int stage, int tile, float (&c)[kGroups][kTiles][4]) {
#pragma unroll 1
    for (int row0 = 0; row0 < Shape::kTokens; row0 += kStepRows<T>) {
      uint32_t b[kTiles][2], kept[kTiles][2];
      right_transposed<T, kTiles>(b, x_tile(stage, warp / 2), row0, warp % 2 * 4);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) kept[j][0] = b[j][0], kept[j][1] = b[j][1];
      if (p.dropout) drop_right<T, kTiles>(kept, mask_of(tile), Shape::kMaskWords, row0, warp_k);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const bool of_experts = group0 + group < p.expert_groups;
        if (!(of_experts ? p.need_A : p.need_W)) continue;
        const int at = group * 16 * kSize / kChunk;
        uint32_t bits[4];
        left_transposed<T>(bits, D_tile(stage, at / 8), row0, at % 8);
        if (!warp_any(bits)) continue;  // nothing open
        const Left<T> a = left_operand<T>(bits, p.fast);
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          multiply(c[group][j], a, of_experts ? kept[j][0] : b[j][0], of_experts ? kept[j][1] : b[j][1], p.fast);
      }
    }
  };
  // Adds a group's part of dx of 16 tokens: experts' first, then what dropout leaves of it, then the router's. i: its place in D's
  // tile.
  const auto go_back = [&](int stage, int tile, int row0, int i, int group, const uint32_t (&w)[kSteps][kTiles][2],
                           float (&c)[kTiles][4]) {
    if (p.dropout && group == p.expert_groups) drop_sums(c, mask_of(tile), Shape::kMaskWords, row0, warp_k);
    accumulate<T, kTiles>(c, [&](float (&part)[kTiles][4]) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int at = (i * kSteps + step) * 2;
        uint32_t bits[4];
        left_plain<T>(bits, D_tile(stage, at / 8), row0, at % 8);
        if (!warp_any(bits)) continue;
        const Left<T> a = left_operand<T>(bits, p.fast);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) multiply(part[j], a, here(w[step][j][0]), here(w[step][j][1]), p.fast);
      }
    });
  };
  const auto finish = [&](int tile, int row0, int m0, bool open, float (&c)[kTiles][4]) {
    if (p.dropout && open && p.router_groups == 0) drop_sums(c, mask_of(tile), Shape::kMaskWords, row0, warp_k);
    store_dx<T, kTiles>(p, m0 + row0, k0 + warp_k, c);
  };

  sync_threads();
  const auto is_open = [&](int turn) { return load(flags + turn / turns) != 0; };
  const int all = count * turns;
  for (int turn = 0; turn < Shape::kStages - 1; ++turn) {
    if (turn < all && is_open(turn)) issue(turn, turn);
    cp_async_commit();
  }
  mask(0);
  [[maybe_unused]] float dx[kWide ? 4 : 1][kTiles][4];
  for (int turn = 0, stage = 0, free = Shape::kStages - 1; turn < all; ++turn) {
    const int tile = turn / turns, step = turn % turns, ahead = turn + Shape::kStages - 1, m0 = first + tile * Shape::kTokens;
    cp_async_wait<Shape::kStages - 2>();
    sync_threads();
    if (ahead < all && is_open(ahead)) issue(ahead, free);
    cp_async_commit();
    if (step == turns - 1) mask(tile + 1);
    const bool open = is_open(turn);
    if (sums_up && open) {
      if constexpr (is_wide<T>) {  // in pieces, as tensor cores truncate when they add
        float piece[kGroups][kTiles][4] = {};
        add_up(stage, tile, piece);
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[group][j][i] += piece[group][j][i];
      } else {
        add_up(stage, tile, sums);
      }
    }
    if constexpr (kWide) {
      if (writes) {
        if (step == 0)
          for (int i = 0; i < 4; ++i)
            for (int j = 0; j < kTiles; ++j)
              for (int l = 0; l < 4; ++l) dx[i][j][l] = 0.0f;
#pragma unroll 1
        for (int i = 0; i < kGroups && open; ++i) {
          read_weights(weight[0], step * kGroups + i);
#pragma unroll
          for (int rows = 0; rows < 4; ++rows) go_back(stage, tile, 16 * rows, i, step * kGroups + i, weight[0], dx[rows]);
        }
        if (step == turns - 1) {
#pragma unroll
          for (int rows = 0; rows < 4; ++rows) finish(tile, 16 * rows, m0, open, dx[rows]);
        }
      }
    } else if (writes) {
#pragma unroll 1
      for (int row0 = 0; row0 < Shape::kTokens; row0 += 16) {
        float c[kTiles][4] = {};
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
          if (open) go_back(stage, tile, row0, group, group, weight[group], c);
        finish(tile, row0, m0, open, c);
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
      const gmem<float> to = p.of_A + ((static_cast<int64_t>(range) * pitch + row) * p.pitch + k0 + warp_k);
      const bool exists = sums_up && weight_row(p, row).inside && (group0 + group < p.expert_groups ? p.need_A : p.need_W);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int k = 8 * j + sum_column(0);
        store(to + k, vec<float, 2>{{sums[group][j][2 * half], sums[group][j][2 * half + 1]}}, exists && k0 + warp_k + k < p.K);
      }
    }
}

// Sums of ranges, in order, in the parameters' types: dB (O, R), dA (R, K), dWr (N, K), dbr (N), those that are asked for.
template <class T>
struct AddParams {
  gmem<const float> of_B, of_A, of_bias;
  gmem<T> dB, dA, dW;
  gmem<float> wide_dB, wide_dA, wide_dW, dbias;  // instead, where parameters are float32
  int size_B, size_A, size_W, size_bias;         // 0: not asked for
  int parts_bias;                                // of 16 tokens
  int ranges_y, ranges_x, K, O, R, N, pitch_B, rows_A, pitch_A, first_router;
};

template <class T>
RODE_KERNEL(kThreads, 8)
backward_add(AddParams<T> p) {
  int i = static_cast<int>(block_index().x) * kThreads + thread_index();
  const auto sum = [&](gmem<const float> from, int64_t at, int64_t stride, int ranges) {
    float total = 0.0f;
#pragma unroll 4
    for (int range = 0; range < ranges; ++range) total += load(from + (at + range * stride));
    return total;
  };
  const auto put = [&](gmem<T> narrow, gmem<float> wide, float value) {
    if (wide) {
      store(wide + i, value);
    } else {
      store(narrow + i, from_float<T>(value));
    }
  };
  if (i < p.size_B) {
    const int row = i / p.R, column = i % p.R;
    return put(p.dB, p.wide_dB, sum(p.of_B, offset(row, p.pitch_B) + column, static_cast<int64_t>(p.O) * p.pitch_B, p.ranges_y));
  }
  i -= p.size_B;
  const int64_t of_A = static_cast<int64_t>(p.rows_A) * p.pitch_A;
  if (i < p.size_A + p.size_W) {
    const bool router = i >= p.size_A;
    if (router) i -= p.size_A;
    const int row = i / p.K + (router ? p.first_router : 0), column = i % p.K;
    const float value = sum(p.of_A, offset(row, p.pitch_A) + column, of_A, p.ranges_x);
    return router ? put(p.dW, p.wide_dW, value) : put(p.dA, p.wide_dA, value);
  }
  // dbr by whole warps, from where one begins: there are many parts, and few sums.
  i -= (p.size_B + p.size_A + p.size_W + 31) / 32 * 32 - p.size_B;
  const int n = i / 32;
  if (i < 0 || n >= p.size_bias) return;
  float total = 0.0f;
#pragma unroll 4
  for (int part = lane_index(); part < p.parts_bias; part += 32) total += load(p.of_bias + (offset(part, p.N) + n));
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  store(p.dbias + n, total, lane_index() == 0);
}

}  // namespace rode::gpu
