// Host side of the forward pass for one type, RODE_TYPE: parameters, launches.
#include "forward.cuh"
#include "forward.h"
#include "host.h"

namespace rode::cuda {
namespace {

using namespace rode::gpu;
using Type = RODE_TYPE;

template <class T>
ForwardParams<T> parameters(const Problem& p, const Forward& a) {
  const int64_t M = p.tokens, K = p.in_features, O = p.out_features, R = p.total_rank, N = p.experts;
  const bool routed = a.router != nullptr;
  ForwardParams<T> k{};
  k.x = matrix<T>(a.x, M, K);
  k.A = array<T>(a.A, (R - 1) * a.ld_A + K);
  k.router = array<T>(a.router, (N - 1) * a.ld_A + K);
  k.B = array<T>(a.B, O * a.ld_B);
  k.base = matrix<T>(a.base, M, O);
  k.bias = array<float>(a.bias, N);
  k.gates = array<float>(a.gates, M * N);
  k.y = output<T>(a.y.data, (M - 1) * a.y.row + O);
  k.u = output<float>(a.u, M * R);
  k.g = output<float>(a.g, M * N);
  k.partial = output<float>(a.partial, a.plan.splits * M * 8 * column_tiles(p, routed));
  k.seed = array<int64_t>(a.seed, 1);
  k.ld_x = static_cast<int>(a.x.row);
  k.ld_A = static_cast<int>(a.ld_A);
  k.ld_B = static_cast<int>(a.ld_B);
  k.ld_base = static_cast<int>(a.base.row);
  k.ld_y = static_cast<int>(a.y.row);
  k.threshold = static_cast<uint32_t>(p.dropout.threshold);
  k.drop_all = p.dropout.threshold >> 32 != 0;
  k.M = static_cast<int>(M);
  k.K = static_cast<int>(K);
  k.O = static_cast<int>(O);
  k.R = static_cast<int>(R);
  k.N = static_cast<int>(N);
  k.expert_tiles = divide_up(R, 8);
  k.router_tiles = routed ? divide_up(N, 8) : 0;
  k.splits = a.plan.splits;
  k.out_tiles = a.plan.out_tiles;
  k.copy_x = copy_width<T>(a.x.data, a.x.row);
  const int of_A = copy_width<T>(a.A, a.ld_A), of_router = copy_width<T>(a.router, a.ld_A);
  k.copy_weights = of_A < of_router ? of_A : of_router;
  k.copy_B = copy_width<T>(a.B, a.ld_B);
  k.routed = routed;
  k.dropout = p.dropout.on;
  k.dense = p.dense;
  k.in_place = a.base && a.base.data == a.y.data && a.base.row == a.y.row;
  k.fast = a.fast;
  for (int64_t i = 0; i < N; ++i) {
    k.scaling[i] = static_cast<float>(p.scaling[i]);
    for (int64_t c = p.offsets[i]; c < p.offsets[i + 1]; ++c) k.expert[c] = static_cast<uint8_t>(i);
  }
  return k;
}

// Whether whole rows move 16 bytes at once, B's at least 4: then kernels run that know no other way.
template <class T>
bool aligned(const Forward& a, const ForwardParams<T>& k) {
  constexpr int kEach = 16 / static_cast<int>(sizeof(T));
  return k.K % kEach == 0 && k.O % kEach == 0 && k.copy_x == 16 && k.copy_weights == 16 && k.copy_B >= 4 &&
         copy_width<T>(a.y.data, a.y.row) == 16 && (!a.base || copy_width<T>(a.base.data, a.base.row) == 16);
}

template <class T, bool kAligned, int kExpertTiles, int kRouterTiles>
Status fused(const Problem& p, ForwardParams<T> k, void* stream) {
  k.expert_tiles = kExpertTiles;  // where the kernel looks for the router
  k.router_tiles = kRouterTiles;
  const unsigned shared = FusedShared<T, kExpertTiles, kRouterTiles>::kPipeline + gates_bytes(k.N) + masks_bytes(k.dropout);
  const Launch l{"forward_fused", {static_cast<unsigned>(divide_up(p.tokens, 64))}, kBlock<64>, shared, stream};
  return {launch(l, forward_fused<T, kExpertTiles, kRouterTiles, kAligned>, k), l.kernel};
}

template <class T, bool kAligned, int kRows, int kTiles>
Status shrunk(const ForwardParams<T>& k, void* stream) {
  using Stages = ShrinkStages<T, kRows, kTiles>;
  const Launch l{"forward_shrink",
                 {static_cast<unsigned>(divide_up(k.expert_tiles + k.router_tiles, kTiles)),
                  static_cast<unsigned>(divide_up(k.M, kRows)), static_cast<unsigned>(k.splits)},
                 kBlock<kRows>,
                 static_cast<unsigned>(Stages::kPipeline + masks_bytes(k.dropout)),
                 stream};
  return {launch(l, forward_shrink<T, kRows, kTiles, kAligned>, k), l.kernel};
}

template <class T, bool kAligned, int kRows, Passes kPasses>
Status expanded(const ForwardParams<T>& k, int kept, void* stream) {
  const int outs = divide_up(k.O, kDepth<T>);
  const int shared = ExpandShared<T, kRows, kPasses>::pipeline(k.expert_tiles + k.router_tiles) + gates_bytes(k.N) + kept;
  const Launch l{"forward_expand",
                 {static_cast<unsigned>(divide_up(k.M, kRows)), static_cast<unsigned>(divide_up(outs, k.out_tiles))},
                 kBlock<kRows>,
                 static_cast<unsigned>(shared),
                 stream};
  return {launch(l, forward_expand<T, kRows, kAligned, kPasses>, k), l.kernel};
}

template <class T, bool kAligned>
Status in_two_launches(const ForwardParams<T>& k, int rows, void* stream) {
  const int tiles = k.expert_tiles + k.router_tiles;
  Status status = rows == 16 && tiles <= 5 ? shrunk<T, kAligned, 16, 5>(k, stream)
                  : tiles <= 5             ? shrunk<T, kAligned, 64, 5>(k, stream)
                                           : shrunk<T, kAligned, 64, 16>(k, stream);
  if (status.error) return status;
  using Kept = ExpandShared<T, 64, Passes::kKept>;
  const int chunks = divide_up(k.expert_tiles, Kept::kExpertTiles), kept = kept_bytes(chunks);
  if (rows == 16) return expanded<T, kAligned, 16, Passes::kOne>(k, 0, stream);
  if (chunks == 1) return expanded<T, kAligned, 64, Passes::kOne>(k, 0, stream);
  if (Kept::pipeline(tiles) + gates_bytes(k.N) + kept <= max_shared())
    return expanded<T, kAligned, 64, Passes::kKept>(k, kept, stream);
  return expanded<T, kAligned, 64, Passes::kAgain>(k, 0, stream);
}

template <class T, bool kAligned>
Status run(const Problem& p, const Forward& a, const ForwardParams<T>& k) {
  if (!a.plan.fused) return in_two_launches<T, kAligned>(k, a.plan.rows, a.stream);
  const bool small = p.total_rank <= 32 && (!k.routed || p.experts <= 8);
  return small ? fused<T, kAligned, 4, 1>(p, k, a.stream) : fused<T, kAligned, 8, 2>(p, k, a.stream);
}

}  // namespace

template <>
Status forward<Type>(const Problem& p, const Forward& a) {
  if (const int error = enter_device(a.device)) return {error, "cudaSetDevice"};
  const ForwardParams<Type> k = parameters<Type>(p, a);
  return aligned(a, k) ? run<Type, true>(p, a, k) : run<Type, false>(p, a, k);
}

template <>
Status load_kernels<Type>(int device) {
  if (const int error = enter_device(device)) return {error, "cudaSetDevice"};
  Status status;
  const auto load = [&](const char* name, auto kernel) {
    if (!status.error) status = {load_kernel(kernel), name};
  };
  const auto load_all = [&]<bool kAligned>() {
    load("forward_fused", forward_fused<Type, 4, 1, kAligned>);
    load("forward_fused", forward_fused<Type, 8, 2, kAligned>);
    load("forward_shrink", forward_shrink<Type, 16, 5, kAligned>);
    load("forward_shrink", forward_shrink<Type, 64, 5, kAligned>);
    load("forward_shrink", forward_shrink<Type, 64, 16, kAligned>);
    load("forward_expand", forward_expand<Type, 16, kAligned, Passes::kOne>);
    load("forward_expand", forward_expand<Type, 64, kAligned, Passes::kOne>);
    load("forward_expand", forward_expand<Type, 64, kAligned, Passes::kKept>);
    load("forward_expand", forward_expand<Type, 64, kAligned, Passes::kAgain>);
  };
  load_all.template operator()<true>();
  load_all.template operator()<false>();
  return status;
}

}  // namespace rode::cuda
