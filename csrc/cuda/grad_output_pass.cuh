// grad_output_pass reads dy once for every 32 (or 64) packed columns: t = dy B, summed over a tile of O, and dB = dy^T v, over a
// range of tokens.
#pragma once

#include "backward_params.cuh"

namespace rode::gpu {

// 8 warps share a tile of O: each has kSteps times 32 bytes of dy's rows, for which it holds B in registers, and dB's sums. In 16
// bits and with few columns so little of both that a multiprocessor has registers for two blocks: warps that wait need others
// beside them.
template <class T, int kTiles>
struct OTileShape {
  static constexpr int kThreadsY = 256, kWarpsY = 8, kTokens = 16, kStages = 3, kBlocks = kTiles == 4 && !is_fp32<T> ? 2 : 1;
  static constexpr int kSteps = !is_fp32<T> ? 3 : kTiles == 4 ? 6 : 2;
  static constexpr int kColumns = kSteps * 32 / static_cast<int>(sizeof(T)), kOTile = kWarpsY * kColumns;
  static constexpr int kRowTiles = kOTile / kDepth<T>, kTileBytes = kTokens * kRowBytes, kStageBytes = kRowTiles * kTileBytes;
  static constexpr int kGatedTiles = (8 * kTiles * static_cast<int>(sizeof(T)) + kRowBytes - 1) / kRowBytes;
  static constexpr int kGatedV = kStages * kStageBytes;                     // two tiles of v
  static constexpr int kPartials = kGatedV + 2 * kGatedTiles * kTileBytes;  // t of every warp
  static constexpr int kFlags = kPartials + kWarpsY * kTiles * 512;
};

// grid (tiles of O, ranges of tokens, chunks of kTiles column tiles)
template <class T, int kTiles, bool kAligned>
RODE_KERNEL(256, (kAligned ? OTileShape<T, kTiles>::kBlocks : 1))
grad_output_pass(BackwardParams<T> p) {
  using Shape = OTileShape<T, kTiles>;
  constexpr int kSteps = Shape::kSteps, kTokens = Shape::kTokens, kPairs = kTokens / kStepRows<T>;
  constexpr int kMTiles = Shape::kColumns / 16, kEach = kTokens * 8 * kTiles / Shape::kThreadsY;
  const int lane = lane_index(), warp = warp_index(), thread = thread_index();
  const int o_tile = static_cast<int>(block_index().x), o0 = o_tile * p.plan.o_tile_columns,
            o_end = p.O - o0 < p.plan.o_tile_columns ? p.O : o0 + p.plan.o_tile_columns;
  const int first = static_cast<int>(block_index().y) * p.plan.tokens_per_split_y, left = p.M - first;
  const int count = ((left < p.plan.tokens_per_split_y ? left : p.plan.tokens_per_split_y) + kTokens - 1) / kTokens;
  const int tile0 = static_cast<int>(block_index().z) * kTiles,
            tiles = p.expert_tiles - tile0 < kTiles ? p.expert_tiles - tile0 : kTiles;
  const int warp_o = warp * Shape::kColumns;

  const auto flags = shared_array<uint16_t>(Shape::kFlags, count);
  scan_gates<kTokens>(p, first, count, flags, [&](int e) {
    const int low = p.offset[e] / 8 - tile0, high = (p.offset[e + 1] - 1) / 8 - tile0;
    uint32_t bits = 0;
    for (int j = low < 0 ? 0 : low; j <= high && j < kTiles; ++j) bits |= 1u << j;
    return bits;
  });
  // B's part, in registers
  uint32_t weight[kSteps][kTiles][2];
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      gather_b<T>(weight[step][j], [&](int k, int n) {
        const int o = o0 + warp_o + step * 32 / static_cast<int>(sizeof(T)) + k, r = 8 * (tile0 + j) + n;
        return load(p.B + (offset(o, p.ld_B) + r), p.need_t && o < o_end && r < p.R);
      });
  sync_threads();

  const auto dy_row = [&](int i) { return Row<T>{p.dy + i * p.ld_dy, true}; };
  const TileCopy<T, 16, kTokens, kRowBytes, kThreads> dy_copy(dy_row, tile_swizzle<T>);
  const bool everywhere = p.dense && p.need_t;
  const auto next = [&](int tile) { return everywhere ? tile : next_open(flags, tile, count); };
  const auto dy_tile = [&](int stage, int tile) {
    return shared_array<T>(stage * Shape::kStageBytes + tile * Shape::kTileBytes, kTokens * kDepth<T>);
  };
  const auto load_stage = [&](int tile, int stage) {
    const int m0 = first + tile * kTokens;
    // Columns from the tile's end on become zeros, so that no product has to ask for them.
    if constexpr (kAligned) {
      const unsigned inside = m0 + kTokens <= p.M ? dy_copy.inside() : dy_copy.below(p.M - m0);
      const int64_t distance = m0 * p.ld_dy + o0;
#pragma unroll 1
      for (int j = 0; j < Shape::kRowTiles; j += Shape::kThreadsY / kThreads) {
        const int i = j + thread / kThreads;
        if (Shape::kRowTiles % 2 == 0 || i < Shape::kRowTiles)
          dy_copy.copy(dy_tile(stage, i), distance + i * kDepth<T>, inside, o_end - o0 - i * kDepth<T>, tile_swizzle<T>);
      }
    } else if (p.dy_column == 1) {
      const auto row = [&](int i) { return Row<T>{p.dy + (m0 + i) * p.ld_dy, m0 + i < p.M}; };
      for (int i = thread / kThreads; i < Shape::kRowTiles; i += Shape::kThreadsY / kThreads)
        load_tile<kTokens, kRowBytes>(dy_tile(stage, i), row, tile_swizzle<T>, o0 + i * kDepth<T>, o_end, p.copy_dy);
    } else {
      for (int i = thread; i < kTokens * Shape::kOTile; i += Shape::kThreadsY) {  // an expanded or transposed dy, value by value
        const int token = i / Shape::kOTile, column = i % Shape::kOTile;
        const int chunk = column % kDepth<T> * static_cast<int>(sizeof(T)) / kChunk;
        const bool inside = m0 + token < p.M && o0 + column < o_end;
        const T value = load(p.dy + ((m0 + token) * p.ld_dy + (o0 + column) * p.dy_column), inside);
        store(at_chunk(dy_tile(stage, column / kDepth<T>), token, tile_swizzle<T>(token), chunk) + column % kChunkValues<T>, value);
      }
    }
  };
  // A thread's entries of v are of one column: u and g come into its registers a tile ahead.
  const int my_column = thread % (8 * kTiles), r = 8 * tile0 + my_column;
  const int expert = r < p.R ? p.expert[r] : 0;
  float my_u[kEach], my_gate[kEach];
  const auto token_of = [&](int i) { return (thread + i * Shape::kThreadsY) / (8 * kTiles); };
  const auto fetch = [&](int tile) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int m = first + tile * kTokens + token_of(i);
      const bool inside = p.need_B && tile < count && m < p.M && r < p.R;
      my_gate[i] = load(p.g + (offset(m, p.N) + expert), inside);
      my_u[i] = load(p.u + (offset(m, p.R) + r), inside);
    }
  };
  const auto v_tile = [&](int buffer, int tile) {
    return shared_array<T>(Shape::kGatedV + (buffer * Shape::kGatedTiles + tile) * Shape::kTileBytes,
                           kTokens * kDepth<T>);
  };
  const auto apply_gates = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const T v = from_float<T>(my_gate[i] != 0.0f ? p.scaling[expert] * my_gate[i] * my_u[i] : 0.0f);
      const int token = token_of(i), column = my_column % kDepth<T>;
      store(at_chunk(v_tile(buffer, my_column / kDepth<T>), token, tile_swizzle<T>(token), column / kChunkValues<T>) +
                column % kChunkValues<T>,
            v);
    }
  };
  const auto partials = [&](int from, int j) {
    return shared_array<float>(Shape::kPartials, Shape::kWarpsY * kTiles * 128) + ((from * kTiles + j) * 32 + lane) * 4;
  };

  const uint32_t all_open = (1u << tiles) - 1;
  float sums[kMTiles][kTiles][4] = {};  // dB
  // Three tiles are under way: `at`, `coming`, and the one after it, which takes the free stage.
  static_assert(Shape::kStages == 3);
  int at = next(0), coming = next(at + 1);
  if (at < count) load_stage(at, 0);
  cp_async_commit();
  if (coming < count) load_stage(coming, 1);
  cp_async_commit();
  fetch(at);
  apply_gates(0);
  fetch(coming);
  for (int stage = 0, buffer = 0; at < count; buffer ^= 1) {
    cp_async_wait<Shape::kStages - 2>();
    sync_threads();
    const int then = next(coming + 1);
    if (then < count) load_stage(then, stage == 0 ? Shape::kStages - 1 : stage - 1);
    cp_async_commit();
    const uint32_t open = everywhere ? all_open : load(flags + at);
    // A branch for each product costs more than most products: none where all of them are wanted.
    const auto for_open = [&](auto product) {
      if ((open & all_open) == all_open) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) product(j);
      } else {
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          if (open >> j & 1) product(j);
      }
    };
    const auto chunk_of = [&](int bytes) { return (warp_o * static_cast<int>(sizeof(T)) + bytes) / kChunk; };
    if (p.need_t) {
      float t[kTiles][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int chunk = chunk_of(step * 32);
        uint32_t bits[4];
        load_a<T>(bits, dy_tile(stage, chunk / 8), 0, chunk % 8);
        const FragmentA<T> a = fragment_a<T>(bits, p.fast);
        for_open([&](int j) { multiply(t[j], a, no_hoist(weight[step][j][0]), no_hoist(weight[step][j][1]), p.fast); });
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) store(partials(warp, j), vec<float, 4>{{t[j][0], t[j][1], t[j][2], t[j][3]}});
    }
    if (p.need_B) {
      uint32_t v[kPairs][kTiles][2];
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        constexpr int kOfTile = kTiles / Shape::kGatedTiles;
#pragma unroll
        for (int tile = 0; tile < Shape::kGatedTiles; ++tile)
          load_b_transposed<T, kOfTile>(v[pair] + tile * kOfTile, v_tile(buffer, tile), pair * kStepRows<T>, 0);
      }
