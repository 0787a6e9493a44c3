// Forward: y = base + sum_i scaling_i g_i B_i A_i drop(x), with g = relu(x Wr^T + br) or given.
//
// Tokens go in tiles of 64, or of 16 for decoding. Experts are packed side by side, so that one pass over x gives all logits and
// all u = drop(x) A^T: the columns of that product are the experts' R, rounded up to tiles of 8, then the router's N.
//
//   shrink   multiplies a tile of x by tiles of columns, over a part of K
//   weigh    makes gates, u and v = scaling g u of its sums, in registers; v is then the left operand of
//   expand   which adds v B^T to base, 128 bytes of y's rows at a time, and leaves out what is closed
//
// Where token tiles fill the device one kernel does all three (forward_fused); for few tokens, or many columns, forward_shrink
// leaves partial sums of K in memory, and forward_expand adds them up in order and goes on. No atomics: the same bits on every run.
//
// Blocks of 128 threads that a multiprocessor holds at once, at least, for any type, 4 experts, no dropout and no v to keep: where
// it has 164 KiB of shared memory or more (sm_80, sm_90, sm_100), and where it has 100 (sm_86, sm_89, sm_120).
//   forward_fused 4 1: 3, 1
//   forward_fused 8 2: 2, 1
//   forward_shrink 16 5: 3, 3
//   forward_shrink 64 5: 3, 1
//   forward_shrink 64 16: 2, 1
//   forward_expand 16: 4, 3
//   forward_expand 64: 3, 2
// One block of forward_fused 4 1 alone keeps 39 KiB on their way: M = 8192 gives a multiprocessor of 132 no second one.
#pragma once

#include "expand.cuh"
#include "shrink.cuh"

namespace rode::gpu {

template <class T, int kExpertTiles, int kRouterTiles>
struct FusedShared {
  static constexpr int kDown =
      ShrinkStages<T, 64, kExpertTiles + kRouterTiles>::kBytes * ShrinkStages<T, 64, kExpertTiles + kRouterTiles>::kCount;
  static constexpr int kUp = ExpandStages<T, 64, kExpertTiles>::kBytes * ExpandStages<T, 64, kExpertTiles>::kCount;
  static constexpr int kPipeline = kDown > kUp ? kDown : kUp;
};

// grid (token tiles)
template <class T, int kExpertTiles, int kRouterTiles>
RODE_KERNEL(kThreads, kExpertTiles == 4 ? 3 : 2)
forward_fused(ForwardParams<T> p) {
  constexpr int kPipeline = FusedShared<T, kExpertTiles, kRouterTiles>::kPipeline;
  const int m0 = static_cast<int>(block_index().x) * 64, warp = warp_index(), warp_m0 = m0 + warp * 16;
  const unsigned mask_at = static_cast<unsigned>(kPipeline + gates_bytes(p.N));
  float sums[kExpertTiles + kRouterTiles][4] = {};
  shrink<T, 64, kExpertTiles + kRouterTiles, kExpertTiles>(p, m0, 0, 0, (p.K + kDepth<T> - 1) / kDepth<T>, mask_at, sums);

  const smem<float> gates = shared_array<float>(static_cast<unsigned>(kPipeline + warp * 16 * p.N * 4), 16 * p.N);
  bool any = false;
  if (p.routed) {
#pragma unroll
    for (int j = 0; j < kRouterTiles; ++j) any |= open_gates(p, sums[kExpertTiles + j], j, warp_m0, gates, true);
  } else {
    any = given_gates(p, warp_m0, gates);
  }
  sync_warp();
  constexpr int kCount = kExpertTiles / (is_wide<T> ? 1 : 2);
  Weighted<kCount> v;
#pragma unroll
  for (int j = 0; j < kExpertTiles; ++j) weigh(p, sums[j], j, j, warp_m0, gates, true, v);
  const bool block_open = sync_threads_or(any);
  if (!block_open && p.in_place) return;
  expand<T, 64, kExpertTiles>(p, m0, 0, (p.O + kDepth<T> - 1) / kDepth<T>, 1, ballot(any) != 0, block_open, v,
                              [](int, int, Weighted<kCount>&) {});
}

// grid (chunks of kTiles column tiles, token tiles, splits of K): blocks that read the same x are neighbours. For 16 tokens the
// warps share K and add up in order.
template <class T, int kRows, int kTiles>
RODE_KERNEL(kThreads, kTiles == 5 ? 3 : 2)
forward_shrink(ForwardParams<T> p) {
  using Stages = ShrinkStages<T, kRows, kTiles>;
  const int m0 = static_cast<int>(block_index().y) * kRows, first_tile = static_cast<int>(block_index().x) * kTiles;
  const int stages = (p.K + kDepth<T> - 1) / kDepth<T>, share = (stages + p.splits - 1) / p.splits;
  const int split = static_cast<int>(block_index().z), first = split * share, lane = lane_index(), warp = warp_index();
  const int count = stages - first < share ? stages - first : share;
  float sums[kTiles][4] = {};
  shrink<T, kRows, kTiles, -1>(p, m0, first_tile, first, count, Stages::kBytes * Stages::kCount, sums);

  const int columns = 8 * (p.expert_tiles + p.router_tiles), row0 = kRows == 64 ? m0 + warp * 16 : m0;
  const auto write = [&](int tile, const float (&c)[4]) {
    const bool exists = 8 * tile < columns;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = row0 + fragment_row(2 * half);
      const gmem<float> to = p.partial + ((static_cast<int64_t>(split) * p.M + m) * columns + 8 * tile + fragment_column<T>(0));
      if constexpr (is_wide<T>) {
        store(to, c[2 * half], exists && m < p.M);
        store(to + 4, c[2 * half + 1], exists && m < p.M);
      } else {
        store(to, vec<float, 2>{{c[2 * half], c[2 * half + 1]}}, exists && m < p.M);
      }
    }
  };
  if constexpr (kRows == 64) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) write(first_tile + j, sums[j]);
  } else {
    sync_threads();  // the stages are free
    const auto corner = [&](int from, int j) {
      return shared_array<float>(0, kWarps * kTiles * 128) + ((from * kTiles + j) * 32 + lane) * 4;
    };
#pragma unroll
    for (int j = 0; j < kTiles; ++j) store(corner(warp, j), vec<float, 4>{{sums[j][0], sums[j][1], sums[j][2], sums[j][3]}});
    sync_threads();
    for (int j = warp; j < kTiles; j += kWarps) {
      float total[4] = {};
      for (int from = 0; from < kWarps; ++from) {
        const vec<float, 4> part = load<vec<float, 4>>(corner(from, j));
        for (int i = 0; i < 4; ++i) total[i] += part.v[i];
      }
      write(first_tile + j, total);
    }
  }
}

