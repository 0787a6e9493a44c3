// weigh: sums become gates, u and v, in registers. expand: v times rows of B, added to base.
#pragma once

#include "params.cuh"
#include "tile.cuh"

namespace rode::gpu {

// ---- weigh

// A tile of logits becomes gates, in shared memory (16 tokens of this warp, N) and, if `keep`, in g. True if any is open.
template <class T>
RODE_DEVICE bool open_gates(const ForwardParams<T>& p, const float (&h)[4], int tile, int m0, smem<float> gates, bool keep) {
  bool any = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = fragment_row(i), n = 8 * tile + fragment_column<T>(i);
    const bool inside = m0 + row < p.M;
    const float logit = h[i] + (p.bias ? load(p.bias + n, n < p.N) : 0.0f);
    const float gate = logit <= 0.0f || !inside ? 0.0f : logit;  // NaN is not swallowed
    any |= n < p.N && gate != 0.0f;
    store(gates + (row * p.N + n), gate, n < p.N);
    store(p.g + (offset(m0 + row, p.N) + n), gate, inside && n < p.N && keep);
  }
  return any;
}

template <class T>
RODE_DEVICE bool given_gates(const ForwardParams<T>& p, int m0, smem<float> gates) {
  bool any = false;
  for (int i = lane_index(); i < 16 * p.N; i += 32) {
    const float gate = load(p.gates + (offset(m0, p.N) + i), m0 + i / p.N < p.M);
    any |= gate != 0.0f;
    store(gates + i, gate);
  }
  return any;
}

// v of 16 tokens as left operands of kCount steps, and a bit for each step in which anything is open.
template <int kCount>
struct Weighted {
  uint32_t a[kCount][4];
  uint32_t open = 0;
};

// A tile of u, at column 8 tile, becomes v in place `j` of `v`, and goes to memory if `keep`: zeros where closed, unless dense.
template <class T, int kCount>
RODE_DEVICE void weigh(const ForwardParams<T>& p, const float (&u)[4], int tile, int j, int m0, smem<float> gates, bool keep,
                       Weighted<kCount>& v) {
  float weighted[4];
  bool any = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = fragment_row(i), column = 8 * tile + fragment_column<T>(i);
    const bool inside = m0 + row < p.M && column < p.R;
    const int expert = inside ? p.expert[column] : 0;
    const float gate = load(gates + (row * p.N + expert), inside);
    const bool open = gate != 0.0f;
    any |= open;
    weighted[i] = open ? p.scaling[expert] * gate * u[i] : 0.0f;
    store(p.u + (offset(m0 + row, p.R) + column), open || p.dense ? u[i] : 0.0f, inside && keep);
  }
  const int step = is_wide<T> ? j : j / 2;
  v.open |= static_cast<uint32_t>(ballot(any) != 0) << step;
  if constexpr (is_wide<T>) {
    v.a[step][0] = float_to_bits(weighted[0]);
    v.a[step][1] = float_to_bits(weighted[2]);
    v.a[step][2] = float_to_bits(weighted[1]);
    v.a[step][3] = float_to_bits(weighted[3]);
  } else {
    v.a[step][j % 2 * 2] = pack2<T>(weighted[0], weighted[1]);
    v.a[step][j % 2 * 2 + 1] = pack2<T>(weighted[2], weighted[3]);
  }
}

// ---- expand

// kParts pieces of 128 bytes hold what a row of B has for one pass: `kUsed` bytes of each
template <class T, int kRows, int kExpertTiles>
struct ExpandStages {
  static constexpr int kWidth = 8 * kExpertTiles * static_cast<int>(sizeof(T));
  static constexpr int kParts = (kWidth + kRowBytes - 1) / kRowBytes, kUsed = kWidth / kParts;
  static constexpr int kPartBytes = kDepth<T> * kRowBytes, kBytes = kParts * kPartBytes + kRows * kRowBytes;
  static constexpr int kCount = 3;
};

