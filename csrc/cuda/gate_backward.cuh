// gate_backward adds up t: du = scaling g t, the gates' gradients scaling <t, u>, and from them the logits'.
#pragma once

#include "backward_params.cuh"

namespace rode::gpu {

// Shared memory: the gates of 16 tokens, then what each warp finds of their gradients.
RODE_HOST_DEVICE constexpr int gate_backward_bytes(int experts) { return (1 + kWarps) * 16 * experts * 4; }

// grid (16 tokens); warps take tiles of 8 columns in turn, for one after the other they would wait for memory as often.
template <class T>
RODE_KERNEL(kThreads, 4)
gate_backward(BackwardParams<T> p) {
  const int lane = lane_index(), warp = warp_index(), tile16 = static_cast<int>(block_index().x), m0 = tile16 * 16;
  const int all = (p.M + 15) / 16, rows = p.M - m0 < 16 ? p.M - m0 : 16, pitch = p.D_pitch;
  const smem<float> gates = shared_array<float>(0, 16 * p.N);
  const auto of_warp = [&](int w) { return shared_array<float>((1 + w) * 16 * p.N * 4, 16 * p.N); };
  const smem<float> dg = of_warp(warp);
  bool some = false;
  for (int i = thread_index(); i < 16 * p.N; i += kThreads) {
    const float gate = load(p.g + (offset(m0, p.N) + i), i < rows * p.N);
    some |= gate != 0.0f;
    store(gates + i, gate);
  }
  for (int i = lane; i < 16 * p.N; i += 32) store(dg + i, 0.0f);
  const bool some_open = sync_threads_or(some);
  store(p.open + (p.open_part * all + tile16), static_cast<uint32_t>(some_open), thread_index() == 0);
  for (int tile = warp; tile < 2 * p.expert_groups; tile += kWarps) {
    float gate[4], factor[4], t[4] = {}, product[4];
    int expert[4];
    bool wanted[4], any = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 8 * tile + sum_column(i), row = fragment_row(i);
      expert[i] = column < p.R ? p.expert[column] : kMaxExperts;
      const bool inside = column < p.R && row < rows;
      gate[i] = load(gates + (row * p.N + expert[i]), inside);
      factor[i] = inside ? p.scaling[expert[i]] : 0.0f;
      wanted[i] = inside && (gate[i] != 0.0f || p.dense);
      any |= gate[i] != 0.0f;
    }
    const bool open = ballot(any) != 0;  // as grad_output_pass found it: then t was computed, of all 16 tokens
    if (p.need_t && tile < p.expert_tiles && (open || p.dense)) {
      float u[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * tile + sum_column(i), row = fragment_row(i);
        u[i] = load(p.u + (offset(m0 + row, p.R) + column), wanted[i]);
      }
#pragma unroll 8
      for (int o_tile = 0; o_tile < p.plan.o_tiles; ++o_tile) {
        const vec<float, 4> part =
            load<vec<float, 4>>(p.t + (((static_cast<int64_t>(o_tile) * all + tile16) * p.expert_tiles + tile) * 128 + lane * 4));
#pragma unroll
        for (int i = 0; i < 4; ++i) t[i] += part.v[i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) product[i] = wanted[i] ? factor[i] * t[i] * u[i] : 0.0f;
      const int last = 8 * tile + 7 < p.R ? 8 * tile + 7 : p.R - 1;
      for (int e = p.expert[8 * tile]; e <= p.expert[last]; ++e) {  // by selection: what is not finite in one expert stays there
        float low = (expert[0] == e ? product[0] : 0.0f) + (expert[1] == e ? product[1] : 0.0f);
        float high = (expert[2] == e ? product[2] : 0.0f) + (expert[3] == e ? product[3] : 0.0f);
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) low += shuffle_xor(low, mask), high += shuffle_xor(high, mask);
        if (lane % 4 == 0) {
          const smem<float> a = dg + (fragment_row(0) * p.N + e), b = dg + (fragment_row(2) * p.N + e);
          store(a, load(a) + low);
          store(b, load(b) + high);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = fragment_row(2 * half);
      float du[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        du[i] = gate[2 * half + i] != 0.0f ? factor[2 * half + i] * gate[2 * half + i] * t[2 * half + i] : 0.0f;
      const int64_t at = offset(m0 + row, pitch) + p.D_first + 8 * tile + sum_column(0);
      store(p.D + at, vec<T, 2>{{from_float<T>(du[0]), from_float<T>(du[1])}}, row < rows);
    }
  }
  sync_threads();
  const int columns = p.routed ? 16 * p.router_groups : p.N;
  for (int i = thread_index(); i < rows * columns; i += kThreads) {
    const int row = i / columns, n = i % columns;
    const bool inside = n < p.N;
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) value += load(of_warp(w) + (row * p.N + n), inside);
    const int64_t at = offset(m0 + row, p.N) + n;
    if (p.dgates) value += load(p.dgates + at, inside);
    if (p.routed) value = load(gates + (row * p.N + n), inside) != 0.0f ? value : 0.0f;
    store(p.dh + at, value, inside);
    store(of_warp(0) + (row * p.N + n), value, inside);
    if (p.routed) store(p.D + (offset(m0 + row, pitch) + p.D_router + n), from_float<T>(value));
  }
  if (!p.dbias_partial) return;
  sync_threads();
  for (int n = thread_index(); n < p.N; n += kThreads) {
    float total = 0.0f;
    for (int row = 0; row < rows; ++row) total += load(of_warp(0) + (row * p.N + n));
    store(p.dbias_partial + (offset(tile16, p.N) + n), total);
  }
}

}  // namespace rode::gpu
