// What stands around products that a library computes, and before kernels that take parameters in x's type. No torch, no Python,
// and no CUDA header.
#pragma once

#include "forward.h"

namespace rode::cuda {

// Parameters become x's type: W (rows, pitch_K) is A, then the router, then zeros; B (O, pitch_R) goes on with zeros. Pitches are
// multiples of 8 elements; what is to be made has an address.
struct Pack {
  const void *A, *router, *B;        // (R, K), (N, K), (O, R)
  bool wide_A, wide_router, wide_B;  // each float32, or of x's type
  void *to_W, *to_B;
  int64_t rows, pitch_K, pitch_R;
  int device;
  void* stream;
};

// Forward, between sums = x [A; Wr]^T (M, columns) and v B^T: gates, u and v (M, pitch_R), which goes on with zeros.
struct Weigh {
  const float *sums, *bias, *gates;  // (M, columns); (N); (M, N), without a router
  float *u, *g;                      // (M, R), and with a router (M, N)
  void* v;
  int64_t columns, pitch_R;
  int device;
  void* stream;
};

// Backward, between t = dy B (M, pitch_R), null where no gradient comes, and the products that follow: v as above, D (M, columns),
// which is du, then the logits' gradients, then zeros, and dh (M, N). What is to be made has an address.
struct WeighBack {
  const float *t, *u, *g, *dgates;
  void *v, *D;
  float* dh;
  bool routed;
  int64_t columns, pitch_R;
  int device;
  void* stream;
};

template <class T>
Status pack_parameters(const Problem& p, const Pack& arrays);
template <class T>
Status weigh(const Problem& p, const Weigh& arrays);
template <class T>
Status weigh_back(const Problem& p, const WeighBack& arrays);
template <class T>
Status load_between_kernels(int device);

}  // namespace rode::cuda
