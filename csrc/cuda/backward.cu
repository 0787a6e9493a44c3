// Host side of the backward pass for one type, RODE_TYPE: parameters, launches.
#include "backward.h"
#include "gate_backward.cuh"
#include "grad_input_pass.cuh"
#include "grad_output_pass.cuh"
#include "host.h"

namespace rode::cuda {
namespace {

// The parameters from which grids and shared memory follow.
BackwardParams<Type> sizes(const Problem& p, bool routed, const BackwardPlan& plan, int64_t masks) {
  BackwardParams<Type> k{};
  set_sizes(p, k);
  k.masks = masks > 1 ? static_cast<int>(masks) : 1;
  k.routed = routed;
  k.expert_tiles = divide_up(p.total_rank, 8);
  k.expert_groups = divide_up(p.total_rank, 16);
  k.router_groups = routed ? divide_up(p.experts, 16) : 0;
  k.plan = plan;
  k.chunks = divide_up(k.expert_groups + k.router_groups, plan.groups);
  return k;
}

BackwardParams<Type> parameters(const Problem& p, const BackwardLaunch& a) {
  const int64_t M = p.tokens, K = p.in_features, O = p.out_features, R = p.total_rank, N = p.experts;
  BackwardParams<Type> k = sizes(p, a.router_weight != nullptr, a, a.masks);
  const int64_t groups = k.expert_groups + k.router_groups, rows = a.D_pitch ? a.D_pitch : 16 * groups;
  k.D_pitch = static_cast<int>(rows);
  k.D_first = static_cast<int>(a.D_first);
  k.D_router = static_cast<int>(a.D_pitch ? a.D_router : 16 * k.expert_groups);
  k.open_part = static_cast<int>(a.open_part);
  k.open_parts = a.open_parts ? static_cast<int>(a.open_parts) : 1;
  const int64_t ranges_y = divide_up(M, a.tokens_per_split_y), ranges_x = divide_up(M, a.tokens_per_split_x);
  k.pitch = divide_up(K, 8) * 8;
  k.dy = array<Type>(a.dy, a.dy ? (M - 1) * a.ld_dy[0] + (O - 1) * a.ld_dy[1] + 1 : 0);
  k.x = array<Type>(a.x, extent(M, a.ld_x, K));
  k.A = array<Type>(a.A, (R - 1) * a.ld_A + K);
  k.router_weight = array<Type>(a.router_weight, (N - 1) * a.ld_A + K);
  k.B = array<Type>(a.B, (O - 1) * a.ld_B + R);
  k.u = array<float>(a.u, M * R);
  k.g = array<float>(a.g, M * N);
  k.dgates = array<float>(a.dgates, M * N);
  k.seed = array<int64_t>(a.seed, k.masks);
  k.D = array<Type>(a.D, M * rows);
  k.dx = array<Type>(a.dx, M * K);
  k.dh = array<float>(a.dh, M * N);
  k.open = array<uint32_t>(a.open, int64_t{k.open_parts} * divide_up(M, 16));
  k.t = array<float>(a.t, a.o_tiles * int64_t{divide_up(M, 16)} * k.expert_tiles * 128);
  k.dB_partial = array<float>(a.dB_partial, ranges_y * O * 8 * k.expert_tiles);
  k.dA_partial = array<float>(a.dA_partial, ranges_x * rows * k.pitch);
  k.dbias_partial = array<float>(a.dbias_partial, divide_up(M, 16) * N);
  k.ld_dy = a.ld_dy[0];
  k.dy_column = a.ld_dy[1];
  k.ld_x = static_cast<int>(a.ld_x);
  k.ld_A = static_cast<int>(a.ld_A);
  k.ld_B = static_cast<int>(a.ld_B);
  k.copy_dy = copy_width<Type>(a.dy, a.ld_dy[0]);
  k.copy_x = copy_width<Type>(a.x, a.ld_x);
  k.fast = a.fast;
  k.need_t = a.t != nullptr;
  k.need_B = a.dB_partial != nullptr;
  k.need_A = a.dA != nullptr;
  k.need_router = a.drouter_weight != nullptr;
  k.need_x = a.dx != nullptr;
  set_experts(p, k);
  return k;
}

template <int kTiles, bool kAligned, class Go>
Status launch_grad_output(const BackwardParams<Type>& k, Go go) {
  using Shape = OTileShape<Type, kTiles>;
  const Dim blocks = grid(k.plan.o_tiles, divide_up(k.M, k.plan.tokens_per_split_y), divide_up(k.expert_tiles, kTiles));
  const int shared = Shape::kFlags + divide_up(divide_up(k.plan.tokens_per_split_y, Shape::kTokens), 8) * 16;
  return go("grad_output_pass", blocks, Shape::kThreadsY, shared, grad_output_pass<Type, kTiles, kAligned>, k);
}

template <class Go>
Status launch_gate_backward(const BackwardParams<Type>& k, Go go) {
  return go("gate_backward", grid(divide_up(k.M, 16)), kThreads, gate_backward_bytes(k.N), gate_backward<Type>, k);
}

template <int kGroups, bool kManyColumns, bool kAligned, Masks kMasks = Masks::kOne, class Go>
Status launch_grad_input(const BackwardParams<Type>& k, Go go) {
  using Shape = ColumnShape<Type, kGroups>;
  const bool sums = k.need_A || k.need_router;
  const int chunks = kManyColumns ? (sums ? k.chunks : 0) + (k.need_x ? 1 : 0) : 1;
  const int x = k.plan.tokens_per_split_x, dx = k.plan.tokens_per_split_dx;
  const int shortest = !kManyColumns || !k.need_x ? x : !sums ? dx : x < dx ? x : dx;
  const int longest = kManyColumns && dx > x ? dx : x;
  const int shared = Shape::masks(divide_up(longest, Shape::kTokens)) + (k.dropout ? 2 * k.masks * Shape::kMaskBytes : 0);
  const Dim blocks = grid(divide_up(k.K, Shape::kColumns), divide_up(k.M, shortest), chunks);
  return go("grad_input_pass", blocks, kThreads, shared, grad_input_pass<Type, kGroups, kManyColumns, kMasks, kAligned>, k);
}

// Whether whole rows of dy, or of x and dx, move 16 bytes at once: then kernels run that know no other way.
bool aligned_y(const BackwardParams<Type>& k) {
  return k.dy_column == 1 && k.copy_dy == 16 && k.O % kChunkValues<Type> == 0;
}
bool aligned_x(const BackwardParams<Type>& k, const BackwardLaunch& a) {
  return k.copy_x == 16 && k.K % kChunkValues<Type> == 0 && copy_width<Type>(a.dx, k.K) == 16 && copy_width<Type>(a.A, k.ld_A) == 16 &&
         copy_width<Type>(a.router_weight, k.ld_A) == 16;
}

template <bool kAligned, class Go>
Status grad_output_launch(const BackwardParams<Type>& k, Go go) {
  return k.plan.many_columns ? launch_grad_output<8, kAligned>(k, go) : launch_grad_output<4, kAligned>(k, go);
}
template <bool kAligned, class Go>
Status grad_input_launch(const BackwardParams<Type>& k, Go go) {
  if (k.dropout && k.masks > 1)  // of at least 4 groups
    return k.plan.groups == 5 ? launch_grad_input<5, false, kAligned, Masks::kOwn>(k, go)
                              : launch_grad_input<4, true, kAligned, Masks::kOwn>(k, go);
  return k.plan.groups == 3   ? launch_grad_input<3, false, kAligned>(k, go)
         : k.plan.groups == 5 ? launch_grad_input<5, false, kAligned>(k, go)
                            : launch_grad_input<4, true, kAligned>(k, go);
}

Status reduce_launch(const BackwardParams<Type>& k, const BackwardLaunch& a) {
  ReduceParams<Type> s{};
  s.dB_partial = k.dB_partial;
  s.dA_partial = k.dA_partial;
  s.dbias_partial = k.dbias_partial;
  s.size_B = a.dB ? k.O * k.R : 0;
  s.size_A = a.dA ? k.R * k.K : 0;
  s.size_router = a.drouter_weight ? k.N * k.K : 0;
  s.size_bias = a.dbias ? k.N : 0;
  const auto [fp32_A, fp32_router, fp32_B] = a.params_fp32;
  s.dB = parameter<Type>(a.dB, fp32_B, s.size_B);
  s.dA = parameter<Type>(a.dA, fp32_A, s.size_A);
  s.drouter_weight = parameter<Type>(a.drouter_weight, fp32_router, s.size_router);
  s.dbias = array<float>(a.dbias, k.N);
  s.ranges_y = divide_up(k.M, k.plan.tokens_per_split_y);
  s.ranges_x = divide_up(k.M, k.plan.tokens_per_split_x);
  s.K = k.K;
  s.O = k.O;
  s.R = k.R;
  s.N = k.N;
  s.pitch_B = 8 * k.expert_tiles;
  s.rows_A = k.D_pitch;
  s.first_A = k.D_first;
  s.pitch_A = k.pitch;
  s.first_router = k.D_router;
  s.parts_bias = divide_up(k.M, 16);
  const int count = divide_up(s.size_B + s.size_A + s.size_router, 32) * 32 + 32 * s.size_bias;  // at most 2^27
  if (count == 0) return {};
  return Start{a.stream}("reduce_partials", grid(divide_up(count, kThreads)), kThreads, 0, reduce_partials<Type>, s);
}

Status launch_of_output(const BackwardParams<Type>& k, const BackwardLaunch& a) {
  const Start start{a.stream};
  Status status;
  if (k.need_t || k.need_B) status = aligned_y(k) ? grad_output_launch<true>(k, start) : grad_output_launch<false>(k, start);
  return status.error || !k.dh ? status : launch_gate_backward(k, start);
}
Status launch_of_input(const BackwardParams<Type>& k, const BackwardLaunch& a) {
  const Start start{a.stream};
  return aligned_x(k, a) ? grad_input_launch<true>(k, start) : grad_input_launch<false>(k, start);
}

// run(parameters, a) on a's device.
template <class Run>
Status on_device(const Problem& p, const BackwardLaunch& a, Run run) {
  if (const int error = enter_device(a.device)) return {error, "cudaSetDevice"};
  return run(parameters(p, a), a);
}

}  // namespace

template <>
Status grad_output<Type>(const Problem& p, const BackwardLaunch& a) {
  return on_device(p, a, launch_of_output);
}

template <>
Status grad_input<Type>(const Problem& p, const BackwardLaunch& a) {
  return on_device(p, a, launch_of_input);
}

template <>
Status reduce<Type>(const Problem& p, const BackwardLaunch& a) {
  return on_device(p, a, reduce_launch);
}

template <>
Status backward<Type>(const Problem& p, const BackwardLaunch& a) {
  return on_device(p, a, [](const BackwardParams<Type>& k, const BackwardLaunch& a) {
    Status status = launch_of_output(k, a);
    if (!status.error && (k.need_A || k.need_router || k.need_x)) status = launch_of_input(k, a);
    return status.error ? status : reduce_launch(k, a);
  });
}

template <>
unsigned shared_bytes<Type>(const Problem& p, bool routed, const BackwardPlan& plan, int masks) {
  BackwardParams<Type> k = sizes(p, routed, plan, masks);
  k.need_A = k.need_x = true;
  unsigned most = 0;
  const MostShared ask{most};
  grad_output_launch<true>(k, ask);
  launch_gate_backward(k, ask);
  grad_input_launch<true>(k, ask);
  return most;
}

template <>
Status load_backward_kernels<Type>(int device) {
  return load_listed(device, [](auto load) {
    const auto load_all = [&]<bool kAligned>() {
      load("grad_output_pass", grad_output_pass<Type, 4, kAligned>, grad_output_pass<Type, 8, kAligned>);
      load("grad_input_pass", grad_input_pass<Type, 3, false, Masks::kOne, kAligned>,
           grad_input_pass<Type, 4, true, Masks::kOne, kAligned>, grad_input_pass<Type, 5, false, Masks::kOne, kAligned>,
           grad_input_pass<Type, 4, true, Masks::kOwn, kAligned>, grad_input_pass<Type, 5, false, Masks::kOwn, kAligned>);
    };
    load_all.template operator()<true>();
    load_all.template operator()<false>();
    load("gate_backward", gate_backward<Type>);
    load("reduce_partials", reduce_partials<Type>);
  });
}

}  // namespace rode::cuda
