// Host side of what stands around library products, for one type, RODE_TYPE: parameters, launches.
#include "between.cuh"
#include "between.h"
#include "host.h"

namespace rode::cuda {
namespace {

using namespace rode::gpu;
using Type = RODE_TYPE;

static_assert(forward_weigh_bytes(kMaxExperts) <= kMaxShared && backward_weigh_bytes(kMaxExperts, kMaxRank) <= kMaxShared);

template <class T>
Given<T> given(const void* data, bool wide, int64_t count) {
  Given<T> from{};
  if (wide) {
    from.wide = array<float>(data, count);
  } else {
    from.narrow = array<T>(data, count);
  }
  return from;
}

// What both directions have in common.
template <class T>
WeighParams<T> parameters(const Problem& p, bool routed, int64_t columns, int64_t pitch_R) {
  WeighParams<T> k{};
  k.M = static_cast<int>(p.tokens);
  k.R = static_cast<int>(p.total_rank);
  k.N = static_cast<int>(p.experts);
  k.columns = static_cast<int>(columns);
  k.pitch_R = static_cast<int>(pitch_R);
  k.routed = routed;
  k.dense = p.dense;
  for (int64_t i = 0; i < p.experts; ++i) {
    k.scaling[i] = static_cast<float>(p.scaling[i]);
    k.offset[i] = static_cast<uint16_t>(p.offsets[i]);
    for (int64_t c = p.offsets[i]; c < p.offsets[i + 1]; ++c) k.expert[c] = static_cast<uint8_t>(i);
  }
  k.offset[p.experts] = static_cast<uint16_t>(p.total_rank);
  return k;
}

}  // namespace

template <>
Status pack_parameters<Type>(const Problem& p, const Pack& a) {
  if (const int error = enter_device(a.device)) return {error, "cudaSetDevice"};
  const int64_t K = p.in_features, O = p.out_features, R = p.total_rank, N = a.router ? p.experts : 0;
  PackParams<Type> k{};
  k.A = given<Type>(a.A, a.wide_A, R * K);
  k.router = given<Type>(a.router, a.wide_router, N * K);
  k.B = given<Type>(a.B, a.wide_B, O * R);
  k.W = output<Type>(a.to_W, a.rows * a.pitch_K);
  k.to_B = output<Type>(a.to_B, O * a.pitch_R);
  k.K = static_cast<int>(K);
  k.R = static_cast<int>(R);
  k.N = static_cast<int>(N);
  k.O = a.to_B ? static_cast<int>(O) : 0;
  k.rows = a.to_W ? static_cast<int>(a.rows) : 0;
  k.pitch_K = static_cast<int>(a.pitch_K);
  k.pitch_R = static_cast<int>(a.pitch_R);
  constexpr int kEach = 16 / static_cast<int>(sizeof(Type));
  const int64_t pieces = k.rows * (a.pitch_K / kEach) + k.O * (a.pitch_R / kEach);
  if (pieces == 0) return {};
  const Launch l{"pack_parameters", {static_cast<unsigned>(divide_up(pieces, kThreads))}, kThreads, 0, a.stream};
  return {launch(l, gpu::pack_parameters<Type>, k), l.kernel};
}

template <>
Status weigh<Type>(const Problem& p, const Weigh& a) {
  if (const int error = enter_device(a.device)) return {error, "cudaSetDevice"};
  const bool routed = a.g != nullptr;
  WeighParams<Type> k = parameters<Type>(p, routed, a.columns, a.pitch_R);
  k.sums = array<float>(a.sums, p.tokens * a.columns);
  k.bias = array<float>(a.bias, p.experts);
  k.gates = array<float>(a.gates, p.tokens * p.experts);
  k.u = output<float>(a.u, p.tokens * p.total_rank);
  k.g = output<float>(a.g, p.tokens * p.experts);
  k.v = output<Type>(a.v, p.tokens * a.pitch_R);
  const Launch l{"forward_weigh",
                 {static_cast<unsigned>(divide_up(p.tokens, kWeighed))},
                 kThreads,
                 static_cast<unsigned>(forward_weigh_bytes(k.N)),
                 a.stream};
  return {launch(l, forward_weigh<Type>, k), l.kernel};
}

template <>
Status weigh_back<Type>(const Problem& p, const WeighBack& a) {
  if (const int error = enter_device(a.device)) return {error, "cudaSetDevice"};
  WeighParams<Type> k = parameters<Type>(p, a.routed, a.columns, a.pitch_R);
  k.t = array<float>(a.t, p.tokens * a.pitch_R);
  k.old_u = array<float>(a.u, p.tokens * p.total_rank);
  k.old_g = array<float>(a.g, p.tokens * p.experts);
  k.dgates = array<float>(a.dgates, p.tokens * p.experts);
  k.v = output<Type>(a.v, p.tokens * a.pitch_R);
  k.D = output<Type>(a.D, p.tokens * a.columns);
  k.dh = output<float>(a.dh, p.tokens * p.experts);
  const Launch l{"backward_weigh",
                 {static_cast<unsigned>(divide_up(p.tokens, kWeighed))},
                 kThreads,
                 static_cast<unsigned>(backward_weigh_bytes(k.N, k.pitch_R)),
                 a.stream};
  return {launch(l, backward_weigh<Type>, k), l.kernel};
}

template <>
Status load_between_kernels<Type>(int device) {
  if (const int error = enter_device(device)) return {error, "cudaSetDevice"};
  Status status;
  const auto load = [&](const char* name, auto kernel) {
    if (!status.error) status = {load_kernel(kernel, device), name};
  };
  load("pack_parameters", gpu::pack_parameters<Type>);
  load("forward_weigh", forward_weigh<Type>);
  load("backward_weigh", backward_weigh<Type>);
  return status;
}

}  // namespace rode::cuda