// y = base + v B^T for output tiles [first, last), each in `chunks` passes of 8 kExpertTiles columns, before which form(chunk, v)
// is asked for v if there are several. A warp with nothing open (`warp_open`) copies base to y, or leaves y alone if that is base;
// where the whole block has nothing open, B is not read. Warps share the rows, or the columns of a tile.
template <class T, int kRows, int kExpertTiles, int kCount, class Form>
RODE_DEVICE void expand(const ForwardParams<T>& p, int m0, int first, int last, int chunks, bool warp_open, bool block_open,
                        Weighted<kCount>& v, Form form) {
  using Stages = ExpandStages<T, kRows, kExpertTiles>;
  constexpr int kSize = static_cast<int>(sizeof(T)), kWarpsM = kRows / 16, kWarpsO = kWarps / kWarpsM;
  constexpr int kTiles = kDepth<T> / 8 / kWarpsO;  // of 8 columns of y that a warp has
  // In a group of tiles a lane owns consecutive columns, up to 16 bytes: column n of tile j is column n / 2 * kLane + 2 j + n % 2
  // of the group. Only which rows of B the lanes of ldmatrix point to knows about it.
  constexpr int kGroup = kTiles < 8 / kSize ? kTiles : 8 / kSize, kGroups = kTiles / kGroup, kLane = 2 * kGroup;
  const int lane = lane_index(), warp_m = warp_index() % kWarpsM, warp_o = warp_index() / kWarpsM * kTiles * 8;
  const bool active = warp_open || !p.in_place;

  const auto B_tile = [](int stage, int part) {
    return shared_array<T>(static_cast<unsigned>(stage * Stages::kBytes + part * Stages::kPartBytes), kDepth<T> * kDepth<T>);
  };
  // A lane reads back what it has copied itself, so base has no order in common with other lanes.
  const auto base_piece = [&](int stage, int group, int half) {
    const int piece = (group * 2 + half) * kThreads + thread_index();
    return shared_array<T>(static_cast<unsigned>(stage * Stages::kBytes + Stages::kParts * Stages::kPartBytes), kRows * kDepth<T>) +
           piece * kLane;
  };
  // Different for the 8 rows of an ldmatrix; rows 2 i and 2 i + 1 in different halves, for rows that are 64 bytes long.
  const auto key = [](unsigned row) { return row % 2 * 4 + row / unsigned{kLane} % 4; };
  const auto token = [&](int half) { return m0 + warp_m * 16 + lane / 4 + half * 8; };
  const auto output = [&](int tile, int group) { return tile * kDepth<T> + warp_o + group * 8 * kGroup + lane % 4 * kLane; };
  const auto issue = [&](int tile, int chunk, int stage) {
    if (block_open) {
      const int o0 = tile * kDepth<T>;
      const auto row = [&](int i) { return Row<T>{p.B + offset(o0 + i, p.ld_B), o0 + i < p.O}; };
#pragma unroll
      for (int part = 0; part < Stages::kParts; ++part)
        load_tile<kDepth<T>, Stages::kUsed>(B_tile(stage, part), row, key, (chunk * Stages::kParts + part) * kDepth<T>, p.R,
                                            p.copy_B);
    }
    if (p.base && active && p.vectors && chunk == chunks - 1) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
        for (int half = 0; half < 2; ++half) {
          const bool inside = token(half) < p.M && output(tile, group) < p.O;
          cp_async<kLane * kSize>(base_piece(stage, group, half), p.base + (offset(token(half), p.ld_base) + output(tile, group)),
                                  inside ? kLane * kSize : 0);
        }
    }
  };
  const auto finish = [&](int tile, int stage, const float (&sums)[kTiles][4]) {
    const auto sum = [&](int group, int half, int i) { return sums[group * kGroup + i / 2][half * 2 + i % 2]; };
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = token(half), o = output(tile, group);
        if (p.vectors) {
          constexpr int kWords = kLane * kSize / 4, kEach = 4 / kSize;
          vec<uint32_t, kWords> out{};
          if (p.base) out = load<vec<uint32_t, kWords>>(base_piece(stage, group, half));
#pragma unroll
          for (int i = 0; i < kWords; ++i) {
            float value[kEach];
#pragma unroll
            for (int j = 0; j < kEach; ++j) value[j] = unpack<T>(out.v[i], j) + sum(group, half, i * kEach + j);
            out.v[i] = pack<T>(value);
          }
          store(p.y + (offset(m, p.ld_y) + o), out, m < p.M && o < p.O);
        } else {
#pragma unroll
          for (int i = 0; i < kLane; ++i) {
            const bool inside = m < p.M && o + i < p.O;
            const float before = p.base ? to_float(load(p.base + (offset(m, p.ld_base) + o + i), inside)) : 0.0f;
            store(p.y + (offset(m, p.ld_y) + o + i), from_float<T>(before + sum(group, half, i)), inside);
          }
        }
      }
  };

  struct Place {
    int tile, chunk;
  };
  const auto after = [&](Place at) { return at.chunk + 1 == chunks ? Place{at.tile + 1, 0} : Place{at.tile, at.chunk + 1}; };
  Place ahead{first, 0};
  for (int i = 0; i < Stages::kCount - 1; ++i, ahead = after(ahead)) {
    if (ahead.tile < last) issue(ahead.tile, ahead.chunk, i);
    cp_async_commit();
  }
  int stage = 0, free = Stages::kCount - 1;
  float sums[kTiles][4];
  for (Place at{first, 0}; at.tile < last; at = after(at), ahead = after(ahead)) {
    if (chunks > 1) form(at.tile, at.chunk, v);
    cp_async_wait<Stages::kCount - 2>();
    sync_threads();
    if (ahead.tile < last) issue(ahead.tile, ahead.chunk, free);
    cp_async_commit();
    if (at.chunk == 0) {
      for (int j = 0; j < kTiles; ++j)
        for (int i = 0; i < 4; ++i) sums[j][i] = 0.0f;
    }
#pragma unroll
    for (int part = 0; part < (kCount + kRowSteps - 1) / kRowSteps; ++part)
      accumulate<T, kTiles>(sums, [&](float (&c)[kTiles][4]) {
#pragma unroll
        for (int step = part * kRowSteps; step < kCount && step < (part + 1) * kRowSteps; ++step) {
          if (!(v.open >> step & 1)) continue;
          const Left<T> a = left_operand<T>(v.a[step], p.fast);
          const smem<T> tile = B_tile(stage, part);
          const int n = lane % 8, in_group = n / 2 * kLane + n % 2, chunk = 2 * (step % kRowSteps) + lane / 8 % 2;
#pragma unroll
          for (int j = 0; j < kTiles; j += 2) {
            const int mine = j + lane / 16;  // of the two tiles that one ldmatrix reads
            const int row = warp_o + mine / kGroup * 8 * kGroup + mine % kGroup * 2 + in_group;
            if constexpr (kTiles > 1) {
              uint32_t b[4];
              ldmatrix<4>(b, at_chunk(tile, row, key(row), chunk));
              multiply(c[j], a, b[0], b[1], p.fast);
              multiply(c[j + 1], a, b[2], b[3], p.fast);
            } else {
              uint32_t b[2];
              ldmatrix<2>(b, at_chunk(tile, warp_o + in_group, key(warp_o + in_group), chunk));
              multiply(c[j], a, b[0], b[1], p.fast);
            }
          }
        }
      });
    if (at.chunk == chunks - 1 && active) finish(at.tile, stage, sums);
    stage = stage + 1 == Stages::kCount ? 0 : stage + 1;
    free = free + 1 == Stages::kCount ? 0 : free + 1;
  }
}

}  // namespace rode::gpu
