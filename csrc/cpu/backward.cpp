// The backward pass. Compiled once per instruction set; RODE_ISA names the namespace.
//
// First over tokens, a group of them at a time: t = dy B, then v, du, dh, and dx = drop'(du A) + dh Wr. Then over columns of the
// weight gradients.
#include "expand.h"
#include "outer.h"

namespace {

template <class T>
struct BackwardWeights {
  using C = typename AccumulationOf<T>::type;
  RowsOf<typename Path<T>::Row> B;    // B^T, (R, O); no data: laid out by whoever needs it
  const typename Path<T>::Column* A;  // in chunks; null: likewise
  const C* router;                    // in chunks of the same width; with A
  Chunks chunks;
  int64_t terms;
};

// dx = drop'(sums) + dh Wr.
template <class T>
struct IntoInputGradient {
  using C = typename AccumulationOf<T>::type;
  const rode::Problem& p;
  const rode::Backward& a;
  const BackwardWeights<T>& w;
  int64_t m0, first;  // of the chunk
  const C* router_chunk;

  void lines(int64_t i, int64_t c, Lines& lines) const { lines.add(static_cast<T*>(a.dx.data) + (m0 + i) * a.dx.row + c); }

  template <int TM, int V>
  RODE_INLINE void add(const int64_t* who, int64_t c, int64_t n, Vector<C> (&sums)[TM][V]) const {
    constexpr int64_t lanes = kLanes<C>;
    const C* g = static_cast<const C*>(a.g) + (m0 + who[0]) * p.experts;  // open experts are the same for all of them
    if (p.dropout.on && any_open(g, p.experts)) RODE_UNROLL for (int m = 0; m < TM; ++m) {
        C kept[V * lanes];  // sums themselves stay in registers
        RODE_UNROLL for (int i = 0; i < V; ++i) store(kept + i * lanes, sums[m][i]);
        drop(p.dropout, static_cast<uint64_t>(m0 + who[m]) * p.in_features + c, n, kept, kept);
        RODE_UNROLL for (int i = 0; i < V; ++i) sums[m][i] = load(kept + i * lanes);
      }
    if (a.router) {
      const C* router = router_chunk + (c - first);
      for (int64_t e = 0; e < p.experts; ++e) {
        if (g[e] == 0) continue;
        Vector<C> of_row[V];
        RODE_UNROLL for (int i = 0; i < V; ++i) of_row[i] = load(router + e * w.chunks.width + i * lanes);
        RODE_UNROLL for (int m = 0; m < TM; ++m) {
          const C dh = static_cast<const C*>(a.dh)[(m0 + who[m]) * p.experts + e];
          RODE_UNROLL for (int i = 0; i < V; ++i) sums[m][i] += dh * of_row[i];
        }
      }
    }
    RODE_UNROLL for (int m = 0; m < TM; ++m) {
      T* dx = static_cast<T*>(a.dx.data) + (m0 + who[m]) * a.dx.row + c;
      RODE_UNROLL for (int i = 0; i < V; ++i) if ((i + 1) * lanes <= n) { store_narrow<T>(dx + i * lanes, sums[m][i]); }
      else {
        T last[lanes];
        store_narrow<T>(last, sums[m][i]);
        for (int64_t l = 0; i * lanes + l < n; ++l) dx[i * lanes + l] = last[l];
      }
    }
  }
};

template <class T>
class TokenPass {
  using C = typename AccumulationOf<T>::type;
  using Row = typename Path<T>::Row;

 public:
  TokenPass(const rode::Problem& problem, const rode::Backward& arrays, const BackwardWeights<T>& weights, int64_t block)
      : p(problem),
        a(arrays),
        w(weights),
        block_(block),
        dy_(a.dy && !is_direct<T, Row>(a.dy) ? block_ * p.out_features : 0),
        B_(a.dy && w.B.data == nullptr ? w.B.width * p.total_rank : 0),
        A_(a.dx && w.A == nullptr ? w.chunks.width * w.terms : 0),
        router_(a.dx && a.router && w.A == nullptr ? w.chunks.width * p.experts : 0),
        t_(block_ * p.total_rank),
        dots_(p, block_),
        up_(p, w.terms, w.chunks.width) {}

