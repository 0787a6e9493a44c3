// Weights as the kernels read them: rounded to x's dtype once, and where that pays laid out anew.
#pragma once

#include "rows.h"

namespace {

// Element (r, c) of a weight, rounded to T, in the accumulation type.
template <class T>
typename AccumulationOf<T>::type weight_at(const rode::Weight& w, int64_t r, int64_t c) {
  using C = typename AccumulationOf<T>::type;
  const int64_t at = r * w.row + c * w.column;
  return w.wide ? round_to<T>(static_cast<const C*>(w.data)[at]) : widen(static_cast<const T*>(w.data)[at]);
}

// What the products read: the accumulation type, or where there are dot products of bfloat16 pairs those.
template <class T>
struct Path {
  using Row = typename AccumulationOf<T>::type;     // of x, A and the router
  using Column = typename AccumulationOf<T>::type;  // of v and B
  static constexpr int kTerm = 1;                   // ranks that one of them holds
};
#if defined(__AVX512BF16__)
template <>
struct Path<BFloat16> {
  using Row = BFloat16;
  using Column = uint32_t;
  static constexpr int kTerm = 2;
};
#endif

// Whether its rows can be used where they stand.
template <class T>
bool stands_as_rows(const rode::Weight& w, int64_t columns) {
  return !w.wide && sizeof(T) == sizeof(typename Path<T>::Row) && w.column == 1 && w.row == columns;
}

template <class T>
void copy_row(const rode::Weight& w, int64_t r, int64_t n, typename Path<T>::Row* out) {
  for (int64_t c = 0; c < n; ++c) out[c] = narrow<typename Path<T>::Row>(weight_at<T>(w, r, c));
}

// B in chunks of `width` outputs, (chunks, terms, width): of a chunk all experts' columns lie together, and stay in the first cache.
struct Chunks {
  int64_t width, count;
};

// As many outputs at a time as leave a chunk small, in steps of `step`.
inline Chunks chunks_of(int64_t outputs, int64_t terms, int64_t element, int64_t step) {
  constexpr int64_t kBytes = 24 * 1024;
  int64_t width = kBytes / (terms * element) / step * step;
  const int64_t most = 4 * step;
  if (width < step) width = step;
  if (width > most) width = most;
  return {width, (outputs + width - 1) / width};
}

// Four neighbours of row r, from column c.
template <class T, class Four>
Four four_of(const rode::Weight& w, int64_t r, int64_t c) {
  Four v;
  for (int i = 0; i < 4; ++i) v[i] = weight_at<T>(w, r, c + i);
  return v;
}

// Chunk i of B; what lies beyond the last output is 0. Four rows by four columns at a time: one by one it would take as long as a
// few dozen tokens do.
template <class T, class C>
void pack_chunk(const rode::Weight& B, int64_t i, const Chunks& chunks, int64_t total_rank, int64_t outputs, C* out) {
  typedef C Four __attribute__((vector_size(4 * sizeof(C))));
  const int64_t first = i * chunks.width, width = chunks.width;
  const int64_t n = outputs - first < width ? outputs - first : width;
  const int64_t whole = n / 4 * 4, whole_ranks = total_rank / 4 * 4;
  const bool plain = B.column == 1 && (sizeof(T) == sizeof(C));
  for (int64_t o = 0; o < whole; o += 4) {
    for (int64_t j = 0; j < whole_ranks; j += 4) {
      Four a, b, c, d;
      if (plain) {
        const C* p = static_cast<const C*>(B.data) + (first + o) * B.row + j;
        std::memcpy(&a, p, sizeof a), std::memcpy(&b, p + B.row, sizeof b);
        std::memcpy(&c, p + 2 * B.row, sizeof c), std::memcpy(&d, p + 3 * B.row, sizeof d);
      } else {
        a = four_of<T, Four>(B, first + o, j), b = four_of<T, Four>(B, first + o + 1, j);
        c = four_of<T, Four>(B, first + o + 2, j), d = four_of<T, Four>(B, first + o + 3, j);
      }
      const Four ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Four cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      const Four columns[4] = {__builtin_shufflevector(ab0, cd0, 0, 1, 4, 5), __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7),
                               __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5), __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7)};
      for (int k = 0; k < 4; ++k) std::memcpy(out + (j + k) * width + o, &columns[k], sizeof(Four));
    }
    for (int64_t j = whole_ranks; j < total_rank; ++j)
      for (int k = 0; k < 4; ++k) out[j * width + o + k] = weight_at<T>(B, first + o + k, j);
  }
  for (int64_t o = whole; o < width; ++o)
    for (int64_t j = 0; j < total_rank; ++j) out[j * width + o] = o < n ? weight_at<T>(B, first + o, j) : C(0);
}

#if defined(__AVX512BF16__)
inline uint32_t pair_of(BFloat16 first, BFloat16 second) { return first.bits | static_cast<uint32_t>(second.bits) << 16; }

// Chunk i of B as pairs of ranks; the pair of an expert's last, where its rank is odd, holds a 0.
inline void pack_pairs(const rode::Problem& p, const rode::Weight& B, int64_t i, const Chunks& chunks, uint32_t* out) {
  const int64_t first = i * chunks.width;
  const auto at = [&](int64_t o, int64_t j) {
    const int64_t where = o * B.row + j * B.column;
    return B.wide ? narrow<BFloat16>(static_cast<const float*>(B.data)[where]) : static_cast<const BFloat16*>(B.data)[where];
  };
  for (int64_t o = 0; o < chunks.width; ++o) {
    uint32_t* to = out + o;
    for (int64_t e = 0; e < p.experts; ++e)
      for (int64_t j = p.offsets[e]; j < p.offsets[e + 1]; j += 2, to += chunks.width)
        *to = first + o >= p.out_features ? 0
                                          : pair_of(at(first + o, j), j + 1 < p.offsets[e + 1] ? at(first + o, j + 1) : BFloat16{});
  }
}
#endif

}  // namespace
