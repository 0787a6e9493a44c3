// The second half of the backward pass: the thread that owns columns of dA and the router's gradient, or rows of dB, walks all
// tokens.
#pragma once

#include "outer.h"

namespace {

constexpr int64_t kColumns = 128;                // columns of a weight gradient at a time
constexpr int64_t kLeastColumns = kColumns / 2;  // a thread has a multiple of it

template <class T>
class WeightGradients {
  using C = typename AccumulationOf<T>::type;
  using Row = typename Path<T>::Row;
  static constexpr int64_t kFewRanks = 3 * kOuterRows;  // for fewer, pairs are interleaved as they are read

 public:
  WeightGradients(const rode::Problem& problem, const rode::BackwardArrays& arrays, const OpenTokens<T>& open)
      : p(problem),
        a(arrays),
        open_(open),
        rows_(is_direct<T, Row>(a.x) && is_direct<T, Row>(a.dy) ? 0 : kSumTokens * kColumns),
        pairs_(Path<T>::kTerm == 1 ? 0 : kSumTokens / 2 * kColumns),
        dense_(a.drouter_weight == nullptr ? 0 : p.experts * kColumns),
        sums_((p.total_rank + p.experts) * kColumns),
        dropped_(p.dropout.on ? kSumTokens * kColumns : 0),
        zeros_(kColumns) {
    for (int64_t i = 0; i < kColumns; ++i) zeros_.get()[i] = Row{};
  }

  // Columns [begin, end) of dA and of the router's gradient, from the same rows of x.
  void input_columns(int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += kColumns) {
      const int64_t n = end - c < kColumns ? end - c : kColumns;
      start();
      for (int64_t block = 0; block < open_.blocks(); ++block) add_input(block, c, n, end);
      finish_input(c, n);
    }
  }

  // The same in pieces, columns [c, c + n) of [.., end): several mixtures take a block of x in turn.
  void start() {
    for (int64_t i = 0; i < (p.total_rank + p.experts) * kColumns; ++i) sums_.get()[i] = C(0);
  }
  void add_input(int64_t block, int64_t c, int64_t n, int64_t end) {
    C* const of_A = sums_.get();
    C* const of_router = of_A + p.total_rank * kColumns;
    const int64_t m0 = block * kSumTokens, tokens = p.tokens - m0 < kSumTokens ? p.tokens - m0 : kSumTokens;
    const Row* rows[kSumTokens];
    take_rows(a.x, block, m0, tokens, c, n, rows);
    MatrixPrefetcher prefetcher = after(a.x, m0 + tokens, c, n, end);
    if (a.drouter_weight != nullptr) router_columns(block, m0, tokens, n, rows, of_router, prefetcher);
    if (a.dA == nullptr) return;
    if (p.dropout.on)
      for (int64_t i = 0; i < tokens; ++i) {
        if (!any_open(static_cast<const C*>(a.g) + (m0 + i) * p.experts, p.experts)) continue;
        Row* out = dropped_.get() + i * kColumns;
        drop_columns(p.dropout, m0 + i, p.in_features, c, n, rows[i], out);
        rows[i] = out;
      }
    for (int64_t e = 0; e < p.experts; ++e)
      expert(block, e, open_.of_x(block, e), rows, n, of_A + p.offsets[e] * kColumns, prefetcher);
  }
  void finish_input(int64_t c, int64_t n) const {
    const C* const of_A = sums_.get();
    if (a.dA != nullptr) write_rows(of_A, p.total_rank, a.A.in_acc_dtype, a.dA, c, n);
    if (a.drouter_weight != nullptr)
      write_rows(of_A + p.total_rank * kColumns, p.experts, a.router_weight.in_acc_dtype, a.drouter_weight, c, n);
  }