  // v, du and dh of tokens [m0, m0 + tokens).
  void down(int64_t m0, int64_t tokens) {
    for (int64_t i = 0; i < tokens; i += block_) down_block(m0 + i, tokens - i < block_ ? tokens - i : block_);
  }

  // Takes du of them, for `up`.
  void take(int64_t m0, int64_t tokens) {
    m0_ = m0;
    const C* g = static_cast<const C*>(a.g) + m0 * p.experts;
    const C* du = static_cast<const C*>(a.du) + m0 * p.total_rank;
    for (int64_t i = 0; i < tokens; ++i) up_.token(i, g + i * p.experts, du + i * p.total_rank);
    up_.group(tokens, g, false);
  }

  // Chunk i of dx.
  void up(int64_t i) {
    const int64_t first = i * w.chunks.width;
    const typename Path<T>::Column* A = w.A == nullptr ? A_.get() : w.A + first * w.terms;
    const C* router = w.A == nullptr ? router_.get() : w.router + first * p.experts;
    if (w.A == nullptr) {
      pack_rows_as_columns<T>(p, a.A, i, w.chunks, A_.get());
      if (a.router) pack_rows<T>(a.router, i, w.chunks, p.experts, p.in_features, router_.get());
    }
    IntoInputGradient<T> output{p, a, w, m0_, first, router};
    up_.chunk(A, w.chunks.width, first, w.chunks.columns(i, p.in_features), output);
  }

 private:
  void down_block(int64_t m0, int64_t tokens) {
    const C* g = static_cast<const C*>(a.g) + m0 * p.experts;
    C* t = t_.get();
    for (int64_t i = 0; i < tokens * p.total_rank; ++i) t[i] = 0;
    if (a.dy) {
      const Row *rows[kGroupTokens], *next[kGroupTokens];
      gather_rows<T>(a.dy, m0, tokens, 0, p.out_features, dy_.get(), rows);
      const int64_t left = p.tokens - m0 - tokens, of_next = left < block_ ? left : block_;
      const bool direct = is_direct<T, Row>(a.dy);
      if (direct) gather_rows<T>(a.dy, m0 + tokens, of_next, 0, p.out_features, dy_.get(), next);
      if (w.B.data == nullptr) {
        const auto make = [&](int64_t i, Row* out) {
          pack_transposed<T>(a.B, i, {w.B.width, 0}, p.total_rank, p.out_features, out);
        };
        const RowsMade<Row, decltype(make)> B{make, B_.get(), p.total_rank, p.out_features, w.B.width};
        dots_.where_open(g, rows, tokens, B, t, nullptr, 0);
      } else {
        dots_.where_open(g, rows, tokens, w.B, t, direct ? next : nullptr, of_next);
      }
    }
    for (int64_t i = 0; i < tokens; ++i) gates_and_coefficients(m0 + i, g + i * p.experts, t + i * p.total_rank);
  }

  void gates_and_coefficients(int64_t m, const C* g, const C* t) const {
    const C* u = static_cast<const C*>(a.u) + m * p.total_rank;
    C* du = static_cast<C*>(a.du) + m * p.total_rank;
    C* v = a.v == nullptr ? nullptr : static_cast<C*>(a.v) + m * p.total_rank;
    for (int64_t e = 0; e < p.experts; ++e) {
      const int64_t begin = p.offsets[e], width = p.offsets[e + 1] - begin;
      const C scaling = static_cast<C>(p.scaling[e]);
      const bool open = g[e] != 0;
      C dg = 0;
      for (int64_t j = begin; (open || p.dense) && j < begin + width; ++j) dg += t[j] * u[j];
      if (open) {
        scale_rounded<T, C>(scaling * g[e], t + begin, width, du + begin);
        if (v != nullptr) scale_rounded<T, C>(scaling * g[e], u + begin, width, v + begin);
      } else {  // never 0 * infinity
        for (int64_t j = begin; j < begin + width; ++j) du[j] = C(0);
        for (int64_t j = begin; v != nullptr && j < begin + width; ++j) v[j] = C(0);
      }
      dg *= scaling;
      if (a.router) {
        if (a.dgates != nullptr) dg += static_cast<const C*>(a.dgates)[m * p.experts + e];
        if (!open) dg = 0;
      }
      static_cast<C*>(a.dh)[m * p.experts + e] = dg;
    }
  }

