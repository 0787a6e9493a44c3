// Host side of the forward pass for one type, RODE_TYPE: parameters, launches.
#include "forward.cuh"
#include "forward.h"
#include "host.h"

namespace rode::cuda {
namespace {

// The parameters from which grids and shared memory follow.
ForwardParams<Type> sizes(const Problem& p, bool routed, const Plan& plan, int64_t masks) {
  ForwardParams<Type> k{};
  set_sizes(p, k);
  k.masks = masks > 1 ? static_cast<int>(masks) : 1;
  k.expert_tiles = divide_up(p.total_rank, 8);
  k.router_tiles = routed ? divide_up(p.experts, 8) : 0;
  k.splits = plan.splits;
  k.out_tiles = plan.out_tiles;
  k.routed = routed;
  return k;
}

ForwardParams<Type> parameters(const Problem& p, const ForwardLaunch& a) {
  const int64_t M = p.tokens, K = p.in_features, O = p.out_features, R = p.total_rank, N = p.experts;
  const bool routed = a.router_weight != nullptr;
  ForwardParams<Type> k = sizes(p, routed, a, a.masks);
  k.x = array<Type>(a.x, extent(M, a.ld_x, K));
  k.A = array<Type>(a.A, (R - 1) * a.ld_A + K);
  k.router_weight = array<Type>(a.router_weight, (N - 1) * a.ld_A + K);
  k.B = array<Type>(a.B, O * a.ld_B);
  k.base = array<Type>(a.base, extent(M, a.ld_base, O));
  k.bias = array<float>(a.bias, N);
  k.gates = array<float>(a.gates, M * N);
  k.y = array<Type>(a.y, (M - 1) * a.ld_y + O);
  k.u = array<float>(a.u, M * R);
  k.g = array<float>(a.g, M * N);
  k.columns = static_cast<int>(a.columns ? a.columns : 8 * column_tiles(p, routed));
  k.first_column = static_cast<int>(a.first_column);
  k.router_gap = static_cast<int>(a.router_gap);
  k.partial = array<float>(a.partial, a.splits * M * k.columns);
  k.seed = array<int64_t>(a.seed, k.masks);
  k.ld_x = static_cast<int>(a.ld_x);
  k.ld_A = static_cast<int>(a.ld_A);
  k.ld_B = static_cast<int>(a.ld_B);
  k.ld_base = static_cast<int>(a.ld_base);
  k.ld_y = static_cast<int>(a.ld_y);
  k.copy_x = copy_width<Type>(a.x, a.ld_x);
  const int of_A = copy_width<Type>(a.A, a.ld_A), of_router = copy_width<Type>(a.router_weight, a.ld_A);
  k.copy_weights = of_A < of_router ? of_A : of_router;
  k.copy_B = copy_width<Type>(a.B, a.ld_B);
  k.in_place = a.base && a.base == a.y && a.ld_base == a.ld_y;
  k.fast = a.fast;
  set_experts(p, k);
  return k;
}

// Whether whole rows move 16 bytes at once, B's at least 4: then kernels run that know no other way.
bool aligned_x(const ForwardParams<Type>& k) { return k.K % kChunkValues<Type> == 0 && k.copy_x == 16 && k.copy_weights == 16; }
bool aligned_y(const ForwardLaunch& a, const ForwardParams<Type>& k) {
  return k.O % kChunkValues<Type> == 0 && k.copy_B >= 4 && copy_width<Type>(a.y, a.ld_y) == 16 &&
         (!a.base || copy_width<Type>(a.base, a.ld_base) == 16);
}

template <bool kAligned, int kExpertTiles, int kRouterTiles, class Go>
Status fused(ForwardParams<Type> k, Go go) {
  k.expert_tiles = kExpertTiles;  // where the kernel looks for the router
  k.router_tiles = kRouterTiles;
  const int shared = FusedShared<Type, kExpertTiles, kRouterTiles>::kPipeline + gates_bytes(k.N) + masks_bytes(k.dropout);
  return go("forward_fused", grid(divide_up(k.M, 64)), kBlock<64>, shared, forward_fused<Type, kExpertTiles, kRouterTiles, kAligned>,
            k);
}

template <bool kAligned, int kRows, int kTiles, Masks kMasks = Masks::kOne, class Go>
Status shrunk(const ForwardParams<Type>& k, Go go) {
  const Dim blocks = grid(divide_up(k.expert_tiles + k.router_tiles, kTiles), divide_up(k.M, kRows), k.splits);
  const int shared = ShrinkStages<Type, kRows, kTiles>::kPipeline + masks_bytes(k.dropout, k.masks);
  static_assert(kMasks == Masks::kOne || ShrinkStages<Type, kRows, kTiles>::kPipeline + masks_bytes(true, kMaxMasks) <= kMaxShared);
  return go("forward_shrink", blocks, kBlock<kRows>, shared, forward_shrink<Type, kRows, kTiles, kMasks, kAligned>, k);
}

template <bool kAligned, int kRows, Passes kPasses, class Go>
Status expanded(const ForwardParams<Type>& k, Go go) {
  const int outs = divide_up(k.O, kDepth<Type>), chunks = divide_up(k.expert_tiles, ExpandShared<Type, kRows, kPasses>::kExpertTiles);
  const int kept = kPasses == Passes::kKept ? kept_bytes(chunks) : 0;
  const int shared = ExpandShared<Type, kRows, kPasses>::pipeline(k.expert_tiles + k.router_tiles) + gates_bytes(k.N) + kept;
  const Dim blocks = grid(divide_up(k.M, kRows), divide_up(outs, k.out_tiles));
  return go("forward_expand", blocks, kBlock<kRows>, shared, forward_expand<Type, kRows, kAligned, kPasses>, k);
}

template <bool kAligned, class Go>
Status first_launch(const ForwardParams<Type>& k, const Plan& plan, Go go) {
  const int tiles = k.expert_tiles + k.router_tiles;
  if (k.dropout && k.masks > 1)
    return tiles <= 5 ? shrunk<kAligned, 64, 5, Masks::kOwn>(k, go) : shrunk<kAligned, 64, 16, Masks::kOwn>(k, go);
  return plan.rows == 16 && tiles <= 5 ? shrunk<kAligned, 16, 5>(k, go)
         : tiles <= 5                  ? shrunk<kAligned, 64, 5>(k, go)
                                       : shrunk<kAligned, 64, 16>(k, go);
}

template <bool kAligned, class Go>
Status second_launch(const ForwardParams<Type>& k, const Plan& plan, Go go) {
  if (plan.rows == 16) return expanded<kAligned, 16, Passes::kOne>(k, go);
  if (8 * k.expert_tiles <= kDepth<Type>) return expanded<kAligned, 64, Passes::kOne>(k, go);
  return plan.keep_v ? expanded<kAligned, 64, Passes::kKept>(k, go) : expanded<kAligned, 64, Passes::kAgain>(k, go);
}

template <bool kAligned, class Go>
Status run(const ForwardParams<Type>& k, const Plan& plan, Go go) {
  if (!plan.fused) {
    const Status status = first_launch<kAligned>(k, plan, go);
    return status.error ? status : second_launch<kAligned>(k, plan, go);
  }
  const bool small = k.R <= 32 && (!k.routed || k.N <= 8);
  return small ? fused<kAligned, 4, 1>(k, go) : fused<kAligned, 8, 2>(k, go);
}

}  // namespace

template <>
Status forward<Type>(const Problem& p, const ForwardLaunch& a) {
  if (const int error = enter_device(a.device)) return {error, "cudaSetDevice"};
  const ForwardParams<Type> k = parameters(p, a);
  return aligned_x(k) && aligned_y(a, k) ? run<true>(k, a, Start{a.stream}) : run<false>(k, a, Start{a.stream});
}

template <>
Status shrink<Type>(const Problem& p, const ForwardLaunch& a) {
  if (const int error = enter_device(a.device)) return {error, "cudaSetDevice"};
  const ForwardParams<Type> k = parameters(p, a);
  return aligned_x(k) ? first_launch<true>(k, a, Start{a.stream}) : first_launch<false>(k, a, Start{a.stream});
}

template <>
Status expand<Type>(const Problem& p, const ForwardLaunch& a) {
  if (const int error = enter_device(a.device)) return {error, "cudaSetDevice"};
  const ForwardParams<Type> k = parameters(p, a);
  return aligned_y(a, k) ? second_launch<true>(k, a, Start{a.stream}) : second_launch<false>(k, a, Start{a.stream});
}

template <>
unsigned shared_bytes<Type>(const Problem& p, bool routed, const Plan& plan, int masks) {
  unsigned most = 0;
  run<true>(sizes(p, routed, plan, masks), plan, MostShared{most});
  return most;
}

template <>
Status load_kernels<Type>(int device) {
  return load_listed(device, [](auto load) {
    const auto load_all = [&]<bool kAligned>() {
      load("forward_fused", forward_fused<Type, 4, 1, kAligned>, forward_fused<Type, 8, 2, kAligned>);
      load("forward_shrink", forward_shrink<Type, 16, 5, Masks::kOne, kAligned>, forward_shrink<Type, 64, 5, Masks::kOne, kAligned>,
           forward_shrink<Type, 64, 16, Masks::kOne, kAligned>, forward_shrink<Type, 64, 5, Masks::kOwn, kAligned>,
           forward_shrink<Type, 64, 16, Masks::kOwn, kAligned>);
      load("forward_expand", forward_expand<Type, 16, kAligned, Passes::kOne>, forward_expand<Type, 64, kAligned, Passes::kOne>,
           forward_expand<Type, 64, kAligned, Passes::kKept>, forward_expand<Type, 64, kAligned, Passes::kAgain>);
    };
    load_all.template operator()<true>();
    load_all.template operator()<false>();
  });
}

}  // namespace rode::cuda
