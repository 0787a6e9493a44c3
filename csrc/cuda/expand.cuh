// apply_gates: sums become gates, u and v, in registers. expand: v times rows of B, added to base.
#pragma once

#include "params.cuh"
#include "tile.cuh"

namespace rode::gpu {

// ---- apply_gates

// A tile of logits becomes gates: if `to_shared`, in shared memory (16 tokens, N), and if `keep`, in g. True if any is open.
template <class T>
RODE_DEVICE bool open_gates(const ForwardParams<T>& p, const float (&h)[4], int tile, int m0, smem<float> gates, bool to_shared,
                            bool keep) {
  bool any = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = fragment_row(i), n = 8 * tile + fragment_column<T>(i);
    const bool inside = m0 + row < p.M;
    const float logit = h[i] + (p.bias ? load(p.bias + n, n < p.N) : 0.0f);
    const float gate = logit <= 0.0f || !inside ? 0.0f : logit;  // NaN is not swallowed
    any |= n < p.N && gate != 0.0f;
    store(gates + (row * p.N + n), gate, n < p.N && to_shared);
    store(p.g + (offset(m0 + row, p.N) + n), gate, inside && n < p.N && keep);
  }
  return any;
}

template <class T>
RODE_DEVICE bool given_gates(const ForwardParams<T>& p, int m0, smem<float> gates, bool to_shared) {
  bool any = false;
  for (int i = lane_index(); i < 16 * p.N; i += 32) {
    const float gate = load(p.gates + (offset(m0, p.N) + i), m0 + i / p.N < p.M);
    any |= gate != 0.0f;
    store(gates + i, gate, to_shared);
  }
  return any;
}

// v of 16 tokens as left operands of kCount steps, and a bit for each step in which anything is open.
template <int kCount>
struct GatedV {
  vec<uint32_t, 4> a[kCount];
  uint32_t open = 0;
};

// A tile of u, at column 8 tile, becomes tile `j` of `v`, and goes to memory if `keep`: zeros where closed, unless dense.
template <class T, int kCount>
RODE_DEVICE void apply_gates(const ForwardParams<T>& p, const float (&u)[4], int tile, int j, int m0, smem<float> gates, bool keep,
                             GatedV<kCount>& v) {
  float gated[4];
  bool any = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = fragment_row(i), column = 8 * tile + fragment_column<T>(i);
    const bool inside = m0 + row < p.M && column < p.R;
    const int expert = inside ? p.expert[column] : 0;
    const float gate = load(gates + (row * p.N + expert), inside);
    const bool open = gate != 0.0f;
    any |= open;
    gated[i] = open ? p.scaling[expert] * gate * u[i] : 0.0f;
    store(p.u + (offset(m0 + row, p.R) + column), open || p.dense ? u[i] : 0.0f, inside && keep);
  }
  const int step = is_fp32<T> ? j : j / 2;
  v.open |= static_cast<uint32_t>(ballot(any) != 0) << step;
  if constexpr (is_fp32<T>) {
    v.a[step].v[0] = float_to_bits(gated[0]);
    v.a[step].v[1] = float_to_bits(gated[2]);
    v.a[step].v[2] = float_to_bits(gated[1]);
    v.a[step].v[3] = float_to_bits(gated[3]);
  } else {
    v.a[step].v[j % 2 * 2] = pack2<T>(gated[0], gated[1]);
    v.a[step].v[j % 2 * 2 + 1] = pack2<T>(gated[2], gated[3]);
  }
}

// ---- expand

// kParts pieces of 128 bytes hold what a row of B has for one pass: `kUsed` bytes of each
template <class T, int kRows, int kExpertTiles, int kStages>
struct ExpandStages {
  static constexpr int kWidth = 8 * kExpertTiles * static_cast<int>(sizeof(T));
  static constexpr int kParts = (kWidth + kRowBytes - 1) / kRowBytes, kUsed = kWidth / kParts;
  static constexpr int kPartBytes = kDepth<T> * kRowBytes, kBytes = kParts * kPartBytes + kRows * kRowBytes;
  static constexpr int kCount = kStages;
};

