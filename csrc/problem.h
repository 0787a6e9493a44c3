// The problem that every native backend solves: sizes, ranks, strides, dtypes. No torch, no Python.
//
//   y = base + sum_i scaling_i g_i B_i A_i drop(x),   g = relu(x Wr^T + br), or given
//
// M tokens, K in_features, O out_features, N experts, R = sum(ranks). Experts are packed: expert i owns columns
// [offsets[i], offsets[i + 1]) of every array that is R wide. The accumulation type C is float, and double for float64.
#pragma once

#include <cstdint>

namespace rode {

enum class DType : int { float64 = 0, float32 = 1, float16 = 2, bfloat16 = 3 };

// Memory of the caller: element (m, c) is at data + m * row + c * column, counted in elements.
struct Matrix {
  void* data = nullptr;
  int64_t row = 0;
  int64_t column = 0;
  explicit operator bool() const { return data != nullptr; }
};

// Philox4x32-10: element e = m K + k of x uses word e & 3 of counter e >> 2; it is kept where word >= threshold.
struct Dropout {
  bool on = false;
  uint64_t seed = 0;
  uint64_t threshold = 0;  // floor(p 2^32): up to 2^32, which no 32-bit word reaches
  // Within the CPU's backward pass, which drops twice: a bit for each element of x, rows of `words`; null: not computed.
  const uint64_t* kept = nullptr;
  int64_t words = 0;
};

struct Problem {
  DType dtype = DType::float32;
  int64_t tokens = 0, in_features = 0, out_features = 0;
  int64_t experts = 0, total_rank = 0;
  const int64_t* offsets = nullptr;  // N + 1
  const double* scaling = nullptr;   // N, dropout's 1 / (1 - p) included
  Dropout dropout;
  bool dense = false;  // u, and the gates' gradient, are wanted where gates are 0 too
  int threads = 1;
};

// A weight as the caller holds it: in dtype, or in C (float32 beside 16-bit x); the core rounds it to dtype once.
struct Weight : Matrix {
  bool in_acc_dtype = false;
};

// Contiguous arrays of C unless said otherwise; null where absent.
struct ForwardArrays {
  Matrix x, base, y;         // in dtype; y may be base
  Weight A, B, router_weight;  // (R, K), (O, R), (N, K)
  const void* router_bias;   // (N)
  void* u;                   // (M, R) out; 0 where not wanted
  void* g;                   // (M, N) out with a router, else in
};

struct BackwardArrays {
  Matrix dy, x, dx;          // in dtype; dy null: no gradient reaches y
  const void* dgates;        // (M, N): gradient that reaches the returned gates
  const void *u, *g;         // as forward left them
  Weight A, B, router_weight;  // (R, K), (O, R), (N, K)
  void *v, *du, *dh;         // (M, R), (M, R), (M, N) out, from which weight gradients are summed; v null: no dB
  void *dA, *dB, *drouter_weight;  // (R, K), (O, R), (N, K) out, each in its weight's type
  void* dbias;               // (N) out
};

}  // namespace rode
