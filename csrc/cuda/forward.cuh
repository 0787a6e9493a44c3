// Forward: y = base + sum_i scaling_i g_i B_i A_i drop(x), with g = relu(x Wr^T + br) or given.
//
// Tokens go in tiles of 64, or of 16 for decoding. Experts are packed side by side, so that one pass over x gives all logits and
// all u = drop(x) A^T: the columns of that product are the experts' R, rounded up to tiles of 8, then the router's N.
//
//   shrink   multiplies a tile of x by tiles of columns, over a part of K
//   apply_gates    makes gates, u and v = scaling g u of its sums, in registers; v is then the left operand of
//   expand   which adds v B^T to base, 128 bytes of y's rows at a time, and leaves out what is closed
//
// Where token tiles fill the device one kernel does all three (forward_fused); for few tokens, or many columns, forward_shrink
// leaves partial sums of K in memory, and forward_expand adds them up in order and goes on. No atomics: the same bits on every run.
//
// Memory is not all that takes time, instructions and waiting do too: a block of 64 tokens has two warps for each 16 of them, a
// thread works out once what it copies (`TileCopy`), and kernels exist twice: `aligned` ones know only rows that move 16 bytes at
// once.
//
// Blocks that a multiprocessor holds at once, at least, for any type, 4 experts and no dropout (own: two mixtures with masks of their
// own): where it has 164 KiB of shared memory or more (sm_80, sm_90, sm_100), and where it has 100 (sm_86, sm_89, sm_120).
//   forward_fused 4 1: 1, 1
//   forward_fused 8 2: 1, 1
//   forward_shrink 16 5: 3, 1
//   forward_shrink 64 5: 1, 1
//   forward_shrink 64 16: 2, 1
//   forward_shrink 64 5 own: 1, 1
//   forward_shrink 64 16 own: 2, 1
//   forward_expand 16 one: 3, 1
//   forward_expand 64 one: 1, 1
//   forward_expand 64 kept: 2, 1
//   forward_expand 64 again: 2, 1
// One block of forward_fused 4 1 alone keeps 78 KiB on their way: M = 8192 gives a multiprocessor of 132 no second one.
#pragma once

#include "expand.cuh"
#include "shrink.cuh"