  // Rows [begin, end) of dB.
  void output_columns(int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += kColumns) output_columns(c, end - c < kColumns ? end - c : kColumns, end);
  }

 private:
  void output_columns(int64_t c, int64_t n, int64_t end) {
    start();
    for (int64_t block = 0; block < open_.blocks(); ++block) {
      const int64_t m0 = block * kSumTokens, tokens = p.tokens - m0 < kSumTokens ? p.tokens - m0 : kSumTokens;
      const Row* rows[kSumTokens];
      take_rows(a.dy, block, m0, tokens, c, n, rows);
      MatrixPrefetcher prefetcher = after(a.dy, m0 + tokens, c, n, end);
      for (int64_t e = 0; e < p.experts; ++e)
        expert(block, e, open_.of_dy(block, e), rows, n, sums_.get() + p.offsets[e] * kColumns, prefetcher);
    }
    a.B.in_acc_dtype ? write_transposed(static_cast<C*>(a.dB), c, n) : write_transposed(static_cast<T*>(a.dB), c, n);
  }
  // Columns [c, c + n) of a block's tokens. Where all experts are open to all of them the pairs are the same for all experts: they
  // are interleaved once.
  void take_rows(const rode::Matrix& matrix, [[maybe_unused]] int64_t block, int64_t m0, int64_t tokens, int64_t c, int64_t n,
                 const Row** rows) {
    gather_rows<T>(matrix, m0, tokens, c, n, rows_.get(), rows);
#if defined(__AVX512BF16__)
    if constexpr (Path<T>::kTerm == 2) {
      paired_ = n == kColumns && p.total_rank >= kFewRanks && !p.dropout.on;
      for (int64_t e = 0; e < p.experts; ++e) paired_ = paired_ && open_.count(block, e) == tokens;
      for (int64_t i = 0; i < (paired_ ? tokens : 0); i += 2) {
        const Row *first = rows[i], *second = i + 1 < tokens ? rows[i + 1] : zeros_.get();
        for (int64_t k = 0; k < kColumns; k += 32) {
          __m512i pairs[2];
          interleave(_mm512_loadu_si512(first + k), _mm512_loadu_si512(second + k), pairs);
          _mm512_store_si512(pairs_.get() + i / 2 * kColumns + k, pairs[0]);
          _mm512_store_si512(pairs_.get() + i / 2 * kColumns + k + 16, pairs[1]);
        }
      }
    }
#endif
  }

  // The next block of tokens, or the first of the next columns.
  MatrixPrefetcher after(const rode::Matrix& matrix, int64_t m, int64_t c, int64_t n, int64_t end) const {
    if (m >= p.tokens) m = 0, c += n, n = end - c < kColumns ? end - c : kColumns;
    const int64_t left = p.tokens - m;
    return MatrixPrefetcher(matrix, sizeof(T), m, n <= 0 ? 0 : left < kSumTokens ? left : kSumTokens, c, n);
  }

  void expert(int64_t block, int64_t e, const typename Path<T>::Column* coefficients, const Row* const* rows, int64_t n, C* out,
              MatrixPrefetcher& prefetcher) const {
    const int64_t count = open_.count(block, e);
    if constexpr (Path<T>::kTerm == 2) {
      if (paired_) {
        const uint32_t* pairs[kSumTokens];
        for (int64_t i = 0; i < count; i += 2) pairs[i] = pairs_.get() + i / 2 * kColumns;
        return outer(coefficients, p.offsets[e + 1] - p.offsets[e], pairs, count, n, out, kColumns, prefetcher);
      }
    }
    const Row* chosen[kSumTokens + 1];
    for (int64_t i = 0; i < count; ++i) chosen[i] = rows[open_.tokens(block, e)[i]];
    chosen[count] = zeros_.get();  // the last pair's second
    outer(coefficients, p.offsets[e + 1] - p.offsets[e], chosen, count, n, out, kColumns, prefetcher);
  }

  // dh is not rounded, so the rows that it multiplies are not in pairs.
  void router_columns(int64_t block, int64_t m0, int64_t tokens, int64_t n, const Row* const* rows, C* out,
                      MatrixPrefetcher& prefetcher) {
    int64_t open = 0;
    for (int64_t e = 0; e < p.experts; ++e) open += open_.count(block, e);
    // Where many gates are open, multiplying the zeros of closed ones too is faster. A product that is not finite forbids it.
    if (4 * open >= tokens * p.experts) {
      for (int64_t e = 0; e < p.experts; ++e)
        for (int64_t i = 0; i < n; ++i) dense_.get()[e * kColumns + i] = C(0);
      outer(static_cast<const C*>(a.dh) + m0 * p.experts, p.experts, rows, tokens, n, dense_.get(), kColumns, prefetcher);
      bool finite = true;
      for (int64_t e = 0; e < p.experts; ++e)
        for (int64_t i = 0; i < n; ++i) finite &= dense_.get()[e * kColumns + i] - dense_.get()[e * kColumns + i] == 0;
      if (finite) {
        for (int64_t e = 0; e < p.experts; ++e)
          for (int64_t i = 0; i < n; ++i) out[e * kColumns + i] += dense_.get()[e * kColumns + i];
        return;
      }
    }
    for (int64_t e = 0; e < p.experts; ++e) {
      const Row* chosen[kSumTokens];
      const int64_t count = open_.count(block, e);
      for (int64_t i = 0; i < count; ++i) chosen[i] = rows[open_.tokens(block, e)[i]];
      outer(open_.of_router(block, e), 1, chosen, count, n, out + e * kColumns, kColumns, prefetcher);
    }
  }

  // Columns [c, c + n) of a gradient's rows.
  void write_rows(const C* sums, int64_t rows, bool in_acc_dtype, void* out, int64_t c, int64_t n) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * p.in_features + c;
      in_acc_dtype ? store_some<C, C>(static_cast<C*>(out) + at, sums + r * kColumns, n)
                   : store_some<T, C>(static_cast<T*>(out) + at, sums + r * kColumns, n);
    }
  }

  // Rows [c, c + n) of a gradient whose columns the sums are.
  template <class G>
  void write_transposed(G* out, int64_t c, int64_t n) const {
    constexpr int64_t lanes = kLanes<C>;
    for (int64_t i = 0; i < n; i += lanes)
      for (int64_t j = 0; j < p.total_rank; j += lanes) {
        const int64_t some = p.total_rank - j < lanes ? p.total_rank - j : lanes;
        Vector<C> v[lanes];
        RODE_UNROLL for (int l = 0; l < lanes; ++l) v[l] = l < some ? load(sums_.get() + (j + l) * kColumns + i) : Vector<C>{};
        transpose<lanes / 2, C>(v);
        for (int64_t l = 0; l < lanes && i + l < n; ++l) store_first<G, C>(out + (c + i + l) * p.total_rank + j, v[l], some);
      }
  }

  const rode::Problem& p;
  const rode::BackwardArrays& a;
  const OpenTokens<T>& open_;
  bool paired_ = false;
  Scratch<Row> rows_;
  Scratch<uint32_t> pairs_;
  Scratch<C> dense_, sums_;
  Scratch<Row> dropped_, zeros_;
};

}  // namespace
