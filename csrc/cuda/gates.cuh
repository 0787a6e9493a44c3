// pack_parameters puts parameters side by side, in x's type. apply_gates and apply_gates_backward stand between matrix products by
// PyTorch, for mixtures of so many columns that it multiplies faster than the kernels beside this file (docs/cuda.md):
//
//   forward    sums = x [A; Wr]^T (PyTorch)   apply_gates: g, u, v                       y = base + v B^T (PyTorch)
//   backward   t = dy B (PyTorch)             apply_gates_backward: v, D = [du dh], dh   dB = dy^T v, [dA; dWr] = D^T x,
//                                                                                        dx = D [A; Wr] (PyTorch)
//
// Both only move what is M x R. drop_rows makes what dropout leaves of x, some rows at a time, or of a gradient. Blocks that a multiprocessor holds at once, at least, as in forward.cuh:
//   pack_parameters: 8, 8
//   drop_rows: 8, 8
//   apply_gates: 8, 8
//   apply_gates_backward: 4, 2
#pragma once

#include "dropout.cuh"
#include "params.cuh"

namespace rode::gpu {

template <class T>
struct PackParams {
  Parameter<const T, const float> A, router_weight, B;
  gmem<T> W, to_B;  // (rows, pitch_K), (O, pitch_R); rows 0: not asked for, and so O
  int K, R, N, O, rows, pitch_K, pitch_R;
  int rows_A, first_row, first_router;  // see `PackLayout`
};

// A thread writes 16 bytes.
template <class T>
RODE_KERNEL(kThreads, 8)
pack_parameters(PackParams<T> p) {
  constexpr int kEach = kChunkValues<T>;
  const int64_t of_W = static_cast<int64_t>(p.rows) * (p.pitch_K / kEach);
  const int64_t pieces = of_W + static_cast<int64_t>(p.O) * (p.pitch_R / kEach);
  int64_t piece = static_cast<int64_t>(block_index().x) * kThreads + thread_index();
  if (piece >= pieces) return;
  const bool of_B = piece >= of_W;
  if (of_B) piece -= of_W;
  const int columns = of_B ? p.R : p.K, pitch = of_B ? p.pitch_R : p.pitch_K;
  const int row = static_cast<int>(piece / (pitch / kEach)), column = static_cast<int>(piece % (pitch / kEach)) * kEach;
  const bool of_router = !of_B && row >= p.rows_A;
  const int from_row = of_router ? row - p.rows_A : row;
  const int to_row = of_B ? row : from_row + (of_router ? p.first_router : p.first_row);
  const bool exists = of_B || from_row < (of_router ? p.N : p.R);
  const auto from = of_B ? p.B : of_router ? p.router_weight : p.A;
  vec<T, kEach> out;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t at = offset(from_row, columns) + column + i;
    const bool inside = exists && column + i < columns;
    out.v[i] = from.fp32 ? from_float<T>(load(from.fp32 + at, inside)) : load(from.narrow + at, inside);
  }
  store((of_B ? p.to_B : p.W) + (offset(to_row, pitch) + column), out);
}

template <class T>
struct DropParams {
  gmem<const T> from;  // begins at row `first` of x
  gmem<T> to;          // (masks, rows, K)
  gmem<const int64_t> seed;  // (masks)
  uint32_t threshold;
  int first, rows, K, ld_from, masks;
  bool drop_all;
};

constexpr int kDropped = 16;  // neighbouring columns that a thread decides about

template <class T, bool kAligned>
RODE_KERNEL(kThreads, 8)
drop_rows(DropParams<T> p) {
  const int per_row = (p.K + kDropped - 1) / kDropped;
  const int64_t piece = static_cast<int64_t>(block_index().x) * kThreads + thread_index();
  if (piece >= static_cast<int64_t>(p.rows) * per_row) return;
  const int row = static_cast<int>(piece / per_row), column = static_cast<int>(piece % per_row) * kDropped;
  const uint64_t element = static_cast<uint64_t>(offset(p.first + row, p.K) + column);
  const gmem<const T> from = p.from + (offset(row, p.ld_from) + column);
  constexpr int kEach = kAligned ? kChunkValues<T> : 1, kPieces = kDropped / kEach;
  using Piece = std::conditional_t<kAligned, vec<T, kChunkValues<T>>, T>;
  Piece values[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) values[i] = load<Piece>(from + i * kEach, column + i * kEach < p.K);
#pragma unroll 1
  for (int mask = 0; mask < p.masks; ++mask) {
    const uint64_t seed = static_cast<uint64_t>(load(p.seed + mask));
    const uint32_t bits = p.drop_all ? 0u : keep_bits<kDropped / 4, kAligned>(element, seed, p.threshold);
    const gmem<T> to = p.to + (offset(mask * p.rows + row, p.K) + column);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      Piece kept = values[i];
      if constexpr (kAligned) {
#pragma unroll
        for (int j = 0; j < kEach; ++j)
          if (!(bits >> (i * kEach + j) & 1)) kept.v[j] = T{};
      } else {
        if (!(bits >> i & 1)) kept = T{};
      }
      store(to + i * kEach, kept, column + i * kEach < p.K);
    }
  }
}

constexpr int kGateTokens = 8;  // tokens of a block
// Shared memory of apply_gates: their gates.
RODE_HOST_DEVICE constexpr int apply_gates_bytes(int experts) { return kGateTokens * experts * 4; }

template <class T>
struct GateParams {
  gmem<const float> sums, bias, gates, t, old_u, old_g, dgates;
  gmem<float> u, g, dh;
  gmem<T> v, D;
  int M, R, N, columns, pitch_R;  // elements of a row of sums or D, and of v and t
  bool routed, dense;
  float scaling[kMaxExperts];
  uint16_t offset[kMaxExperts + 1];  // first column of each expert
  uint8_t expert[kMaxRank];
};