  const rode::Problem& p;
  const rode::Backward& a;
  const BackwardWeights<T>& w;
  const int64_t block_;
  int64_t m0_ = 0;
  Scratch<Row> dy_, B_;
  Scratch<typename Path<T>::Column> A_;
  Scratch<C> router_, t_;
  Dots<Row> dots_;
  Expansion<T> up_;
};

constexpr int64_t kColumns = 128;  // columns of a weight gradient that one unit of work owns

template <class T>
class WeightPass {
  using C = typename AccumulationOf<T>::type;
  using Row = typename Path<T>::Row;
  static constexpr int64_t kFewRanks = 3 * kOuterRows;  // whose pairs are interleaved as they are read

 public:
  WeightPass(const rode::Problem& problem, const rode::Backward& arrays, const Occurrences<T>& open)
      : p(problem),
        a(arrays),
        open_(open),
        rows_(is_direct<T, Row>(a.x) && is_direct<T, Row>(a.dy) ? 0 : kSumTokens * kColumns),
        pairs_(Path<T>::kTerm == 1 ? 0 : kSumTokens / 2 * kColumns),
        dense_(a.drouter == nullptr ? 0 : p.experts * kColumns),
        sums_((p.total_rank + p.experts) * kColumns),
        dropped_(p.dropout.on ? kSumTokens * kColumns : 0),
        zeros_(kColumns) {
    for (int64_t i = 0; i < kColumns; ++i) zeros_.get()[i] = Row{};
  }

  // Columns [c, c + n) of dA and of the router's gradient, from the same rows of x. Columns from `next` on come after them.
  void input_columns(int64_t c, int64_t n, int64_t next) {
    C* const of_A = sums_.get();
    C* const of_router = of_A + p.total_rank * kColumns;
    clear();
    for (int64_t block = 0; block < open_.blocks(); ++block) {
      const int64_t m0 = block * kSumTokens, tokens = p.tokens - m0 < kSumTokens ? p.tokens - m0 : kSumTokens;
      const Row* rows[kSumTokens];
      take_rows(a.x, block, m0, tokens, c, n, rows);
      Ahead ahead = after(a.x, m0 + tokens, p.in_features, c, n, next);
      if (a.drouter != nullptr) router_columns(block, m0, tokens, n, rows, of_router, ahead);
      if (a.dA == nullptr) continue;
      if (p.dropout.on)
        for (int64_t i = 0; i < tokens; ++i) {
          if (!any_open(static_cast<const C*>(a.g) + (m0 + i) * p.experts, p.experts)) continue;
          Row* out = dropped_.get() + i * kColumns;
          drop(p.dropout, static_cast<uint64_t>(m0 + i) * p.in_features + c, n, rows[i], out);
          rows[i] = out;
        }
      for (int64_t e = 0; e < p.experts; ++e)
        expert(block, e, open_.of_x(block, e), rows, n, of_A + p.offsets[e] * kColumns, ahead);
    }
    if (a.dA != nullptr) write_rows(of_A, p.total_rank, a.A.wide, a.dA, c, n);
    if (a.drouter != nullptr) write_rows(of_router, p.experts, a.router.wide, a.drouter, c, n);
  }

  // Rows [c, c + n) of dB.
  void output_columns(int64_t c, int64_t n, int64_t next) {
    clear();
    for (int64_t block = 0; block < open_.blocks(); ++block) {
      const int64_t m0 = block * kSumTokens, tokens = p.tokens - m0 < kSumTokens ? p.tokens - m0 : kSumTokens;
      const Row* rows[kSumTokens];
      take_rows(a.dy, block, m0, tokens, c, n, rows);
      Ahead ahead = after(a.dy, m0 + tokens, p.out_features, c, n, next);
      for (int64_t e = 0; e < p.experts; ++e)
        expert(block, e, open_.of_dy(block, e), rows, n, sums_.get() + p.offsets[e] * kColumns, ahead);
    }
    a.B.wide ? write_transposed(static_cast<C*>(a.dB), c, n) : write_transposed(static_cast<T*>(a.dB), c, n);
  }

