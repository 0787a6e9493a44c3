// Sums over tokens: dA = du^T x, dB = dy^T v, dWr = dh^T x. Lanes run along the columns; the thread that owns columns walks all
// tokens in order, so the bits do not depend on the number of threads.
#pragma once

#include "dots.h"

namespace {

constexpr int64_t kSumTokens = 256;  // tokens that are summed before they join the total: long sums stay accurate

#if defined(__AVX512F__)
constexpr int kOuterRows = 6, kOuterVectors = 4;  // 6 x 4 sums in flight, 4 + 1 operands
#else
constexpr int kOuterRows = 2, kOuterVectors = 4;
#endif

// For each block of kSumTokens tokens and each expert: the tokens that have it open, and their coefficients side by side. Where
// Path<T> has pairs of tokens, the second of the last pair may be 0.
template <class T>
class OpenTokens {
  using C = typename AccumulationOf<T>::type;
  using Column = typename Path<T>::Column;
  static constexpr int kTerm = Path<T>::kTerm;

 public:
  OpenTokens(const rode::Problem& problem, bool with_x, bool with_dy)
      : p(problem),
        tokens_(blocks() * kSumTokens * p.experts),
        counts_(blocks() * p.experts),
        of_x_(with_x ? blocks() * kSumTokens * p.total_rank : 0),
        of_dy_(with_dy ? blocks() * kSumTokens * p.total_rank : 0),
        of_router_(blocks() * kSumTokens * p.experts) {}

  int64_t blocks() const { return (p.tokens + kSumTokens - 1) / kSumTokens; }
  int64_t count(int64_t block, int64_t e) const { return counts_.get()[block * p.experts + e]; }
  const int32_t* tokens(int64_t block, int64_t e) const { return tokens_.get() + (block * p.experts + e) * kSumTokens; }
  const Column* of_x(int64_t block, int64_t e) const { return of_x_.get() + at(block, e); }
  const Column* of_dy(int64_t block, int64_t e) const { return of_dy_.get() + at(block, e); }
  const C* of_router(int64_t block, int64_t e) const { return of_router_.get() + (block * p.experts + e) * kSumTokens; }

  // du, v and dh of the block's tokens, or null.
  void collect(int64_t block, const C* g, const C* du, const C* v, const C* dh) {
    const int64_t m0 = block * kSumTokens, tokens = p.tokens - m0 < kSumTokens ? p.tokens - m0 : kSumTokens;
    for (int64_t e = 0; e < p.experts; ++e) {
      int32_t* open = tokens_.get() + (block * p.experts + e) * kSumTokens;
      int64_t count = 0;
      for (int64_t i = 0; i < tokens; ++i)
        if (g[(m0 + i) * p.experts + e] != 0) open[count++] = static_cast<int32_t>(i);
      counts_.get()[block * p.experts + e] = count;
      if (du != nullptr) side_by_side(e, m0, open, count, du, of_x_.get() + at(block, e));
      if (v != nullptr) side_by_side(e, m0, open, count, v, of_dy_.get() + at(block, e));
      if (dh != nullptr)
        for (int64_t i = 0; i < count; ++i)
          of_router_.get()[(block * p.experts + e) * kSumTokens + i] = dh[(m0 + open[i]) * p.experts + e];
    }
  }

 private:
  int64_t at(int64_t block, int64_t e) const { return (block * p.total_rank + p.offsets[e]) * kSumTokens; }

  void side_by_side(int64_t e, int64_t m0, const int32_t* open, int64_t count, const C* values, Column* out) const {
    const int64_t begin = p.offsets[e], width = p.offsets[e + 1] - begin;
    for (int64_t i = 0; i < count; i += kTerm) {
      const C* of_first = values + (m0 + open[i]) * p.total_rank + begin;
      if constexpr (kTerm == 1) {
        for (int64_t j = 0; j < width; ++j) out[i * width + j] = of_first[j];
      } else {
#if defined(__AVX512BF16__)
        const C* of_second = i + 1 < count ? values + (m0 + open[i + 1]) * p.total_rank + begin : nullptr;
        for (int64_t j = 0; j < width; ++j)
          out[i / 2 * width + j] =
              pair_of(narrow<BFloat16>(of_first[j]), of_second == nullptr ? BFloat16{} : narrow<BFloat16>(of_second[j]));
#endif
      }
    }
  }

