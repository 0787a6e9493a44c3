// Kernels that try the emulator: a product written as real kernels are, with mistakes to plant, and one for each fragment.
#pragma once

#include "../../csrc/cuda/dropout.cuh"

namespace rode::trial {

using namespace rode::gpu;

// Mistakes in the product; Python gets the names.
// clang-format off
#define RODE_TRIAL_BUGS(X)                                                                                           \
  X(none) X(missing_wait) X(early_wait) X(off_by_one_wait) X(missing_barrier) X(wrong_stage) X(missing_sync_warp)    \
  X(global_load_out_of_bounds) X(global_store_out_of_bounds) X(shared_array_out_of_bounds)                           \
  X(shared_load_out_of_bounds) X(misaligned_copy) X(misaligned_store) X(undefined_shared_read)                       \
  X(undefined_global_read) X(divergent_barrier) X(barrier_by_part_of_a_warp) X(early_return)                         \
  X(divergent_collective) X(race_between_warps) X(race_between_blocks) X(dropped_swizzle) X(exit_in_flight)
// clang-format on
#define RODE_NAME(name) name,
enum class Bug : int { RODE_TRIAL_BUGS(RODE_NAME) };
#undef RODE_NAME

struct Shape {
  int M, N, K;
};

constexpr int kTile = 32, kDepth = 64, kStages = 3, kThreads = 128;
constexpr int kStageBytes = 2 * kTile * kDepth * 2, kPitch = 24;
constexpr int kSharedBytes = kStages * kStageBytes + 4 * 16 * kPitch * 2;

// Element of a tile: chunks of 16 bytes change places within each row, so that 8 rows of one chunk meet 8 banks.
RODE_DEVICE int swizzled(int row, int column, Bug bug) {
  const int turn = bug == Bug::dropped_swizzle ? 0 : row % 8;
  return row * kDepth + (column / 8 ^ turn) * 8 + column % 8;
}

// Rows [first, first + 32) and columns [k, k + 64) of a (rows, K) matrix; what is outside becomes 0. kCopy bytes are what
// the rows' alignment allows at once; 2 means plain loads.
template <class T, int kCopy>
RODE_DEVICE void load_tile(smem<T> tile, gmem<const T> from, int first, int rows, int k, int K, Bug bug) {
  constexpr int kElements = kCopy / 2, kPieces = kTile * kDepth / kElements / kThreads;
#pragma unroll 4
  for (int i = 0; i < kPieces; ++i) {
    const int piece = i * kThreads + thread_index();
    const int row = piece / (kDepth / kElements), column = piece % (kDepth / kElements) * kElements;
    const int left = (K - k - column) * 2;
    const bool inside = first + row < rows || bug == Bug::global_load_out_of_bounds;
    const int valid = !inside || left < 0 ? 0 : left < kCopy ? left : kCopy;
    const gmem<const T> source = from + (static_cast<int64_t>(first + row) * K + k + column);
    const smem<T> target = tile + swizzled(row, column, bug);
    if constexpr (kCopy == 2) {
      store(target, load(source, valid > 0));
    } else if (bug == Bug::misaligned_copy && row == 3) {
      cp_async<kCopy>(target, source + 1, valid);
    } else if (bug != Bug::undefined_shared_read || valid > 0) {
      cp_async<kCopy>(target, source, valid);
    }
  }
}

// y = x W^T for x (M, K), w (N, K), y (M, N).
template <class T, int kCopy>
RODE_KERNEL(kThreads, 4)
product(gmem<const T> x, gmem<const T> w, gmem<T> y, Shape p, Bug bug) {
  const int lane = lane_index(), warp = warp_index();
  const int m0 = static_cast<int>(block_index().x) * kTile, n0 = static_cast<int>(block_index().y) * kTile;
  const int tiles = (p.K + kDepth - 1) / kDepth;
  const int m = warp / 2 * 16, n = warp % 2 * 16;  // this warp's 16 x 16 of the block's 32 x 32

  const auto x_tile = [](int stage) {
    return shared_array<T>(static_cast<unsigned>(stage) * kStageBytes, kTile * kDepth);
  };
  const auto w_tile = [](int stage) {
    return shared_array<T>(static_cast<unsigned>(stage) * kStageBytes + kStageBytes / 2, kTile * kDepth);
  };
  const auto load_stage = [&](int tile) {
    const int stage = bug == Bug::shared_array_out_of_bounds ? tile : tile % kStages;
    const int k = tile * kDepth;
    load_tile<T, kCopy>(x_tile(stage), x, m0, p.M, k, p.K, bug);
    load_tile<T, kCopy>(w_tile(stage), w, n0, p.N, k, p.K, bug);
  };

  if (bug == Bug::early_return && n0 + n >= p.N) return;
  float c[2][4] = {};
  for (int tile = 0; tile < kStages - 1; ++tile) {
    if (tile < tiles) load_stage(tile);
    cp_async_commit();
  }
  for (int tile = 0; tile < tiles; ++tile) {
    if (bug == Bug::off_by_one_wait) {
      cp_async_wait<kStages - 1>();
    } else if (bug != Bug::missing_wait && bug != Bug::early_wait) {
      cp_async_wait<kStages - 2>();
    }
    if (bug != Bug::missing_barrier) sync_threads();
    const int next = tile + kStages - 1;
    if (next < tiles || bug == Bug::exit_in_flight) load_stage(next);
    if (bug == Bug::early_wait) cp_async_wait<kStages - 2>();
    cp_async_commit();
    const int stage = (tile + (bug == Bug::wrong_stage ? 1 : 0)) % kStages;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[4], b[4];
      const int row = m + lane % 16 + (bug == Bug::shared_load_out_of_bounds ? 8 : 0), column = k + lane / 16 * 8;
      if (bug != Bug::divergent_collective || lane < 16) ldmatrix<4>(a, x_tile(stage) + swizzled(row, column, bug));
      const int w_row = n + lane % 8 + lane / 16 * 8, w_column = k + lane / 8 % 2 * 8;
      ldmatrix<4>(b, w_tile(stage) + swizzled(w_row, w_column, bug));
      mma<T>(c[0], a, b[0], b[1]);
      mma<T>(c[1], a, b[2], b[3]);
    }
  }
  if (bug == Bug::divergent_barrier) {
    if (warp < 2) sync_threads();
  } else if (bug == Bug::barrier_by_part_of_a_warp) {
    if (lane < 16) sync_threads();
  }