 private:
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

  // The next block of tokens, or the first of other columns.
  Ahead after(const rode::Matrix& matrix, int64_t m, int64_t columns, int64_t c, int64_t n, int64_t next) const {
    if (m >= p.tokens) m = 0, c = next, n = columns - next < kColumns ? columns - next : kColumns;
    const int64_t left = p.tokens - m;
    return Ahead(matrix, sizeof(T), m, n <= 0 ? 0 : left < kSumTokens ? left : kSumTokens, c, n);
  }

  void expert(int64_t block, int64_t e, const typename Path<T>::Column* coefficients, const Row* const* rows, int64_t n, C* out,
              Ahead& ahead) const {
    const int64_t count = open_.count(block, e);
    if constexpr (Path<T>::kTerm == 2) {
      if (paired_) {
        const uint32_t* pairs[kSumTokens];
        for (int64_t i = 0; i < count; i += 2) pairs[i] = pairs_.get() + i / 2 * kColumns;
        return outer(coefficients, p.offsets[e + 1] - p.offsets[e], pairs, count, n, out, kColumns, ahead);
      }
    }
    const Row* chosen[kSumTokens + 1];
    for (int64_t i = 0; i < count; ++i) chosen[i] = rows[open_.tokens(block, e)[i]];
    chosen[count] = zeros_.get();  // the last pair's second
    outer(coefficients, p.offsets[e + 1] - p.offsets[e], chosen, count, n, out, kColumns, ahead);
  }

  // dh is not rounded, so what it multiplies is not in pairs.
  void router_columns(int64_t block, int64_t m0, int64_t tokens, int64_t n, const Row* const* rows, C* out, Ahead& ahead) {
    int64_t open = 0;
    for (int64_t e = 0; e < p.experts; ++e) open += open_.count(block, e);
    // Where many gates are open it takes less time to multiply closed ones' zeros too, unless a product is not finite.
    if (4 * open >= tokens * p.experts) {
      for (int64_t e = 0; e < p.experts; ++e)
        for (int64_t i = 0; i < n; ++i) dense_.get()[e * kColumns + i] = C(0);
      outer(static_cast<const C*>(a.dh) + m0 * p.experts, p.experts, rows, tokens, n, dense_.get(), kColumns, ahead);
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
      outer(open_.of_router(block, e), 1, chosen, count, n, out + e * kColumns, kColumns, ahead);
    }
  }

  void clear() {
    for (int64_t i = 0; i < (p.total_rank + p.experts) * kColumns; ++i) sums_.get()[i] = C(0);
  }