namespace rode::gpu {

template <class T, int kExpertTiles, int kRouterTiles>
struct FusedShared {
  static constexpr int kStages = 5;  // of the way up
  static constexpr int kDown = ShrinkStages<T, 64, kExpertTiles + kRouterTiles>::kPipeline;
  static constexpr int kUp = ExpandStages<T, 64, kExpertTiles, kStages>::kBytes * kStages;
  static constexpr int kPipeline = kDown > kUp ? kDown : kUp;
};

// grid (token tiles)
template <class T, int kExpertTiles, int kRouterTiles, bool kAligned>
RODE_KERNEL(kBlock<64>, is_fp32<T> && kExpertTiles == 8 ? 1 : 2)
forward_fused(ForwardParams<T> p) {
  using Shared = FusedShared<T, kExpertTiles, kRouterTiles>;
  constexpr int kTiles = kExpertTiles + kRouterTiles;
  const int m0 = static_cast<int>(block_index().x) * 64, warp_m = warp_index() % 4, warp_m0 = m0 + warp_m * 16;
  const bool keep = warp_index() < 4;  // of two warps that have the same tokens, the one that shares what it makes of their sums
  const int mask_at = Shared::kPipeline + gates_bytes(p.N);
  float sums[kTiles][4] = {};
  shrink<T, 64, kTiles, kExpertTiles, kAligned>(p, m0, 0, 0, (p.K + kDepth<T> - 1) / kDepth<T>, mask_at, sums);
  add_up<T, 64, kTiles>(0, 1, sums);

  const smem<float> gates = shared_array<float>(Shared::kPipeline + warp_m * 16 * p.N * 4, 16 * p.N);
  bool any = false;
  if (p.routed) {
#pragma unroll
    for (int j = 0; j < kRouterTiles; ++j) any |= open_gates(p, sums[kExpertTiles + j], j, warp_m0, gates, keep, keep);
  } else {
    any = given_gates(p, warp_m0, gates, keep);
  }
  const bool block_open = sync_threads_or(any);  // and the gates are there
  constexpr int kCount = kExpertTiles / (is_fp32<T> ? 1 : 2);
  GatedV<kCount> v;
#pragma unroll
  for (int j = 0; j < kExpertTiles; ++j) apply_gates(p, sums[j], j, j, warp_m0, gates, keep, v);
  if (!block_open && p.in_place) return;
  const int outs = (p.O + kDepth<T> - 1) / kDepth<T>;
  expand<T, 64, kExpertTiles, Shared::kStages, kAligned>(p, m0, 0, outs, 1, ballot(any) != 0, block_open, v,
                                                         [](int, GatedV<kCount>&) {});
}

// grid (chunks of kTiles column tiles, token tiles, splits of K): blocks that read the same x are neighbours.
template <class T, int kRows, int kTiles, Masks kMasks, bool kAligned>
RODE_KERNEL(kBlock<kRows>, 2)
forward_shrink(ForwardParams<T> p) {
  using Stages = ShrinkStages<T, kRows, kTiles>;
  const int m0 = static_cast<int>(block_index().y) * kRows, first_tile = static_cast<int>(block_index().x) * kTiles;
  const int stages = (p.K + kDepth<T> - 1) / kDepth<T>, per_split = (stages + p.splits - 1) / p.splits;
  const int split = static_cast<int>(block_index().z), first = split * per_split;
  const int count = stages - first < per_split ? stages - first : per_split;
  float sums[Stages::kMine][4] = {};
  shrink<T, kRows, kTiles, -1, kAligned, kMasks>(p, m0, first_tile, first, count, Stages::kPipeline, sums);

  const int columns = 8 * (p.expert_tiles + p.router_tiles), row0 = m0 + warp_index() % Stages::kWarpsM * 16;
  const int peer = warp_index() / Stages::kWarpsM;
  const auto write = [&](int tile, const float (&c)[4]) {
    const bool exists = 8 * tile < columns;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = row0 + fragment_row(2 * half);
      const gmem<float> to = p.partial + ((static_cast<int64_t>(split) * p.M + m) * columns + 8 * tile + fragment_column<T>(0));
      if constexpr (is_fp32<T>) {
        store(to, c[2 * half], exists && m < p.M);
        store(to + 4, c[2 * half + 1], exists && m < p.M);
      } else {
        store(to, vec<float, 2>{{c[2 * half], c[2 * half + 1]}}, exists && m < p.M);
      }
    }
  };
  if constexpr (Stages::kWarpsK == 1) {
#pragma unroll
    for (int j = 0; j < Stages::kMine; ++j) write(first_tile + peer * Stages::kMine + j, sums[j]);
  } else {
    add_up<T, kRows, kTiles>(peer, Stages::kWarpsK, sums);
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      if (j % Stages::kWarpsK == peer) write(first_tile + j, sums[j]);
  }
}

// The splits' sums for tile `tile` of 16 tokens from m0 on, splits first, first + by, ... in order. Several are loaded before the
// first one is added, to overlap their latencies.
template <class T>
RODE_DEVICE void add_splits(const ForwardParams<T>& p, int tile, int m0, int first, int by, float (&c)[4]) {
  constexpr int kBatch = 8;
  const int columns = p.columns, m = m0 + fragment_row(0);
  const int column = p.first_column + 8 * (tile < p.expert_tiles ? tile : tile + p.router_gap) + fragment_column<T>(0);
  const int64_t split_size = static_cast<int64_t>(p.M) * columns;
  gmem<const float> from = p.partial + (first * split_size + static_cast<int64_t>(m) * columns + column);
  for (int i = 0; i < 4; ++i) c[i] = 0.0f;
#pragma unroll 1
  for (int split = first; split < p.splits; split += by * kBatch) {
    vec<float, 2> part[kBatch][2];
#pragma unroll
    for (int i = 0; i < kBatch; ++i, from = from + by * split_size) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const gmem<const float> of_row = from + half * 8 * columns;
        const bool inside = m + 8 * half < p.M && split + i * by < p.splits;
        if constexpr (is_fp32<T>) {
          part[i][half] = {load(of_row, inside), load(of_row + 4, inside)};
        } else {
          part[i][half] = load<vec<float, 2>>(of_row, inside);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) c[j] += part[i][j / 2].v[j % 2];
  }
}

