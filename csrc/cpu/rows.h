// Reading a matrix of any dtype and strides as rows, and how tokens are cut into blocks.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../problem.h"
#include "simd.h"
// philox.h uses memcpy
#include "philox.h"

namespace {

// run(a value of the type that `dtype` names).
template <class Run>
void with_type(rode::DType dtype, Run run) {
  switch (dtype) {
    case rode::DType::float64:
      return run(double{});
    case rode::DType::float32:
      return run(float{});
    case rode::DType::float16:
      return run(Float16{});
    case rode::DType::bfloat16:
      return run(BFloat16{});
  }
}

// out[i] = element (m, first + i) in the accumulation type.
template <class T>
void widen_row(const rode::Matrix& matrix, int64_t m, int64_t first, int64_t n, typename AccumulationOf<T>::type* out) {
  const T* p = static_cast<const T*>(matrix.data) + m * matrix.row + first * matrix.column;
  if (matrix.column == 1) {
    using C = typename AccumulationOf<T>::type;
    int64_t i = 0;
    for (; i + kLanes<C> <= n; i += kLanes<C>) store(out + i, load_widened<T>(p + i));
    for (; i < n; ++i) out[i] = widen(p[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = widen(p[i * matrix.column]);
  }
}

// Whether rows of T can be read as rows of E where they stand.
template <class T, class E>
bool is_direct(const rode::Matrix& matrix) {
  return sizeof(T) == sizeof(E) && matrix.column == 1;
}

template <class T, class E>
void copy_row_as(const rode::Matrix& matrix, int64_t m, int64_t first, int64_t n, E* out) {
  if constexpr (sizeof(T) == sizeof(E)) {
    const T* p = static_cast<const T*>(matrix.data) + m * matrix.row + first * matrix.column;
    for (int64_t i = 0; i < n; ++i) out[i] = p[i * matrix.column];
  } else {
    widen_row<T>(matrix, m, first, n, out);
  }
}

// rows[i] = columns [first, first + n) of token m0 + i, for `tokens` tokens: in place where it can be, else in `scratch`.
template <class T, class E>
void gather_rows(const rode::Matrix& matrix, int64_t m0, int64_t tokens, int64_t first, int64_t n, E* scratch, const E** rows) {
  for (int64_t i = 0; i < tokens; ++i) {
    if (is_direct<T, E>(matrix)) {
      rows[i] = static_cast<const E*>(matrix.data) + (m0 + i) * matrix.row + first;
    } else {
      copy_row_as<T>(matrix, m0 + i, first, n, scratch + i * n);
      rows[i] = scratch + i * n;
    }
  }
}

template <class C>
bool any_open(const C* gates, int64_t experts) {
  for (int64_t i = 0; i < experts; ++i)
    if (gates[i] != 0) return true;
  return false;
}

// A thread of a parallel region, and the number of its threads, which may be fewer than were asked for.
struct Team {
  int64_t thread, threads;

  static Team current() {
#ifdef _OPENMP
    return {omp_get_thread_num(), omp_get_num_threads()};
#else
    return {0, 1};
#endif
  }

  // Runs this thread's share of n.
  template <class Run>
  void each(int64_t n, Run run) const {
    for (int64_t i = thread * n / threads; i < (thread + 1) * n / threads; ++i) run(i);
  }
};

// Never more threads than units of work.
inline int thread_count(const rode::Problem& p, int64_t units) {
  const int64_t threads = units < p.threads ? units : p.threads;
  return threads < 1 ? 1 : static_cast<int>(threads);
}

// The number of tokens that stay in cache while all experts are computed for them: more where the experts fill it.
constexpr int64_t kBlockTokens = 32;
inline int64_t block_tokens(const rode::Problem& p) { return p.total_rank > 96 ? kBlockTokens : kBlockTokens / 2; }

}  // namespace
