// What the CUDA kernels of the backward pass are asked for. No torch, no Python, and no CUDA header.
#pragma once

#include "forward.h"

namespace rode::cuda {

// Chosen by the caller from shapes alone.
struct BackwardPlan {
  bool wide = false;  // 64 packed columns share a reading of dy, not 32
  int slabs = 1;      // of O
  int slab = 64;      // columns of one, in whole rows of 128 bytes
  int share_y = 16;   // tokens of a range of backward_y
  int groups = 3;     // of 16 columns of D that a block of backward_x has: 3 or 5, all of them; or 4, as often as it takes
  int share_x = 64;   // tokens of a range of backward_x
  int share_dx = 64;  // tokens of a range of its dx, with 4 groups
};

// As `Forward` has them. `dy` has any strides; the outputs are contiguous, and null where they are not asked for.
struct Backward {
  Matrix dy, x;  // dy null: no gradient reaches y
  const void *A, *router, *B;
  int64_t ld_A, ld_B;
  const float *u, *g, *dgates;  // (M, R), (M, N), (M, N)
  const int64_t* seed;
  void *dx, *dA, *dW, *dB;      // (M, K), (R, K), (N, K), (O, R): dx in x's type
  bool wide_A, wide_W, wide_B;  // the gradient is float32, not of x's type
  float *dbias, *dh;            // (N), (M, N): of the logits, or of given gates
  void* D;                      // (M, 16 groups): du and dh in x's type
  uint32_t* open;               // (M / 16), with dh
  float *t, *of_B, *of_A, *of_bias;
  bool fast;
  BackwardPlan plan;
  int device;
  void* stream;
};

template <class T>
Status backward(const Problem& p, const Backward& arrays);
// As forward's, where every gradient is asked for.
template <class T>
unsigned shared_bytes(const Problem& p, bool routed, const BackwardPlan& plan);
template <class T>
Status load_backward_kernels(int device);

}  // namespace rode::cuda
