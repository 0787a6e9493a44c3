// Common to the host sides of all passes: addresses and sizes as kernels take them, and launches.
#pragma once

#include "forward.h"
#include "params.cuh"

namespace rode::cuda {

using namespace rode::gpu;
using Type = RODE_TYPE;  // of x, in this translation unit

// T, constant if Data is.
template <class T, class Data>
using Element = std::conditional_t<std::is_const_v<Data>, const T, T>;

// `count` elements of T.
template <class T, class Data>
gmem<Element<T, Data>> array(Data* data, int64_t count) {
  return {static_cast<Element<T, Data>*>(data), count};
}
// The same, or of float32.
template <class T, class Data>
Parameter<Element<T, Data>, Element<float, Data>> parameter(Data* data, bool fp32, int64_t count) {
  return {array<T>(fp32 ? nullptr : data, count), array<float>(fp32 ? data : nullptr, count)};
}

// Elements that `rows` rows take.
inline int64_t extent(int64_t rows, int64_t ld, int64_t columns) { return rows > 0 ? (rows - 1) * ld + columns : 0; }

// Bytes by which rows `ld` elements apart can be copied: 16, 4 or one element.
template <class T>
int copy_width(const void* data, int64_t ld) {
  const auto fits = [&](uint64_t n) {
    return reinterpret_cast<uintptr_t>(data) % n == 0 && static_cast<uint64_t>(ld) * sizeof(T) % n == 0;
  };
  return fits(16) ? 16 : fits(4) ? 4 : static_cast<int>(sizeof(T));
}

inline int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// The problem's sizes as kernels take them.
template <class Params>
void set_sizes(const Problem& p, Params& k) {
  k.M = static_cast<int>(p.tokens);
  k.R = static_cast<int>(p.total_rank);
  k.N = static_cast<int>(p.experts);
  if constexpr (requires { k.K; }) {
    k.K = static_cast<int>(p.in_features);
    k.O = static_cast<int>(p.out_features);
    k.dropout = p.dropout.on;
  }
}

// The tables that kernels look up by expert or by column, and the flags of a problem.
template <class Params>
void set_experts(const Problem& p, Params& k) {
  k.dense = p.dense;
  if constexpr (requires { k.threshold; }) {
    k.threshold = static_cast<uint32_t>(p.dropout.threshold);
    k.drop_all = p.dropout.threshold >> 32 != 0;
  }
  for (int64_t i = 0; i < p.experts; ++i) {
    k.scaling[i] = static_cast<float>(p.scaling[i]);
    for (int64_t c = p.offsets[i]; c < p.offsets[i + 1]; ++c) k.expert[c] = static_cast<uint8_t>(i);
  }
  if constexpr (requires { k.offset; })
    for (int64_t i = 0; i <= p.experts; ++i) k.offset[i] = static_cast<uint16_t>(p.offsets[i]);
}

inline Dim grid(int64_t x, int64_t y = 1, int64_t z = 1) {
  return {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
}

// `Go` decides what happens to the launches that a pass describes: they are started, or only asked for their shared memory.
struct Start {
  void* stream;
  template <class Kernel, class Params>
  Status operator()(const char* name, Dim grid, int threads, int64_t shared_bytes, Kernel kernel, const Params& params) const {
    const Launch l{name, grid, static_cast<unsigned>(threads), static_cast<unsigned>(shared_bytes), stream};
    return {launch(l, kernel, params), name};
  }
};
struct MostShared {
  unsigned& bytes;
  template <class Kernel, class Params>
  Status operator()(const char*, Dim, int, int64_t shared_bytes, Kernel, const Params&) const {
    if (shared_bytes > bytes) bytes = static_cast<unsigned>(shared_bytes);
    return {};
  }
};

// Makes `device` current and loads the kernels that list_kernels(load) names.
template <class List>
Status load_listed(int device, List list_kernels) {
  Status status = {enter_device(device), "cudaSetDevice"};
  list_kernels([&](const char* name, auto... kernels) {
    ((status = status.error ? status : Status{load_kernel(kernels, device), name}), ...);
  });
  return status;
}

}  // namespace rode::cuda
