// The CUDA kernels of the forward pass: a plan, addresses on one device, and the functions that launch them. No torch, no Python,
// and no CUDA header.
#pragma once

#include "../problem.h"
#include "fields.h"

namespace rode::cuda {

// clang-format off: lists of fields keep their shape

// The kernels of a call; the caller chooses them from shapes alone.
//   fused      one launch; otherwise two, through `partial`
//   rows       tokens of a tile: 64, or 16 with two launches and at most 128 bytes in a row of B
//   splits     of K, with two launches
//   out_tiles  of 128 bytes of y's rows, that a block of the second launch goes through
//   keep_v     with two launches and longer rows of B: v stays in shared memory, and is not made again for each output tile
#define RODE_FORWARD_PLAN(X) X(bool, fused) X(int, rows) X(int, splits) X(int, out_tiles) X(bool, keep_v)
struct Plan {
  RODE_FORWARD_PLAN(RODE_DECLARE)
};

// Elements from row to row, and the device. A and the router share a row length; a longer row of B goes on with zeros.
#define RODE_FORWARD_LAYOUT(X) \
  X(int64_t, ld_x) X(int64_t, ld_base) X(int64_t, ld_y) X(int64_t, ld_A) X(int64_t, ld_B) X(int, device)
// One of several mixtures that read the same x: the sums of all of them stand side by side in `partial`, all experts' columns, then
// all routers'. Zeros: it is alone.
//   columns       of a row of `partial`
//   first_column  of this mixture's experts
//   router_gap    tiles of 8 columns between its experts' last one and its router's first one
//   masks         of dropout, for `shrink`: one for each mixture, whose seeds stand side by side; `p.offsets` then says where each
//                 mixture's columns begin, at multiples of 8 (16 in backward). At most 1: one for all
#define RODE_FORWARD_SIBLING(X) X(int64_t, columns) X(int64_t, first_column) X(int64_t, router_gap) X(int64_t, masks)
struct ForwardLayout : Plan {
  RODE_FORWARD_LAYOUT(RODE_DECLARE)
  RODE_FORWARD_SIBLING(RODE_DECLARE)
};

// Null where absent. Parameters are in x's dtype, and columns are 1 apart.
//   x, base, y           (M, K), (M, O), (M, O)
//   A, router_weight, B  (R, K), (N, K), (O, R)
//   bias, gates          (N), (M, N): with a router, or without
//   u, g                 (M, R) out, and with a router (M, N) out
//   partial              (splits, M, 8 column_tiles) between two launches
//   seed                 on the device
//   fast                 tf32 products for float32
#define RODE_FORWARD_CALL(X)                                                                                           \
  X(const void*, x) X(const void*, base) X(void*, y) X(const void*, A) X(const void*, router_weight) X(const void*, B) \
  X(const float*, bias) X(const float*, gates) X(float*, u) X(float*, g) X(float*, partial) X(const int64_t*, seed)    \
  X(bool, fast) X(void*, stream)
struct ForwardLaunch : ForwardLayout {
  RODE_FORWARD_CALL(RODE_DECLARE)
};
// clang-format on

struct Status {
  int error = 0;  // a cudaError_t
  const char* kernel = "";
};

// Column tiles of `partial`: the experts', then the router's.
inline int64_t column_tiles(const Problem& p, bool routed) { return (p.total_rank + 7) / 8 + (routed ? (p.experts + 7) / 8 : 0); }

// p.dropout.seed is ignored: the kernels read `seed`. T is gpu::bf16, gpu::f16 or float.
template <class T>
Status forward(const Problem& p, const ForwardLaunch& a);
// The two launches apart, for mixtures that read the same x. shrink: of all of them, as one mixture, from x, A, router_weight and
// partial. expand: of one, from what else there is and partial; of router_weight it only asks whether there is one.
template <class T>
Status shrink(const Problem& p, const ForwardLaunch& a);
template <class T>
Status expand(const Problem& p, const ForwardLaunch& a);
// The most bytes of shared memory that a launch of this plan asks for. Only p's sizes and whether there is dropout matter, and how
// many masks.
template <class T>
unsigned shared_bytes(const Problem& p, bool routed, const Plan& plan, int masks);
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
