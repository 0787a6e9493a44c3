// The CUDA kernels of the backward pass: a plan, addresses on one device, and the functions that launch them. No torch, no Python,
// and no CUDA header.
#pragma once

#include "forward.h"

namespace rode::cuda {

// clang-format off: lists of fields keep their shape

// The kernels of a call; the caller chooses them from shapes alone.
//   many_columns         64 packed columns share a reading of dy, not 32
//   o_tiles              tiles of O
//   o_tile_columns       columns of one, in whole rows of 128 bytes
//   tokens_per_split_y   tokens of a range of grad_output_pass
//   groups               of 16 columns of D that a block of grad_input_pass has: 3 or 5, all of them; or 4, as often as it takes
//   tokens_per_split_x   tokens of a range of grad_input_pass
//   tokens_per_split_dx  tokens of a range of its dx, with 4 groups
#define RODE_BACKWARD_PLAN(X)                                                                            \
  X(bool, many_columns) X(int, o_tiles) X(int, o_tile_columns) X(int, tokens_per_split_y) X(int, groups) \
  X(int, tokens_per_split_x) X(int, tokens_per_split_dx)
struct BackwardPlan {
  RODE_BACKWARD_PLAN(RODE_DECLARE)
};

// Elements from row to row, of dy also from column to column. params_fp32: whether the gradients of A, router and B are float32
// beside a 16-bit x.
#define RODE_BACKWARD_LAYOUT(X) \
  X(int64_t, ld_x) X(Strides, ld_dy) X(int64_t, ld_A) X(int64_t, ld_B) X(ThreeFlags, params_fp32) X(int, device)
// One of several mixtures that read the same x: D of all of them stands side by side, all experts' groups of 16 columns, then all
// routers', and so do the rows of dA_partial. Zeros: it is alone.
//   D_pitch, D_first, D_router  columns of a row of D, the first one of this mixture's experts, and of its router
//   open_part, open_parts       which part of `open` it writes; parts, any of which may say that tokens are open
//   masks                       as in `ForwardLayout`, for `grad_input`
#define RODE_BACKWARD_SIBLING(X)                                                                             \
  X(int64_t, D_pitch) X(int64_t, D_first) X(int64_t, D_router) X(int64_t, open_part) X(int64_t, open_parts) \
  X(int64_t, masks)
struct BackwardLayout : BackwardPlan {
  RODE_BACKWARD_LAYOUT(RODE_DECLARE)
  RODE_BACKWARD_SIBLING(RODE_DECLARE)
};

// Null where absent or not asked for; the outputs are contiguous.
//   dy, x                (M, O), (M, K); dy null: no gradient reaches y
//   A, router_weight, B  as in `ForwardLaunch`
//   u, g, dgates         (M, R), (M, N), (M, N)
//   dx, dA               (M, K) in x's type, (R, K)
//   drouter_weight       (N, K)
//   dB                   (O, R)
//   dbias, dh            (N), (M, N): of the logits, or of given gates
//   D                    (M, 16 groups): du and dh in x's type
//   open                 (open_parts, M / 16), with dh
//   t, dB_partial, dA_partial, dbias_partial: sums over parts, as in `BackwardParams`
#define RODE_BACKWARD_CALL(X)                                                                                               \
  X(const void*, dy) X(const void*, x) X(const void*, A) X(const void*, router_weight) X(const void*, B) X(const float*, u) \
  X(const float*, g) X(const float*, dgates) X(const int64_t*, seed) X(void*, dx) X(void*, dA) X(void*, drouter_weight)     \
  X(void*, dB) X(float*, dbias) X(float*, dh) X(void*, D) X(uint32_t*, open) X(float*, t) X(float*, dB_partial)             \
  X(float*, dA_partial) X(float*, dbias_partial) X(bool, fast) X(void*, stream)
struct BackwardLaunch : BackwardLayout {
  RODE_BACKWARD_CALL(RODE_DECLARE)
};
// clang-format on

template <class T>
Status backward(const Problem& p, const BackwardLaunch& a);
// The launches apart, for mixtures that read the same x: grad_output_pass and gate_backward of one mixture; grad_input_pass of all,
// as one; reduce_partials of one. Of gradients that a launch does not write it only asks whether they are wanted.
template <class T>
Status grad_output(const Problem& p, const BackwardLaunch& a);
template <class T>
Status grad_input(const Problem& p, const BackwardLaunch& a);
template <class T>
Status reduce(const Problem& p, const BackwardLaunch& a);
// Like the forward pass's, where every gradient is asked for.
template <class T>
unsigned shared_bytes(const Problem& p, bool routed, const BackwardPlan& plan, int masks);
template <class T>
Status load_backward_kernels(int device);

}  // namespace rode::cuda
