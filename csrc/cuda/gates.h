// Kernels around PyTorch's matrix products: parameters in x's type before them, gates between them. No torch, no Python, and no
// CUDA header.
#pragma once

#include "forward.h"

namespace rode::cuda {

// clang-format off: lists of fields keep their shape

// Parameters become x's type: W (rows, pitch_K) is A, then the router, then zeros; B (O, pitch_R) goes on with zeros. Pitches are
// multiples of 8 elements. params_fp32: whether A, router_weight and B are float32 beside a 16-bit x.
#define RODE_PACK_LAYOUT(X) \
  X(ThreeFlags, params_fp32) X(int64_t, rows) X(int64_t, pitch_K) X(int64_t, pitch_R) X(int, device)
// One of several mixtures that share W. Zeros: it is alone.
//   rows_A                A and zeros, before the router's rows
//   first_row, first_router  where these rows and the router's begin in W
//   all_rows              of W; `rows` are this mixture's
#define RODE_PACK_SIBLING(X) X(int64_t, rows_A) X(int64_t, first_row) X(int64_t, first_router) X(int64_t, all_rows)
struct PackLayout {
  RODE_PACK_LAYOUT(RODE_DECLARE)
  RODE_PACK_SIBLING(RODE_DECLARE)
};
// A, router_weight, B: (R, K), (N, K), (O, R). to_W and to_B: null where not asked for.
#define RODE_PACK_CALL(X) \
  X(const void*, A) X(const void*, router_weight) X(const void*, B) X(void*, to_W) X(void*, to_B) X(void*, stream)
struct Pack : PackLayout {
  RODE_PACK_CALL(RODE_DECLARE)
};

// Elements of a row: `columns` of sums and D, pitch_R of t and v. routed: gates come from a router.
#define RODE_GATES_LAYOUT(X) X(bool, routed) X(int64_t, columns) X(int64_t, pitch_R) X(int, device)
struct GatesLayout {
  RODE_GATES_LAYOUT(RODE_DECLARE)
};

// Forward, between sums = x [A; Wr]^T (M, columns) and v B^T: gates, u and v (M, pitch_R), which goes on with zeros.
//   bias, gates  (N); (M, N), without a router
//   u, g         (M, R), and with a router (M, N)
#define RODE_APPLY_GATES_CALL(X) \
  X(const float*, sums) X(const float*, bias) X(const float*, gates) X(float*, u) X(float*, g) X(void*, v) X(void*, stream)
struct ApplyGates : GatesLayout {
  RODE_APPLY_GATES_CALL(RODE_DECLARE)
};

// Backward, between t = dy B (M, pitch_R), null where no gradient comes, and the products that follow: v as above, D (M, columns),
// which is du, then the logits' gradients, then zeros, and dh (M, N). v and D: null where not asked for.
#define RODE_APPLY_GATES_BACKWARD_CALL(X)                                                                                \
  X(const float*, t) X(const float*, u) X(const float*, g) X(const float*, dgates) X(void*, v) X(void*, D) X(float*, dh) \
  X(void*, stream)
struct ApplyGatesBackward : GatesLayout {
  RODE_APPLY_GATES_BACKWARD_CALL(RODE_DECLARE)
};

// Dropout's work on rows `first`, first + 1, ... of x, or of a gradient of its shape: `to` gets `from`, with zeros for what is
// dropped. Both begin at row `first`; `to` is contiguous and may be `from`.
//   masks  at most 1: one. More: `to` has as many copies, one after the other, and `seed` a seed for each
#define RODE_DROP_LAYOUT(X) X(int, device) X(int64_t, masks)
struct DropLayout {
  RODE_DROP_LAYOUT(RODE_DECLARE)
};
#define RODE_DROP_CALL(X) \
  X(const void*, from) X(void*, to) X(const int64_t*, seed) X(int64_t, first) X(int64_t, rows) X(int64_t, ld_from) X(void*, stream)
struct Drop : DropLayout {
  RODE_DROP_CALL(RODE_DECLARE)
};
// clang-format on

template <class T>
Status pack_parameters(const Problem& p, const Pack& a);
template <class T>
Status apply_gates(const Problem& p, const ApplyGates& a);
template <class T>
Status apply_gates_backward(const Problem& p, const ApplyGatesBackward& a);
template <class T>
Status drop_rows(const Problem& p, const Drop& a);
template <class T>
Status load_gate_kernels(int device);

}  // namespace rode::cuda