  // Columns [c, c + n) of a gradient's rows.
  void write_rows(const C* sums, int64_t rows, bool wide, void* out, int64_t c, int64_t n) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * p.in_features + c;
      wide ? store_some<C, C>(static_cast<C*>(out) + at, sums + r * kColumns, n)
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
  const rode::Backward& a;
  const Occurrences<T>& open_;
  bool paired_ = false;
  Scratch<Row> rows_;
  Scratch<uint32_t> pairs_;
  Scratch<C> dense_, sums_;
  Scratch<Row> dropped_, zeros_;
};

template <class C>
void bias_gradient(const rode::Problem& p, const rode::Backward& a) {
  C* out = static_cast<C*>(a.dbias);
  for (int64_t e = 0; e < p.experts; ++e) {
    out[e] = 0;
    for (int64_t m0 = 0; m0 < p.tokens; m0 += kSumTokens) {
      C part = 0;
      for (int64_t m = m0; m < p.tokens && m < m0 + kSumTokens; ++m) part += static_cast<const C*>(a.dh)[m * p.experts + e];
      out[e] += part;
    }
  }
}

template <class T>
void backward(const rode::Problem& p, const rode::Backward& a) {
  using C = typename AccumulationOf<T>::type;
  using Row = typename Path<T>::Row;
  using Column = typename Path<T>::Column;
  const bool in = a.dA != nullptr || a.drouter != nullptr, out = a.dB != nullptr && a.dy;
  const int64_t in_units = in ? (p.in_features + kColumns - 1) / kColumns : 0;
  const int64_t units = in_units + (out ? (p.out_features + kColumns - 1) / kColumns : 0);
  if (a.dB != nullptr && !out) std::memset(a.dB, 0, p.total_rank * p.out_features * (a.B.wide ? sizeof(C) : sizeof(T)));
  const int64_t terms = terms_of<T>(p);

  // Few tokens are one group, whose dx threads share by columns: each lays out the weights of its own.
  const bool few = p.threads > 1 && p.tokens > 0 && p.tokens <= kGroupTokens;
  const int64_t unit = few ? (p.tokens + p.threads - 1) / p.threads : unit_tokens(p);
  const int64_t token_units = (p.tokens + unit - 1) / unit;
  const int threads = thread_count(p, token_units > units ? token_units : units);
  const Chunks of_B = row_chunks<Row>(p.out_features), chunks = column_chunks<T>(p.in_features, terms, few ? 4 * threads : 1);
  const int64_t block = few && is_direct<T, Row>(a.dy) ? unit : block_tokens(p);
  Scratch<Row> B(a.dy && !few ? of_B.count * of_B.width * p.total_rank : 0);
  Scratch<Column> A(a.dx && !few ? chunks.count * chunks.width * terms : 0);
  Scratch<C> router(a.dx && a.router && !few ? chunks.count * chunks.width * p.experts : 0);
  Occurrences<T> open(p, a.dA != nullptr, out);
  const BackwardWeights<T> weights = {
      {few ? nullptr : B.get(), p.total_rank, p.out_features, of_B.width}, few ? nullptr : A.get(), router.get(), chunks, terms};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (!few) {
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < (a.dy ? of_B.count : 0); ++i)
        pack_transposed<T>(a.B, i, of_B, p.total_rank, p.out_features, B.get() + i * of_B.width * p.total_rank);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < (a.dx ? chunks.count : 0); ++i) {
        pack_rows_as_columns<T>(p, a.A, i, chunks, A.get() + i * chunks.width * terms);
        if (a.router) pack_rows<T>(a.router, i, chunks, p.experts, p.in_features, router.get() + i * chunks.width * p.experts);
      }
    }
    {
      TokenPass<T> pass(p, a, weights, block);
      const int64_t of_dx = a.dx ? chunks.count : 0;
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < token_units; ++b) {
        const int64_t m0 = b * unit, tokens = p.tokens - m0 < unit ? p.tokens - m0 : unit;
        pass.down(m0, tokens);
        if (few || of_dx == 0) continue;
        pass.take(m0, tokens);
        for (int64_t i = 0; i < of_dx; ++i) pass.up(i);
      }
      if (few && of_dx > 0) {
        pass.take(0, p.tokens);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < of_dx; ++i) pass.up(i);
      }
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < (units > 0 ? open.blocks() : 0); ++b)
      open.collect(b, static_cast<const C*>(a.g), a.dA == nullptr ? nullptr : static_cast<const C*>(a.du),
                   out ? static_cast<const C*>(a.v) : nullptr, a.drouter == nullptr ? nullptr : static_cast<const C*>(a.dh));
    WeightPass<T> pass(p, a, open);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < units; ++i) {
      const bool input = i < in_units;
      const int64_t c = (input ? i : i - in_units) * kColumns;
      const int64_t left = (input ? p.in_features : p.out_features) - c, n = left < kColumns ? left : kColumns;
      const int64_t next = c + threads * kColumns;  // most likely
      input ? pass.input_columns(c, n, next) : pass.output_columns(c, n, next);
    }
  }
  if (a.dbias != nullptr) bias_gradient<C>(p, a);
}

}  // namespace

namespace rode {
namespace RODE_ISA {

void backward(const Problem& p, const Backward& a) {
  switch (p.dtype) {
    case DType::float64:
      return ::backward<double>(p, a);
    case DType::float32:
      return ::backward<float>(p, a);
    case DType::float16:
      return ::backward<Float16>(p, a);
    case DType::bfloat16:
      return ::backward<BFloat16>(p, a);
  }
}

}  // namespace RODE_ISA
}  // namespace rode
