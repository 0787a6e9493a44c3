// What the CUDA kernels are asked for: addresses on one device and a plan. No torch, no Python, and no CUDA header.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace rode::cuda {

// Which kernels do it; chosen by the caller from shapes alone.
struct Plan {
  bool fused = false;   // one launch; otherwise two, through `partial`
  int rows = 64;        // tokens of a tile: 64, or 16 with two launches and at most 128 bytes in a row of B
  int splits = 1;       // of K, with two launches
  int out_tiles = 1;    // of 128 bytes of y's rows, that a block of the second launch goes through
  bool keep_v = false;  // with two launches and more in a row of B: v stays in shared memory, and is not made again for each of them
};

// Contiguous unless it says otherwise. Parameters are in x's dtype, their rows ld_A (A and router) and ld_B elements apart; a row of
// B that is longer than R goes on with zeros. Only x, base and y may have another distance between rows; their columns are 1 apart.
// Null where absent.
struct Forward {
  Matrix x, base, y;           // (M, K), (M, O), (M, O)
  const void *A, *router, *B;  // (R, K), (N, K), (O, R)
  int64_t ld_A, ld_B;
  const float *bias, *gates;  // (N), (M, N): with a router, or without
  float *u, *g;               // (M, R) out, and with a router (M, N) out
  float* partial;             // (splits, M, 8 column_tiles) between two launches
  const int64_t* seed;        // on the device
  bool fast;                  // tf32 products for float32
  Plan plan;
  int device;
  void* stream;
};

struct Status {
  int error = 0;  // a cudaError_t
  const char* kernel = "";
};

// Column tiles of `partial`: the experts', then the router's.
inline int64_t column_tiles(const Problem& p, bool routed) { return (p.total_rank + 7) / 8 + (routed ? (p.experts + 7) / 8 : 0); }
// Whether one launch has room for these columns.
inline bool can_fuse(const Problem& p, bool routed) {
  const int64_t experts = routed ? p.experts : 0;
  return (p.total_rank <= 32 && experts <= 8) || (p.total_rank <= 64 && experts <= 16);
}

// In p, dropout.seed is not looked at. T is gpu::bf16, gpu::f16 or float.
template <class T>
Status forward(const Problem& p, const Forward& arrays);
// The most bytes of shared memory that a launch of this plan asks for. Of p only sizes and whether there is dropout are looked at.
template <class T>
unsigned shared_bytes(const Problem& p, bool routed, const Plan& plan);
// Loads every kernel of T on the current device, which the driver must not do while a stream is being captured.
template <class T>
Status load_kernels(int device);

// ---- device.cu

const char* error_text(int error);
// CUDA's version numbers, 1000 major + 10 minor: what the driver serves (0: there is none), and what this was built with.
int driver_version();
int runtime_version();
// The most bytes of shared memory that a block may ask for on a device.
Status max_shared(int device, int& bytes);

}  // namespace rode::cuda
