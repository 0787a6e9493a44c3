// backward_v adds up t: du = scaling g t, the gates' gradients scaling <t, u>, and from them the logits'.
#pragma once

#include "backward_params.cuh"

namespace rode::gpu {

// grid (64 tokens); a warp has 16.
template <class T>
RODE_KERNEL(kThreads, 4)
backward_v(BackwardParams<T> p) {
  const int lane = lane_index(), warp = warp_index(), m0 = (static_cast<int>(block_index().x) * kWarps + warp) * 16;
  if (m0 >= p.M) return;
  const int all = (p.M + 15) / 16, rows = p.M - m0 < 16 ? p.M - m0 : 16, pitch = 16 * (p.expert_groups + p.router_groups);
  const smem<float> gates = shared_array<float>(static_cast<unsigned>(warp * 32 * p.N * 4), 16 * p.N);
  const smem<float> dg = shared_array<float>(static_cast<unsigned>((warp * 32 + 16) * p.N * 4), 16 * p.N);
  for (int i = lane; i < 16 * p.N; i += 32) {
    store(gates + i, load(p.g + (offset(m0, p.N) + i), i < rows * p.N));
    store(dg + i, 0.0f);
  }
  sync_warp();
  for (int tile = 0; tile < 2 * p.expert_groups; ++tile) {
    float gate[4], factor[4], t[4] = {}, product[4];
    int expert[4];
    bool any = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 8 * tile + sum_column(i), row = fragment_row(i);
      expert[i] = column < p.R ? p.expert[column] : kMaxExperts;
      const bool inside = column < p.R && row < rows;
      gate[i] = load(gates + (row * p.N + expert[i]), inside);
      factor[i] = inside ? p.scaling[expert[i]] : 0.0f;
      any |= gate[i] != 0.0f;
    }
    const bool open = ballot(any) != 0;  // as backward_y found it: then t was computed, of all 16 tokens
    if (p.need_t && tile < p.expert_tiles && (open || p.dense)) {
#pragma unroll 4
      for (int slab = 0; slab < p.slabs; ++slab) {
        const vec<float, 4> part =
            load<vec<float, 4>>(p.t + (((static_cast<int64_t>(slab) * all + m0 / 16) * p.expert_tiles + tile) * 128 + lane * 4));
#pragma unroll
        for (int i = 0; i < 4; ++i) t[i] += part.v[i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * tile + sum_column(i), row = fragment_row(i);
        const bool wanted = (gate[i] != 0.0f || p.dense) && column < p.R && row < rows;
        product[i] = wanted ? factor[i] * t[i] * load(p.u + (offset(m0 + row, p.R) + column)) : 0.0f;
      }
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
      store(p.D + (offset(m0 + row, pitch) + 8 * tile + sum_column(0)), vec<T, 2>{{from_float<T>(du[0]), from_float<T>(du[1])}},
            row < rows);
    }
  }
  sync_warp();
  const int columns = p.routed ? 16 * p.router_groups : p.N;
  for (int i = lane; i < rows * columns; i += 32) {
    const int row = i / columns, n = i % columns;
    const bool inside = n < p.N;
    float value = load(dg + (row * p.N + n), inside);
    const int64_t at = offset(m0 + row, p.N) + n;
    if (p.dgates) value += load(p.dgates + at, inside);
    if (p.routed) value = load(gates + (row * p.N + n), inside) != 0.0f ? value : 0.0f;
    store(p.dh + at, value, inside);
    store(dg + (row * p.N + n), value, inside);
    if (p.routed) store(p.D + (offset(m0 + row, pitch) + 16 * p.expert_groups + n), from_float<T>(value));
  }
  if (!p.of_bias) return;
  sync_warp();
  for (int n = lane; n < p.N; n += 32) {
    float total = 0.0f;
    for (int row = 0; row < rows; ++row) total += load(dg + (row * p.N + n));
    store(p.of_bias + (offset(m0 / 16, p.N) + n), total);
  }
}

}  // namespace rode::gpu