// grid (8 tokens). A thread has a column, of all tokens, so that their loads are under way together.
template <class T>
RODE_KERNEL(kThreads, 8)
apply_gates(GateParams<T> p) {
  const int m0 = static_cast<int>(block_index().x) * kGateTokens, rows = p.M - m0 < kGateTokens ? p.M - m0 : kGateTokens;
  const smem<float> gates = shared_array<float>(0, kGateTokens * p.N);
  for (int i = thread_index(); i < rows * p.N; i += kThreads) {
    const int row = i / p.N, n = i % p.N;
    float gate;
    if (p.routed) {
      const float logit = load(p.sums + (offset(m0 + row, p.columns) + p.R + n)) + load(p.bias + n, static_cast<bool>(p.bias));
      gate = logit <= 0.0f ? 0.0f : logit;  // NaN is not swallowed
      store(p.g + (offset(m0, p.N) + i), gate);
    } else {
      gate = load(p.gates + (offset(m0, p.N) + i));
    }
    store(gates + i, gate);
  }
  sync_threads();
  for (int column = thread_index(); column < p.pitch_R; column += kThreads) {
    const bool exists = column < p.R;
    const int expert = exists ? p.expert[column] : 0;
    const float factor = p.scaling[expert];
    float u[kGateTokens];
#pragma unroll
    for (int i = 0; i < kGateTokens; ++i) u[i] = load(p.sums + (offset(m0 + i, p.columns) + column), exists && i < rows);
#pragma unroll
    for (int i = 0; i < kGateTokens; ++i) {
      const float gate = load(gates + (i * p.N + expert), exists && i < rows);
      const bool open = gate != 0.0f;
      store(p.u + (offset(m0 + i, p.R) + column), open || p.dense ? u[i] : 0.0f, exists && i < rows);
      store(p.v + (offset(m0 + i, p.pitch_R) + column), from_float<T>(open ? factor * gate * u[i] : 0.0f), i < rows);
    }
  }
}

// Shared memory of apply_gates_backward: gates of 8 tokens, then for each of them scaling t u. One more value follows every 16
// columns, so that threads that add up experts of rank 16 meet different banks.
RODE_HOST_DEVICE constexpr int product_pitch(int pitch_R) { return pitch_R + pitch_R / 16 + 1; }
RODE_HOST_DEVICE constexpr int apply_gates_backward_bytes(int experts, int pitch_R) {
  return kGateTokens * (experts + product_pitch(pitch_R)) * 4;
}

template <class T>
RODE_KERNEL(kThreads, 4)
apply_gates_backward(GateParams<T> p) {
  const int m0 = static_cast<int>(block_index().x) * kGateTokens, rows = p.M - m0 < kGateTokens ? p.M - m0 : kGateTokens;
  const smem<float> gates = shared_array<float>(0, kGateTokens * p.N);
  const auto product_at = [&](int row, int column) {
    const int pitch = product_pitch(p.pitch_R);
    return shared_array<float>(kGateTokens * p.N * 4, kGateTokens * pitch) +
           (row * pitch + column + column / 16);
  };
  for (int i = thread_index(); i < rows * p.N; i += kThreads) store(gates + i, load(p.old_g + (offset(m0, p.N) + i)));
  sync_threads();
  for (int column = thread_index(); column < p.pitch_R; column += kThreads) {
    const bool exists = column < p.R;
    const int expert = exists ? p.expert[column] : 0;
    const float factor = p.scaling[expert];
    float gate[kGateTokens], u[kGateTokens], t[kGateTokens];
#pragma unroll
    for (int i = 0; i < kGateTokens; ++i) {
      gate[i] = load(gates + (i * p.N + expert), exists && i < rows);
      const bool wanted = exists && i < rows && (gate[i] != 0.0f || p.dense);
      u[i] = load(p.old_u + (offset(m0 + i, p.R) + column), wanted);
      t[i] = load(p.t + (offset(m0 + i, p.pitch_R) + column), wanted && p.t);
    }
#pragma unroll
    for (int i = 0; i < kGateTokens; ++i) {
      const bool open = gate[i] != 0.0f, wanted = open || p.dense;
      store(product_at(i, column), wanted ? factor * t[i] * u[i] : 0.0f, i < rows);
      store(p.D + (offset(m0 + i, p.columns) + column), from_float<T>(open ? factor * gate[i] * t[i] : 0.0f),
            p.D && exists && i < rows);
      store(p.v + (offset(m0 + i, p.pitch_R) + column), from_float<T>(open ? factor * gate[i] * u[i] : 0.0f), p.v && i < rows);
    }
  }
  sync_threads();
  const int rest = p.columns - p.R;  // of D: the logits' gradients, then zeros
  const int width = rest < p.N ? p.N : rest;
  for (int i = thread_index(); i < rows * width; i += kThreads) {
    const int row = i / width, n = i % width;
    float value = 0.0f;
    if (n < p.N) {
      for (int column = p.offset[n]; column < p.offset[n + 1]; ++column) value += load(product_at(row, column));
      const int64_t at = offset(m0 + row, p.N) + n;
      value += load(p.dgates + at, static_cast<bool>(p.dgates));
      if (p.routed && load(gates + (row * p.N + n)) == 0.0f) value = 0.0f;
      store(p.dh + at, value);
    }
    store(p.D + (offset(m0 + row, p.columns) + p.R + n), from_float<T>(p.routed ? value : 0.0f), p.D && n < rest);
  }
}

}  // namespace rode::gpu