// y = base + v B^T for output tiles [first, last), each in `chunks` passes of 8 kExpertTiles columns, before which form(chunk, v)
// is asked for v if there are several. A warp with nothing open (`warp_open`) copies base to y, or leaves y alone if that is base;
// where the whole block has nothing open, B is not read. Warps share the rows, then the columns of a tile.
template <class T, int kRows, int kExpertTiles, int kStages, bool kAligned, int kCount, class Form>
RODE_DEVICE void expand(const ForwardParams<T>& p, int m0, int first, int last, int chunks, bool warp_open, bool block_open,
                        GatedV<kCount>& v, Form form) {
  using Stages = ExpandStages<T, kRows, kExpertTiles, kStages>;
  constexpr int kSize = static_cast<int>(sizeof(T)), kFilling = kBlock<kRows>;
  constexpr int kWarpsM = kRows / 16, kWarpsO = kFilling / 32 / kWarpsM;
  constexpr int kTiles = kDepth<T> / 8 / kWarpsO;  // of 8 columns of y that a warp has
  // In a group of tiles a lane owns consecutive columns, up to 16 bytes: column n of tile j is column n / 2 * kLane + 2 j + n % 2
  // of the group. Only which rows of B the lanes of ldmatrix point to knows about it.
  constexpr int kGroup = kTiles < 8 / kSize ? kTiles : 8 / kSize, kGroups = kTiles / kGroup, kLane = 2 * kGroup;
  const int lane = lane_index(), warp_m = warp_index() % kWarpsM, warp_o = warp_index() / kWarpsM * kTiles * 8;
  const bool active = warp_open || !p.in_place;

  const auto B_tile = [](int stage, int part) {
    return shared_array<T>(stage * Stages::kBytes + part * Stages::kPartBytes, kDepth<T> * kDepth<T>);
  };
  // A lane reads back what it has copied itself, so base has no order in common with other lanes.
  const auto base_piece = [&](int stage, int group, int half) {
    const int piece = (group * 2 + half) * kFilling + thread_index();
    return shared_array<T>(stage * Stages::kBytes + Stages::kParts * Stages::kPartBytes, kRows * kDepth<T>) +
           piece * kLane;
  };
  // Different for the 8 rows of an ldmatrix; rows 2 i and 2 i + 1 in different halves, for rows that are 64 bytes long.
  const auto swizzle = [](unsigned row) { return row % 2 * 4 + row / unsigned{kLane} % 4; };
  // Where this lane's columns of output tile 0 stand, in the first of its tokens; the second is 8 rows on.
  const int lane_o = warp_o + lane % 4 * kLane, token = m0 + warp_m * 16 + lane / 4;
  const gmem<const T> base_at = p.base + (offset(token, p.ld_base) + lane_o);
  const gmem<T> y_at = p.y + (offset(token, p.ld_y) + lane_o);
  const auto B_row = [&](int i) { return Row<T>{p.B + offset(i, p.ld_B), true}; };
  const TileCopy<T, 16, kDepth<T>, Stages::kUsed, kFilling, true> B_copy_16(B_row, swizzle);
  const TileCopy<T, 4, kDepth<T>, Stages::kUsed, kFilling, true> B_copy_4(B_row, swizzle);
  const auto load_stage = [&](int tile, int chunk, int stage) {
    const int o0 = tile * kDepth<T>;
    if (block_open) {
#pragma unroll
      for (int part = 0; part < Stages::kParts; ++part) {
        const int column = (chunk * Stages::kParts + part) * kDepth<T>;
        const int64_t distance = offset(o0, p.ld_B) + column;
        const auto copy = [&](const auto& rows) {
          const unsigned inside = o0 + kDepth<T> <= p.O ? rows.inside() : rows.below(p.O - o0);
          rows.copy(B_tile(stage, part), distance, inside, p.ld_B - column, swizzle, p.ld_B);
        };
        if constexpr (kAligned) {
          if (p.copy_B == 16) {
            copy(B_copy_16);
          } else {
            copy(B_copy_4);
          }
        } else {
          const auto row = [&](int i) { return Row<T>{p.B + offset(o0 + i, p.ld_B), o0 + i < p.O}; };
          load_tile<kDepth<T>, Stages::kUsed, kFilling>(B_tile(stage, part), row, swizzle, column, p.ld_B, p.copy_B);
        }
      }
    }
    if (kAligned && p.base && active && chunk == chunks - 1) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bool inside = token + 8 * half < p.M && o0 + lane_o + group * 8 * kGroup < p.O;
          cp_async<kLane * kSize>(base_piece(stage, group, half), base_at + (offset(8 * half, p.ld_base) + o0 + group * 8 * kGroup),
                                  inside ? kLane * kSize : 0);
        }
    }
  };
  const auto epilogue = [&](int tile, int stage, const float (&sums)[kTiles][4]) {
    const auto sum = [&](int group, int half, int i) { return sums[group * kGroup + i / 2][half * 2 + i % 2]; };
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int within = tile * kDepth<T> + group * 8 * kGroup, o = within + lane_o, m = token + 8 * half;
        const gmem<const T> from = base_at + (offset(8 * half, p.ld_base) + within);
        const gmem<T> to = y_at + (offset(8 * half, p.ld_y) + within);
        if constexpr (kAligned) {
          constexpr int kWords = kLane * kSize / 4, kEach = 4 / kSize;
          vec<uint32_t, kWords> base{};
          if (p.base) base = load<vec<uint32_t, kWords>>(base_piece(stage, group, half));
          const auto value = [&](int i) { return unpack<T>(base.v[i / kEach], i % kEach) + sum(group, half, i); };
          store(to, pack_words<T, kWords>(value), m < p.M && o < p.O);
        } else {
#pragma unroll
          for (int i = 0; i < kLane; ++i) {
            const bool inside = m < p.M && o + i < p.O;
            const float before = p.base ? to_float(load(from + i, inside)) : 0.0f;
            store(to + i, from_float<T>(before + sum(group, half, i)), inside);
          }
        }
      }
  };
  // The row of B that this lane points to for tiles j, j + 1 of an ldmatrix: its offset but for the step.
  const auto B_at = [&](int j, int step) {
    const int mine = kTiles > 1 ? j + lane / 16 : j, n = lane % 8;
    const int row = warp_o + mine / kGroup * 8 * kGroup + mine % kGroup * 2 + n / 2 * kLane + n % 2;
    const unsigned chunk = static_cast<unsigned>(2 * (step % kRowSteps)) ^ static_cast<unsigned>(lane / 8 % 2);
    return (row * kRowBytes + static_cast<int>(chunk ^ swizzle(static_cast<unsigned>(row))) * kChunk) / kSize;
  };

  struct Turn {
    int tile, chunk;
  };
  const auto after = [&](Turn at) { return at.chunk + 1 == chunks ? Turn{at.tile + 1, 0} : Turn{at.tile, at.chunk + 1}; };
  Turn ahead{first, 0};
  for (int i = 0; i < Stages::kCount - 1; ++i, ahead = after(ahead)) {
    if (ahead.tile < last) load_stage(ahead.tile, ahead.chunk, i);
    cp_async_commit();
  }
  int stage = 0, free = Stages::kCount - 1;
  float sums[kTiles][4];
  for (Turn at{first, 0}; at.tile < last; at = after(at), ahead = after(ahead)) {
    if (chunks > 1) form(at.chunk, v);
    cp_async_wait<Stages::kCount - 2>();
    sync_threads();
    if (ahead.tile < last) load_stage(ahead.tile, ahead.chunk, free);
    cp_async_commit();
    if (at.chunk == 0) {
      for (int j = 0; j < kTiles; ++j)
        for (int i = 0; i < 4; ++i) sums[j][i] = 0.0f;
    }
#pragma unroll
    for (int part = 0; part < (kCount + kRowSteps - 1) / kRowSteps; ++part)
      accumulate<T>(sums, [&](float (&c)[kTiles][4]) {
#pragma unroll
        for (int step = part * kRowSteps; step < kCount && step < (part + 1) * kRowSteps; ++step) {
          if (!(v.open >> step & 1)) continue;
          const FragmentA<T> a = fragment_a<T>(v.a[step].v, p.fast);
          const smem<T> tile = B_tile(stage, part);
#pragma unroll
          for (int j = 0; j < kTiles; j += 2) {
            if constexpr (kTiles > 1) {
              uint32_t b[4];
              ldmatrix<4>(b, tile + B_at(j, step));
              multiply(c[j], a, b[0], b[1], p.fast);
              multiply(c[j + 1], a, b[2], b[3], p.fast);
            } else {
              uint32_t b[2];
              ldmatrix<2>(b, tile + B_at(j, step));
              multiply(c[j], a, b[0], b[1], p.fast);
            }
          }
        }
      });
    if (at.chunk == chunks - 1 && active) epilogue(at.tile, stage, sums);
    stage = stage + 1 == Stages::kCount ? 0 : stage + 1;
    free = free + 1 == Stages::kCount ? 0 : free + 1;
  }
}

}  // namespace rode::gpu