// The splits' sums for tile `tile` of 16 tokens from m0 on, splits first, first + by, ... in order.
template <class T>
RODE_DEVICE void add_splits(const ForwardParams<T>& p, int tile, int m0, int first, int by, float (&c)[4]) {
  const int columns = 8 * (p.expert_tiles + p.router_tiles);
  for (int i = 0; i < 4; ++i) c[i] = 0.0f;
#pragma unroll 4
  for (int split = first; split < p.splits; split += by) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = m0 + fragment_row(2 * half);
      const gmem<const float> from =
          p.partial + ((static_cast<int64_t>(split) * p.M + m) * columns + 8 * tile + fragment_column<T>(0));
      if constexpr (is_wide<T>) {
        c[2 * half] += load(from, m < p.M);
        c[2 * half + 1] += load(from + 4, m < p.M);
      } else {
        const vec<float, 2> two = load<vec<float, 2>>(from, m < p.M);
        c[2 * half] += two.v[0];
        c[2 * half + 1] += two.v[1];
      }
    }
  }
}

template <class T, int kRows>
struct ExpandShared {
  static constexpr int kExpertTiles = kDepth<T> / 8;  // of a pass: 128 bytes of B's rows
  static constexpr int kPipeline = ExpandStages<T, kRows, kExpertTiles>::kBytes * ExpandStages<T, kRows, kExpertTiles>::kCount;
  // For 16 tokens: sums of 4 warps for every column tile, before the pipeline starts.
  RODE_HOST_DEVICE static constexpr int pipeline(int tiles) {
    const int corners = kRows == 16 ? kWarps * tiles * 512 : 0;
    return corners > kPipeline ? corners : kPipeline;
  }
};