  const int group = lane / 4, pair = lane % 4 * 2;
  // Through shared memory, where each warp has a range of its own, so that lanes store rows and not fragments.
  const smem<T> own = shared_array<T>(kStages * kStageBytes + static_cast<unsigned>(warp) * 16 * kPitch * 2, 16 * kPitch);
  for (int i = 0; i < 4; ++i)
    store(own + ((group + i % 2 * 8) * kPitch + i / 2 * 8 + pair), pack2<T>(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]));
  if (bug != Bug::missing_sync_warp) sync_warp();
  const int row = lane / 2, column = lane % 2 * 8;
  const int out_m0 = bug == Bug::race_between_blocks ? 0 : m0;
  const gmem<T> out = y + (static_cast<int64_t>(out_m0 + m + row) * p.N + n0 + n + column);
  if (bug == Bug::undefined_global_read) load(out, m0 + m + row < p.M && n0 + n + column < p.N);
  const bool inside = m0 + m + row < p.M || bug == Bug::global_store_out_of_bounds;
  if (p.N % 8 == 0) {
    store(bug == Bug::misaligned_store ? out + 4 : out, load<vec<T, 8>>(own + (row * kPitch + column)),
          inside && n0 + n + column < p.N);
  } else {
    for (int i = 0; i < 8; ++i)
      store(out + i, load(own + (row * kPitch + column + i)), inside && n0 + n + column + i < p.N);
  }
  if (bug == Bug::race_between_warps) {  // looks at what its neighbour has just written
    const int there = (m + 16) % kTile;
    const T seen = load(y + (static_cast<int64_t>(m0 + there + row) * p.N + n0 + n), m0 + there + row < p.M && n0 + n < p.N);
    if (to_float(seen) == 12345.0f) store(out, seen);
  }
}

// One warp: c (16, 8) += a (16, depth) b (depth, 8), a and b as float32 rows; the manual's fragments, element by element.
template <class T>
RODE_KERNEL(32, 1)
one_mma(gmem<const float> a, gmem<const float> b, gmem<float> c) {
  constexpr bool kWide = std::is_same_v<T, tf32>;
  constexpr int depth = kWide ? 8 : 16;
  const int group = lane_index() >> 2, t = lane_index() & 3;
  uint32_t fa[4], fb[2];
  float fc[4];
  for (int i = 0; i < 4; ++i) {
    const int row = group + (i == 1 || i == 3 ? 8 : 0);
    if constexpr (kWide) {
      fa[i] = to_tf32(load(a + (row * depth + t + (i >= 2 ? 4 : 0))));
    } else {
      const int column = 2 * t + (i >= 2 ? 8 : 0);
      fa[i] = pack2<T>(load(a + (row * depth + column)), load(a + (row * depth + column + 1)));
    }
    fc[i] = load(c + ((group + (i >= 2 ? 8 : 0)) * 8 + 2 * t + (i & 1)));
  }
  for (int i = 0; i < 2; ++i) {
    if constexpr (kWide) {
      fb[i] = to_tf32(load(b + ((t + 4 * i) * 8 + group)));
    } else {
      fb[i] = pack2<T>(load(b + ((2 * t + 8 * i) * 8 + group)), load(b + ((2 * t + 8 * i + 1) * 8 + group)));
    }
  }
  mma<T>(fc, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; ++i) store(c + ((group + (i >= 2 ? 8 : 0)) * 8 + 2 * t + (i & 1)), fc[i]);
}