#pragma unroll
      for (int i = 0; i < kMTiles; ++i)
        accumulate<T>(sums[i], [&](float (&c)[kTiles][4]) {
#pragma unroll
          for (int pair = 0; pair < kPairs; ++pair) {
            const int chunk = chunk_of(i * 16 * static_cast<int>(sizeof(T)));
            uint32_t bits[4];
            load_a_transposed<T>(bits, dy_tile(stage, chunk / 8), pair * kStepRows<T>, chunk % 8);
            const FragmentA<T> a = fragment_a<T>(bits, p.fast);
            for_open([&](int j) { multiply(c[j], a, v[pair][j][0], v[pair][j][1], p.fast); });
          }
        });
    }
    apply_gates(buffer ^ 1);  // of `coming`
    fetch(then);
    if (p.need_t) {
      sync_threads();
      const int m16 = (first + at * kTokens) / 16, all = (p.M + 15) / 16;
      for (int j = warp; j < tiles; j += Shape::kWarpsY) {
        if (!(open >> j & 1)) continue;
        vec<float, 4> total{};
        for (int from = 0; from < Shape::kWarpsY; ++from) {
          const vec<float, 4> part = load<vec<float, 4>>(partials(from, j));
          for (int i = 0; i < 4; ++i) total.v[i] += part.v[i];
        }
        store(p.t + (((static_cast<int64_t>(o_tile) * all + m16) * p.expert_tiles + tile0 + j) * 128 + lane * 4), total);
      }
    }
    at = coming;
    coming = then;
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
  }
  if (!p.need_B) return;
#pragma unroll
  for (int i = 0; i < kMTiles; ++i)
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int o = o0 + warp_o + i * 16 + fragment_row(2 * half);
        const int64_t row = static_cast<int64_t>(block_index().y) * p.O + o;
        store(p.dB_partial + (row * 8 * p.expert_tiles + 8 * (tile0 + j) + sum_column(0)),
              vec<float, 2>{{sums[i][j][2 * half], sums[i][j][2 * half + 1]}}, o < o_end && j < tiles);
      }
}

}  // namespace rode::gpu