// grid (token tiles, parts of O)
template <class T, int kRows>
RODE_KERNEL(kThreads, 2)
forward_expand(ForwardParams<T> p) {
  using Shared = ExpandShared<T, kRows>;
  constexpr int kExpertTiles = Shared::kExpertTiles, kCount = kRowSteps;
  const int m0 = static_cast<int>(block_index().x) * kRows, lane = lane_index(), warp = warp_index();
  const int warp_m0 = kRows == 64 ? m0 + warp * 16 : m0, tiles = p.expert_tiles + p.router_tiles;
  const int outs = (p.O + kDepth<T> - 1) / kDepth<T>, first = static_cast<int>(block_index().y) * p.out_tiles;
  const int last = first + p.out_tiles < outs ? first + p.out_tiles : outs;
  const int pipeline = Shared::pipeline(tiles);
  const bool keep = block_index().y == 0 && (kRows == 64 || warp == 0);  // one of those who have them writes u and g

  const auto corner = [&](int from, int tile) {
    return shared_array<float>(0, kWarps * tiles * 128) + ((from * tiles + tile) * 32 + lane) * 4;
  };
  if constexpr (kRows == 16) {  // each warp adds a quarter of the splits
    for (int tile = 0; tile < tiles; ++tile) {
      float c[4];
      add_splits(p, tile, m0, warp, kWarps, c);
      store(corner(warp, tile), vec<float, 4>{{c[0], c[1], c[2], c[3]}});
    }
    sync_threads();
  }
  const auto sums = [&](int tile, float (&c)[4]) {
    if constexpr (kRows == 64) {
      add_splits(p, tile, warp_m0, 0, 1, c);
    } else {
      for (int i = 0; i < 4; ++i) c[i] = 0.0f;
      for (int from = 0; from < kWarps; ++from) {
        const vec<float, 4> part = load<vec<float, 4>>(corner(from, tile));
        for (int i = 0; i < 4; ++i) c[i] += part.v[i];
      }
    }
  };

  const smem<float> gates = shared_array<float>(static_cast<unsigned>(pipeline + warp * 16 * p.N * 4), 16 * p.N);
  bool any = false;
  if (p.routed) {
    for (int j = 0; j < p.router_tiles; ++j) {
      float h[4];
      sums(p.expert_tiles + j, h);
      any |= open_gates(p, h, j, warp_m0, gates, keep);
    }
  } else {
    any = given_gates(p, warp_m0, gates);
  }
  sync_warp();
  const int chunks = (p.expert_tiles + kExpertTiles - 1) / kExpertTiles;
  Weighted<kCount> v;
  // Several passes ask for v at every output tile: it is kept in shared memory, each lane its own part, where there is room.
  uint32_t kept_open = 0;
  const auto kept = [&](int chunk, int step) {
    const unsigned at = static_cast<unsigned>(pipeline + gates_bytes(p.N));
    return shared_array<uint32_t>(at, p.kept_chunks * kCount * kThreads * 4) +
           ((chunk * kCount + step) * kThreads + thread_index()) * 4;
  };
  const auto form = [&](int tile, int chunk, Weighted<kCount>& w) {
    if (p.kept_chunks && tile != first) {
      w.open = kept_open >> (kCount * chunk) & ((1u << kCount) - 1);
#pragma unroll
      for (int step = 0; step < kCount; ++step) {
        const vec<uint32_t, 4> a = load<vec<uint32_t, 4>>(kept(chunk, step));
        for (int i = 0; i < 4; ++i) w.a[step][i] = a.v[i];
      }
      return;
    }
    w.open = 0;
#pragma unroll
    for (int j = 0; j < kExpertTiles; ++j) {
      const int column_tile = chunk * kExpertTiles + j;
      float u[4] = {};
      if (column_tile < p.expert_tiles) sums(column_tile, u);
      weigh(p, u, column_tile, j, warp_m0, gates, keep && tile == first, w);
    }
    if (p.kept_chunks) {
      kept_open |= w.open << (kCount * chunk);
#pragma unroll
      for (int step = 0; step < kCount; ++step)
        store(kept(chunk, step), vec<uint32_t, 4>{{w.a[step][0], w.a[step][1], w.a[step][2], w.a[step][3]}});
    }
  };
  if (chunks == 1) form(first, 0, v);
  const bool block_open = sync_threads_or(any);  // and the corners are free
  // Closed tiles of several passes still owe their u.
  if (!block_open && p.in_place && (chunks == 1 || block_index().y != 0)) return;
  expand<T, kRows, kExpertTiles>(p, m0, first, last, chunks, ballot(any) != 0, block_open, v, form);
}

// float32 parameters become T, in one launch: rows of A, router and B, each padded with zeros to its pitch (a multiple of 8).
template <class T>
struct CastParams {
  gmem<const float> A, router, B;
  gmem<T> to_A, to_router, to_B;
  int K, R, N, O, pitch_K, pitch_R;
};
template <class T>
RODE_KERNEL(kThreads, 8)
cast_parameters(CastParams<T> p) {
  const int64_t wide_pieces = static_cast<int64_t>(p.R + p.N) * (p.pitch_K / 8);
  const int64_t pieces = wide_pieces + static_cast<int64_t>(p.O) * (p.pitch_R / 8);
  const int64_t piece = static_cast<int64_t>(block_index().x) * kThreads + thread_index();
  if (piece >= pieces) return;
  const bool of_B = piece >= wide_pieces;
  const int64_t local = of_B ? piece - wide_pieces : piece;
  const int columns = of_B ? p.R : p.K, pitch = of_B ? p.pitch_R : p.pitch_K;
  int64_t row = local / (pitch / 8);
  const int column = static_cast<int>(local % (pitch / 8)) * 8;
  const bool of_router = !of_B && row >= p.R;
  if (of_router) row -= p.R;
  const gmem<const float> from = of_B ? p.B : of_router ? p.router : p.A;
  const gmem<T> to = of_B ? p.to_B : of_router ? p.to_router : p.to_A;
  vec<T, 8> out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out.v[i] = from_float<T>(load(from + (row * columns + column + i), column + i < columns));
  store(to + (row * pitch + column), out);
}

}  // namespace rode::gpu