// One warp: registers that ldmatrix gives for N stacked 8 x 8 matrices; out is (N, 32 lanes, 2 halves).
template <int N, bool kTranspose>
RODE_KERNEL(32, 1)
one_ldmatrix(gmem<const uint16_t> matrices, gmem<uint16_t> out) {
  const smem<uint16_t> tile = shared_array<uint16_t>(0, N * 64);
  for (int i = lane_index(); i < N * 64; i += 32) store(tile + i, load(matrices + i));
  sync_warp();
  uint32_t r[N];
  ldmatrix<N, kTranspose>(r, tile + lane_index() % (8 * N) * 8);
  for (int i = 0; i < N; ++i) store(out + (i * 32 + lane_index()) * 2, r[i]);
}

// One block: what lanes tell each other; out is (3, threads).
RODE_KERNEL(64, 1)
exchanges(gmem<const uint32_t> in, gmem<uint32_t> out) {
  const int i = thread_index(), n = block_threads();
  const uint32_t mine = load(in + i);
  store(out + i, shuffle_xor(mine, 16));
  store(out + (n + i), ballot(mine % 3 == 0));
  store(out + (2 * n + i), uint32_t{sync_threads_or(mine == 7)});
}

// One block of 64: each thread adds up what the thread of the other warp has written, round after round, behind barriers. The
// address does not change, the value does.
RODE_KERNEL(64, 1)
other_warp_rounds(gmem<uint32_t> cells, int n, int rounds) {
  const int i = thread_index(), other = i ^ 32;
  uint32_t sum = 0;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    sum += load(cells + other, other < n);
    sync_threads();
    store(cells + i, sum, i < n);
    sync_threads();
  }
}

// Dropout's bits of 32 pieces of 4 kCount elements each, from `first` on.
template <int kCount, bool kWhole>
RODE_KERNEL(32, 1)
kept(gmem<uint32_t> out, int64_t first, int64_t seed, uint32_t threshold) {
  const uint64_t from = static_cast<uint64_t>(first + 4 * kCount * lane_index());
  store(out + lane_index(), keep_bits<kCount, kWhole>(from, static_cast<uint64_t>(seed), threshold));
}

// Follows a script of steps {what, block, thread, cell}: who touches which cell of shared or global memory between which
// synchronisations. Whether that is a race does not depend on the order in which the threads happen to run.
enum Step : int { read_shared, write_shared, read_global, write_global, synchronise_warps, synchronise_block, copy, wait };

RODE_KERNEL(64, 1)
scripted(gmem<const int> script, int steps, gmem<int> cells) {
  const smem<int> shared_cells = shared_array<int>(0, 4);
  for (int i = 0; i < steps; ++i) {
    const int what = load(script + 4 * i), cell = load(script + 4 * i + 3);
    const bool mine = load(script + 4 * i + 1) == static_cast<int>(block_index().x) &&
                      load(script + 4 * i + 2) == thread_index();
    if (what == read_shared) load(shared_cells + cell, mine);
    if (what == write_shared) store(shared_cells + cell, i, mine);
    if (what == read_global) load(cells + cell, mine);
    if (what == write_global) store(cells + cell, i, mine);
    if (what == copy && mine) {
      cp_async<4>(shared_cells + cell, cells + cell);
      cp_async_commit();
    }
    if (what == wait && mine) cp_async_wait<0>();
    if (what == synchronise_warps) sync_warp();
    if (what == synchronise_block) sync_threads();
  }
}

// Rounds n float32 values to T and back.
template <class T>
RODE_KERNEL(32, 1)
round_trip(gmem<const float> in, gmem<float> out, int n) {
  for (int i = lane_index(); i < n; i += 32) {
    const float x = load(in + i);
    if constexpr (std::is_same_v<T, tf32>) {
      store(out + i, bits_to_float(to_tf32(x)));
    } else {
      store(out + i, to_float(from_float<T>(x)));
    }
  }
}

}  // namespace rode::trial