// The source of v: one pass; several, whose v stays in shared memory between output tiles; or several again for each output tile.
enum class Passes { kOne, kKept, kAgain };

template <class T, int kRows, Passes kPasses>
struct ExpandShared {
  static constexpr int kStages = kPasses == Passes::kOne ? 5 : 3, kExpertTiles = kDepth<T> / 8;  // of a pass: 128 bytes of B's rows
  static constexpr int kPipeline = ExpandStages<T, kRows, kExpertTiles, kStages>::kBytes * kStages;
  static constexpr int kPeers = kBlock<kRows> / 32 / (kRows / 16);  // warps that have the same tokens
  static constexpr int kParts = kRows == 16 ? kPeers : 1;           // of the splits, each added up by another warp
  // Before the pipeline starts: sums of the column tiles of a pass, of all of them if it is the only one, else at most 8.
  RODE_HOST_DEVICE static constexpr int partials_bytes(int tiles) { return kParts * kRows / 16 * tiles * 512; }
  RODE_HOST_DEVICE static constexpr int pipeline(int tiles) {
    const int bytes = partials_bytes(kPasses == Passes::kOne ? tiles : 8);
    return bytes > kPipeline ? bytes : kPipeline;
  }
};

// v of 64 tokens, as the lanes of 4 warps have it, and for each warp a word that says which steps are open.
RODE_HOST_DEVICE constexpr int kept_bytes(int chunks) { return chunks * (kRowSteps * kThreads * 16 + kWarps * 4); }

