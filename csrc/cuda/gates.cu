// Host side of the kernels around PyTorch's matrix products, for one type, RODE_TYPE: parameters, launches.
#include "gates.cuh"
#include "gates.h"
#include "host.h"

namespace rode::cuda {
namespace {

static_assert(apply_gates_bytes(kMaxExperts) <= kMaxShared && apply_gates_backward_bytes(kMaxExperts, kMaxRank) <= kMaxShared);

// The parameters of both directions.
GateParams<Type> parameters(const Problem& p, const GatesLayout& layout) {
  GateParams<Type> k{};
  set_sizes(p, k);
  set_experts(p, k);
  k.columns = static_cast<int>(layout.columns);
  k.pitch_R = static_cast<int>(layout.pitch_R);
  k.routed = layout.routed;
  return k;
}

}  // namespace

template <>
Status pack_parameters<Type>(const Problem& p, const Pack& a) {
  if (const int error = enter_device(a.device)) return {error, "cudaSetDevice"};
  const int64_t K = p.in_features, O = p.out_features, R = p.total_rank, N = a.router_weight ? p.experts : 0;
  const auto [fp32_A, fp32_router, fp32_B] = a.params_fp32;
  PackParams<Type> k{};
  k.A = parameter<Type>(a.A, fp32_A, R * K);
  k.router_weight = parameter<Type>(a.router_weight, fp32_router, N * K);
  k.B = parameter<Type>(a.B, fp32_B, O * R);
  k.W = array<Type>(a.to_W, (a.all_rows ? a.all_rows : a.rows) * a.pitch_K);
  k.rows_A = static_cast<int>(a.all_rows ? a.rows_A : R);
  k.first_row = static_cast<int>(a.first_row);
  k.first_router = static_cast<int>(a.all_rows ? a.first_router : R);
  k.to_B = array<Type>(a.to_B, O * a.pitch_R);
  k.K = static_cast<int>(K);
  k.R = static_cast<int>(R);
  k.N = static_cast<int>(N);
  k.O = a.to_B ? static_cast<int>(O) : 0;
  k.rows = a.to_W ? static_cast<int>(a.rows) : 0;
  k.pitch_K = static_cast<int>(a.pitch_K);
  k.pitch_R = static_cast<int>(a.pitch_R);
  const int64_t pieces = (k.rows * a.pitch_K + k.O * a.pitch_R) / kChunkValues<Type>;  // pitches are multiples of 8
  if (pieces == 0) return {};
  return Start{a.stream}("pack_parameters", grid(divide_up(pieces, kThreads)), kThreads, 0, gpu::pack_parameters<Type>, k);
}

template <>
Status apply_gates<Type>(const Problem& p, const ApplyGates& a) {
  if (const int error = enter_device(a.device)) return {error, "cudaSetDevice"};
  GateParams<Type> k = parameters(p, a);
  k.sums = array<float>(a.sums, p.tokens * a.columns);
  k.bias = array<float>(a.bias, p.experts);
  k.gates = array<float>(a.gates, p.tokens * p.experts);
  k.u = array<float>(a.u, p.tokens * p.total_rank);
  k.g = array<float>(a.g, p.tokens * p.experts);
  k.v = array<Type>(a.v, p.tokens * a.pitch_R);
  const Dim blocks = grid(divide_up(p.tokens, kGateTokens));
  return Start{a.stream}("apply_gates", blocks, kThreads, apply_gates_bytes(k.N), gpu::apply_gates<Type>, k);
}

template <>
Status apply_gates_backward<Type>(const Problem& p, const ApplyGatesBackward& a) {
  if (const int error = enter_device(a.device)) return {error, "cudaSetDevice"};
  GateParams<Type> k = parameters(p, a);
  k.t = array<float>(a.t, p.tokens * a.pitch_R);
  k.old_u = array<float>(a.u, p.tokens * p.total_rank);
  k.old_g = array<float>(a.g, p.tokens * p.experts);
  k.dgates = array<float>(a.dgates, p.tokens * p.experts);
  k.v = array<Type>(a.v, p.tokens * a.pitch_R);
  k.D = array<Type>(a.D, p.tokens * a.columns);
  k.dh = array<float>(a.dh, p.tokens * p.experts);
  const Dim blocks = grid(divide_up(p.tokens, kGateTokens));
  return Start{a.stream}("apply_gates_backward", blocks, kThreads, apply_gates_backward_bytes(k.N, k.pitch_R),
                         gpu::apply_gates_backward<Type>, k);
}

template <>
Status drop_rows<Type>(const Problem& p, const Drop& a) {
  if (const int error = enter_device(a.device)) return {error, "cudaSetDevice"};
  const int64_t K = p.in_features;
  DropParams<Type> k{};
  k.from = array<Type>(a.from, extent(a.rows, a.ld_from, K));
  k.masks = a.masks > 1 ? static_cast<int>(a.masks) : 1;
  k.to = array<Type>(a.to, k.masks * a.rows * K);
  k.seed = array<int64_t>(a.seed, k.masks);
  k.first = static_cast<int>(a.first);
  k.rows = static_cast<int>(a.rows);
  k.K = static_cast<int>(K);
  k.ld_from = static_cast<int>(a.ld_from);
  k.threshold = static_cast<uint32_t>(p.dropout.threshold);
  k.drop_all = p.dropout.threshold >> 32 != 0;
  const bool aligned = K % kChunkValues<Type> == 0 && copy_width<Type>(a.from, a.ld_from) == 16 && copy_width<Type>(a.to, K) == 16;
  const Dim blocks = grid(divide_up(a.rows * divide_up(K, kDropped), kThreads));
  return Start{a.stream}("drop_rows", blocks, kThreads, 0, aligned ? gpu::drop_rows<Type, true> : gpu::drop_rows<Type, false>, k);
}

template <>
Status load_gate_kernels<Type>(int device) {
  return load_listed(device, [](auto load) {
    load("pack_parameters", gpu::pack_parameters<Type>);
    load("drop_rows", gpu::drop_rows<Type, true>, gpu::drop_rows<Type, false>);
    load("apply_gates", gpu::apply_gates<Type>);
    load("apply_gates_backward", gpu::apply_gates_backward<Type>);
  });
}

}  // namespace rode::cuda