  const rode::Problem& p;
  Scratch<int32_t> tokens_;
  Scratch<int64_t> counts_;
  Scratch<Column> of_x_, of_dy_;
  Scratch<C> of_router_;
};

// Prefetches rows of a matrix that will be read next, a cache line at a time while something else is computed.
struct MatrixPrefetcher {
  const char* data = nullptr;
  int64_t row_bytes = 0, rows = 0, bytes = 0;
  int64_t row = 0, at = 0;

  // Columns [c, c + n) of rows [m, m + tokens).
  MatrixPrefetcher(const rode::Matrix& matrix, int64_t element, int64_t m, int64_t tokens, int64_t c, int64_t n)
      : data(static_cast<const char*>(matrix.data) + (m * matrix.row + c) * element),
        row_bytes(matrix.row * element),
        rows(matrix.column == 1 ? tokens : 0),
        bytes(n * element) {}

  RODE_INLINE void step() {
    if (row >= rows) return;
    __builtin_prefetch(data + row * row_bytes + at, 0, 2);
    at += 64;
    if (at >= bytes) at = 0, ++row;
  }
};

// Rows of `out`, `stride` apart, += V vectors each; of these `some` columns if kPart.
template <bool kPart, int TR, int V, class C>
RODE_INLINE void add_to_rows(const Vector<C> (&sums)[TR][V], int64_t some, C* out, int64_t stride) {
  constexpr int64_t lanes = kLanes<C>;
  for (int r = 0; r < TR; ++r)
    for (int v = 0; v < V; ++v) {
      C* to = out + r * stride + v * lanes;
      const int64_t left = kPart ? some - v * lanes : lanes;
      if (left >= lanes)
        store(to, load(to) + sums[r][v]);
      else
        for (int64_t l = 0; l < left; ++l) to[l] += sums[r][v][l];
    }
}

// out[r * stride + c] += sum_i coefficients[i * width + r] * rows[i][c], for TR rows and V vectors from column c on; `some` columns
// of them where V is 1. Rows are of C, or narrower.
template <int TR, int V, class C, class E>
void outer_tile(const C* coefficients, int64_t width, const E* const* rows, int64_t count, int64_t c, int64_t some, C* out,
                int64_t stride, MatrixPrefetcher& prefetcher) {
  constexpr int64_t lanes = kLanes<C>;
  Vector<C> sums[TR][V];
  RODE_UNROLL for (int r = 0; r < TR; ++r) RODE_UNROLL for (int v = 0; v < V; ++v) sums[r][v] = Vector<C>{};
  MatrixPrefetcher mine = prefetcher;  // in registers
  for (int64_t i = 0; i < count; ++i) {
    mine.step();
    Vector<C> x[V];
    if (V > 1 || some == lanes) {
      RODE_UNROLL for (int v = 0; v < V; ++v) x[v] = load_widened<E>(rows[i] + c + v * lanes);
    } else {
      E first[lanes] = {};
      std::memcpy(first, rows[i] + c, some * sizeof(E));
      x[0] = load_widened<E>(first);
    }
    RODE_UNROLL for (int r = 0; r < TR; ++r) RODE_UNROLL for (int v = 0; v < V; ++v) sums[r][v] +=
        coefficients[i * width + r] * x[v];
  }
  prefetcher = mine;
  add_to_rows<V == 1>(sums, some, out + c, stride);
}

#if defined(__AVX512BF16__)
// Pairs from 32 columns of two tokens, 16 pairs at a time.
RODE_INLINE void interleave(__m512i first, __m512i second, __m512i* pairs) {
  alignas(64) static const struct Order {
    uint16_t low[32], high[32];
    constexpr Order() : low(), high() {
      for (int i = 0; i < 16; ++i) {
        low[2 * i] = i, low[2 * i + 1] = 32 + i;
        high[2 * i] = 16 + i, high[2 * i + 1] = 48 + i;
      }
    }
  } order;
  pairs[0] = _mm512_permutex2var_epi16(first, _mm512_load_si512(order.low), second);
  pairs[1] = _mm512_permutex2var_epi16(first, _mm512_load_si512(order.high), second);
}

// The same from pairs of tokens, whose rows come one after the other: rows of bfloat16, or interleaved already, in which case every
// second one is ignored. V vectors of sums are V / 2 of what is loaded; `some` where V is 2.
template <int TR, int V, class E>
void outer_tile(const uint32_t* coefficients, int64_t width, const E* const* rows, int64_t pairs, int64_t c, int64_t some,
                float* out, int64_t stride, MatrixPrefetcher& prefetcher) {
  constexpr int64_t lanes = kLanes<float>;
  static_assert(V % 2 == 0);
  Vector<float> sums[TR][V];
  RODE_UNROLL for (int r = 0; r < TR; ++r) RODE_UNROLL for (int v = 0; v < V; ++v) sums[r][v] = Vector<float>{};
  MatrixPrefetcher mine = prefetcher;  // in registers
  for (int64_t i = 0; i < pairs; ++i) {
    mine.step();
    __m512i x[V];
    if constexpr (sizeof(E) == sizeof(uint32_t)) {
      RODE_UNROLL for (int v = 0; v < V; ++v) x[v] = _mm512_loadu_si512(rows[2 * i] + c + v * lanes);
    } else {
      RODE_UNROLL for (int v = 0; v < V; v += 2) {
        const BFloat16 *p = rows[2 * i] + c + v * lanes, *q = rows[2 * i + 1] + c + v * lanes;
        if (V > 2 || some == 2 * lanes)
          interleave(_mm512_loadu_si512(p), _mm512_loadu_si512(q), x + v);
        else
          interleave((__m512i)Operand<BFloat16>::first(p, some), (__m512i)Operand<BFloat16>::first(q, some), x + v);
      }
    }
    RODE_UNROLL for (int r = 0; r < TR; ++r) {
      const __m512bh k = (__m512bh)_mm512_set1_epi32(static_cast<int>(coefficients[i * width + r]));
      RODE_UNROLL for (int v = 0; v < V; ++v) Operand<BFloat16>::add(sums[r][v], k, (__m512bh)x[v]);
    }
  }
  prefetcher = mine;
  add_to_rows<V == 2>(sums, some, out + c, stride);
}
#endif

// The tile of TR rows over columns [0, n), of `rows` and coefficients as they come: elements, or pairs of them.
template <int TR, class Column, class E, class C>
void outer_columns(const Column* coefficients, int64_t width, const E* const* rows, int64_t count, int64_t n, C* out,
                   int64_t stride, MatrixPrefetcher& prefetcher) {
  constexpr int kTerm = std::is_same_v<Column, C> ? 1 : 2;  // and vectors of a narrow tile
  constexpr int64_t tile = kOuterVectors * kLanes<C>, narrow = kTerm * kLanes<C>;
  const int64_t terms = (count + kTerm - 1) / kTerm;
  int64_t c = 0;
  for (; c + tile <= n; c += tile)
    outer_tile<TR, kOuterVectors>(coefficients, width, rows, terms, c, tile, out, stride, prefetcher);
  for (; c < n; c += narrow)
    outer_tile<TR, kTerm>(coefficients, width, rows, terms, c, n - c < narrow ? n - c : narrow, out, stride, prefetcher);
}

// out[r * stride + c] += sum over `count` tokens of coefficients (token, r) * rows[token][c], for r in [0, width), c in [0, n).
template <class Column, class E, class C>
void outer(const Column* coefficients, int64_t width, const E* const* rows, int64_t count, int64_t n, C* out, int64_t stride,
           MatrixPrefetcher& prefetcher) {
  if (count == 0) return;
  const Parts parts(width, kOuterRows);
  for (int64_t k = 0, r = 0; k < parts.count; r += parts.size(k++))
    with_constant<kOuterRows>(parts.size(k), [&]<int TR>() {
      outer_columns<TR>(coefficients + r, width, rows, count, n, out + r * stride, stride, prefetcher);
    });
}

}  // namespace