// grid (token tiles, parts of O)
template <class T, int kRows, bool kAligned, Passes kPasses>
RODE_KERNEL(kBlock<kRows>, 2)
forward_expand(ForwardParams<T> p) {
  using Shared = ExpandShared<T, kRows, kPasses>;
  constexpr bool kOne = kPasses == Passes::kOne;
  constexpr int kExpertTiles = Shared::kExpertTiles, kCount = kRowSteps, kWarpsM = kRows / 16, kPeers = Shared::kPeers;
  constexpr int kParts = Shared::kParts;
  const int m0 = static_cast<int>(block_index().x) * kRows, lane = lane_index(), warp_m = warp_index() % kWarpsM;
  const int peer = warp_index() / kWarpsM, warp_m0 = m0 + warp_m * 16, tiles = p.expert_tiles + p.router_tiles;
  const int chunks = kOne ? 1 : (p.expert_tiles + kExpertTiles - 1) / kExpertTiles, pipeline = Shared::pipeline(tiles);
  const bool writes = block_index().y == 0;  // one of those who have them writes u and g

  const smem<float> gates = shared_array<float>(pipeline + warp_m * 16 * p.N * 4, 16 * p.N);
  const auto kept_at = [&] { return pipeline + gates_bytes(p.N); };
  const auto kept = [&](int chunk, int step) {
    return shared_array<uint32_t>(kept_at(), chunks * kCount * kThreads * 4) +
           ((chunk * kCount + step) * kThreads + warp_m * 32 + lane) * 4;
  };
  const auto kept_open = [&](int chunk) {
    return shared_array<uint32_t>(kept_at() + chunks * kCount * kThreads * 16, chunks * kWarps) +
           (chunk * kWarps + warp_m);
  };
  // The only pass, or one for the router and one for every chunk of experts. Their code stands here once: a block is over before
  // much more of it could be fetched.
  GatedV<kCount> v;
  bool any = false, block_open = false;
  for (int pass = kOne ? 0 : -1; pass < chunks; ++pass) {
    const bool has_router = kOne || pass < 0;
    const int begin = pass < 0 ? p.expert_tiles : pass * kExpertTiles, above = begin + kExpertTiles,
              end = has_router ? tiles : above < p.expert_tiles ? above : p.expert_tiles;
    const auto partials = [&](int part, int tile) {
      return shared_array<float>(0, Shared::partials_bytes(end - begin) / 4) +
             (((part * kWarpsM + warp_m) * (end - begin) + tile - begin) * 32 + lane) * 4;
    };
    // Warps that have the same tokens share the tiles; with few tokens, and then many splits, these.
#pragma unroll 1
    for (int tile = begin + (kParts == 1 ? peer : 0); tile < end; tile += kParts == 1 ? kPeers : 1) {
      float c[4];
      add_splits(p, tile, warp_m0, kParts == 1 ? 0 : peer, kParts, c);
      store(partials(kParts == 1 ? 0 : peer, tile), vec<float, 4>{{c[0], c[1], c[2], c[3]}});
    }
    sync_threads();
    const auto sums = [&](int tile, float (&c)[4]) {
      for (int i = 0; i < 4; ++i) c[i] = 0.0f;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const vec<float, 4> some = load<vec<float, 4>>(partials(part, tile));
        for (int i = 0; i < 4; ++i) c[i] += some.v[i];
      }
    };
    if (has_router) {
      if (p.routed) {
#pragma unroll 1
        for (int j = 0; j < p.router_tiles; ++j) {
          float h[4];
          sums(p.expert_tiles + j, h);
          any |= open_gates(p, h, j, warp_m0, gates, peer == 0, peer == 0 && writes);
        }
      } else {
        any = given_gates(p, warp_m0, gates, peer == 0);
      }
      block_open = sync_threads_or(any);  // and the gates are there
    }
    if (kOne || (pass >= 0 && peer == pass % kPeers)) {
      v.open = 0;
#pragma unroll
      for (int j = 0; j < kExpertTiles; ++j) {
        float u[4] = {};
        if (begin + j < p.expert_tiles) sums(begin + j, u);
        apply_gates(p, u, begin + j, j, warp_m0, gates, writes && (!kOne || peer == 0), v);
      }
      if constexpr (kPasses == Passes::kKept) {
        store(kept_open(pass), v.open, lane == 0);
#pragma unroll
        for (int step = 0; step < kCount; ++step) store(kept(pass, step), v.a[step]);
      }
    }
    sync_threads();  // partials are free
  }
  if (!block_open && p.in_place) return;
  const auto form = [&](int chunk, GatedV<kCount>& w) {
    if constexpr (kPasses == Passes::kAgain) {
      w.open = 0;
#pragma unroll
      for (int j = 0; j < kExpertTiles; ++j) {
        const int tile = chunk * kExpertTiles + j;
        float u[4] = {};
        if (tile < p.expert_tiles) add_splits(p, tile, warp_m0, 0, 1, u);
        apply_gates(p, u, tile, j, warp_m0, gates, false, w);
      }
    } else if constexpr (kPasses == Passes::kKept) {
      w.open = load(kept_open(chunk));
#pragma unroll
      for (int step = 0; step < kCount; ++step) w.a[step] = load<vec<uint32_t, 4>>(kept(chunk, step));
    }
  };
  const int outs = (p.O + kDepth<T> - 1) / kDepth<T>, first = static_cast<int>(block_index().y) * p.out_tiles;
  const int last = first + p.out_tiles < outs ? first + p.out_tiles : outs;
  expand<T, kRows, kExpertTiles, Shared::kStages, kAligned>(p, m0, first, last, chunks, ballot(any) != 0, block_open, v, form);
}

}  // namespace rode::gpu
