// The backward pass. Compiled once per instruction set; RODE_ISA names the namespace.
//
// First over tokens, a group of them at a time: t = dy B (grad_output_pass), then v, du and dh (gate_backward), then
// dx = drop'(du A) + dh Wr (grad_input_pass). Then over columns of the weight gradients.
#include "expand.h"
#include "weight_gradients.h"

namespace {

template <class T>
struct BackwardWeights {
  using C = typename AccumulationOf<T>::type;
  RowsOf<typename Path<T>::Row> B;    // B^T, (R, O); no data: the thread that needs it lays it out
  const typename Path<T>::Column* A;  // in chunks; null: the same
  const C* router_weight;             // in chunks of the same width; with A
  Chunks chunks;
  int64_t terms;
};

// dx = drop'(sums) + dh Wr.
template <class T>
struct IntoInputGradient {
  using C = typename AccumulationOf<T>::type;
  const rode::Problem& p;
  const rode::BackwardArrays& a;
  const BackwardWeights<T>& w;
  int64_t m0, first;  // of the chunk
  const C* router_chunk;

  void prefetch(int64_t i, int64_t c, RowPrefetcher& prefetcher) const {
    prefetcher.add(static_cast<T*>(a.dx.data) + (m0 + i) * a.dx.row + c);
  }

  template <int TM, int V>
  RODE_INLINE void add(const int64_t* tokens, int64_t c, int64_t n, Vector<C> (&sums)[TM][V]) const {
    constexpr int64_t lanes = kLanes<C>;
    const C* g = static_cast<const C*>(a.g) + (m0 + tokens[0]) * p.experts;  // open experts are the same for all of them
    if (p.dropout.on && any_open(g, p.experts)) RODE_UNROLL for (int m = 0; m < TM; ++m) {
        C kept[V * lanes];  // sums themselves stay in registers
        RODE_UNROLL for (int i = 0; i < V; ++i) store(kept + i * lanes, sums[m][i]);
        drop(p.dropout, static_cast<uint64_t>(m0 + tokens[m]) * p.in_features + c, n, kept, kept);
        RODE_UNROLL for (int i = 0; i < V; ++i) sums[m][i] = load(kept + i * lanes);
      }
    if (a.router_weight) {
      const C* router = router_chunk + (c - first);
      for (int64_t e = 0; e < p.experts; ++e) {
        if (g[e] == 0) continue;
        Vector<C> of_row[V];
        RODE_UNROLL for (int i = 0; i < V; ++i) of_row[i] = load(router + e * w.chunks.width + i * lanes);
        RODE_UNROLL for (int m = 0; m < TM; ++m) {
          const C dh = static_cast<const C*>(a.dh)[(m0 + tokens[m]) * p.experts + e];
          RODE_UNROLL for (int i = 0; i < V; ++i) sums[m][i] += dh * of_row[i];
        }
      }
    }
    RODE_UNROLL for (int m = 0; m < TM; ++m) {
      T* dx = static_cast<T*>(a.dx.data) + (m0 + tokens[m]) * a.dx.row + c;
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
class TokenGradients {
  using C = typename AccumulationOf<T>::type;
  using Row = typename Path<T>::Row;

 public:
  TokenGradients(const rode::Problem& problem, const rode::BackwardArrays& arrays, const BackwardWeights<T>& weights, int64_t block)
      : p(problem),
        a(arrays),
        w(weights),
        block_(block),
        dy_(a.dy && !is_direct<T, Row>(a.dy) ? block_ * p.out_features : 0),
        B_(a.dy && w.B.data == nullptr ? w.B.width * p.total_rank : 0),
        ranges_(p.experts),
        A_(a.dx && w.A == nullptr ? w.chunks.width * w.terms : 0),
        router_(a.dx && a.router_weight && w.A == nullptr ? w.chunks.width * p.experts : 0),
        t_(block_ * p.total_rank),
        dots_(p, block_),
        up_(p, w.terms, w.chunks.width) {}

  // t, then v, du and dh of tokens [m0, m0 + tokens).
  void grad_output_pass(int64_t m0, int64_t tokens) {
    for (int64_t i = 0; i < tokens; i += block_) grad_output_block(m0 + i, tokens - i < block_ ? tokens - i : block_);
  }

  // t (M, R) of all tokens, for the team member's share of ranks.
  void grad_output_pass(Team team, C* t) {
    const C* g = static_cast<const C*>(a.g);
    const Range mine = ranks_of_thread(p, g, p.tokens, team);
    for (int64_t i = 0; i < p.tokens; ++i)
      for (int64_t r = mine.begin; r < mine.end; ++r) t[i * p.total_rank + r] = 0;
    for (int64_t m0 = 0; a.dy && m0 < p.tokens; m0 += block_) {
      const int64_t tokens = p.tokens - m0 < block_ ? p.tokens - m0 : block_;
      const C* of_block = g + m0 * p.experts;
      const Row* rows[kGroupTokens];
      gather_rows<T>(a.dy, m0, tokens, 0, p.out_features, dy_.get(), rows);
      const Ranges wanted =
          wanted_ranges(p, of_block, tokens, p.dense, [&](int64_t e) { return within(p, e, mine); }, ranges_.get());
      const auto make = [&](int64_t i, Row* out) {
        pack_transposed<T>(a.B, i, {w.B.width, 0}, wanted, p.total_rank, p.out_features, out);
      };
      const RowsMade<Row, decltype(make)> B{make, B_.get(), p.total_rank, p.out_features, w.B.width};
      dots_.where_open(of_block, rows, tokens, B, mine, t + m0 * p.total_rank, {});
    }
  }

  // v, du and dh of token m from its t.
  void gate_backward(int64_t m, const C* t) const {
    gate_backward(m, static_cast<const C*>(a.g) + m * p.experts, t + m * p.total_rank);
  }

  // Takes du of these tokens, for `grad_input_pass`.
  void take(int64_t m0, int64_t tokens) {
    m0_ = m0;
    const C* g = static_cast<const C*>(a.g) + m0 * p.experts;
    const C* du = static_cast<const C*>(a.du) + m0 * p.total_rank;
    for (int64_t i = 0; i < tokens; ++i) up_.token(i, g + i * p.experts, du + i * p.total_rank);
    up_.group(tokens, g, false);
    if (w.A == nullptr) wanted_ = up_.open_terms(tokens, g);
  }

  // Chunk i of dx.
  void grad_input_pass(int64_t i) {
    const int64_t first = i * w.chunks.width;
    const typename Path<T>::Column* A = w.A == nullptr ? A_.get() : w.A + first * w.terms;
    const C* router = w.A == nullptr ? router_.get() : a.router_weight ? w.router_weight + first * p.experts : nullptr;
    if (w.A == nullptr) {
      const Range experts{0, p.experts};
      pack_rows_as_columns<T>(p, a.A, i, w.chunks, wanted_, A_.get());
      if (a.router_weight) pack_rows<T>(a.router_weight, i, w.chunks, {&experts, 1}, p.in_features, router_.get());
    }
    IntoInputGradient<T> output{p, a, w, m0_, first, router};
    up_.chunk(A, w.chunks.width, first, w.chunks.columns(i, p.in_features), output);
  }

 private:
  void grad_output_block(int64_t m0, int64_t tokens) {
    const C* g = static_cast<const C*>(a.g) + m0 * p.experts;
    C* t = t_.get();
    for (int64_t i = 0; i < tokens * p.total_rank; ++i) t[i] = 0;
    if (a.dy) {
      const Row *rows[kBlockTokens], *next[kBlockTokens];
      gather_rows<T>(a.dy, m0, tokens, 0, p.out_features, dy_.get(), rows);
      const int64_t left = p.tokens - m0 - tokens, of_next = left < block_ ? left : block_;
      const bool direct = is_direct<T, Row>(a.dy);
      if (direct) gather_rows<T>(a.dy, m0 + tokens, of_next, 0, p.out_features, dy_.get(), next);
      dots_.where_open(g, rows, tokens, w.B, {0, p.total_rank}, t, {next, direct ? of_next : 0});
    }
    for (int64_t i = 0; i < tokens; ++i) gate_backward(m0 + i, g + i * p.experts, t + i * p.total_rank);
  }

  void gate_backward(int64_t m, const C* g, const C* t) const {
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
      if (a.router_weight) {
        if (a.dgates != nullptr) dg += static_cast<const C*>(a.dgates)[m * p.experts + e];
        if (!open) dg = 0;
      }
      static_cast<C*>(a.dh)[m * p.experts + e] = dg;
    }
  }

  const rode::Problem& p;
  const rode::BackwardArrays& a;
  const BackwardWeights<T>& w;
  const int64_t block_;
  int64_t m0_ = 0;
  Ranges wanted_{};
  Scratch<Row> dy_, B_;
  Scratch<Range> ranges_;
  Scratch<typename Path<T>::Column> A_;
  Scratch<C> router_, t_;
  Dots<Row> dots_;
  Expansion<T> up_;
};

template <class C>
void bias_gradient(const rode::Problem& p, const rode::BackwardArrays& a) {
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

// The first column of weight gradients that belongs to a thread: those of dA are rounded up, those of dB down.
inline int64_t parts_of(int64_t columns) { return (columns + kLeastColumns - 1) / kLeastColumns; }
inline int64_t first_column(int64_t columns, int64_t thread, int64_t threads, bool up) {
  const int64_t at = (thread * parts_of(columns) + (up ? threads - 1 : 0)) / threads * kLeastColumns;
  return at < columns ? at : columns;
}

template <class T>
void backward(const rode::Problem& p, const rode::BackwardArrays& a) {
  using C = typename AccumulationOf<T>::type;
  using Row = typename Path<T>::Row;
  using Column = typename Path<T>::Column;
  const bool in = a.dA != nullptr || a.drouter_weight != nullptr, out = a.dB != nullptr && a.dy;
  const int64_t in_columns = in ? p.in_features : 0, out_columns = out ? p.out_features : 0;
  if (a.dB != nullptr && !out) std::memset(a.dB, 0, p.total_rank * p.out_features * (a.B.in_acc_dtype ? sizeof(C) : sizeof(T)));
  const int64_t terms = terms_of<T>(p);

  // Few tokens are one group: threads share dx by columns, and each lays out the weights of its own.
  const bool one_group = p.tokens > 0 && p.tokens <= kGroupTokens;
  const int64_t unit = unit_tokens(p), token_units = one_group ? 0 : (p.tokens + unit - 1) / unit;
  const Range all_ranks{0, p.total_rank}, all_terms{0, terms}, experts{0, p.experts};
  const int64_t parts = parts_of(in_columns) + parts_of(out_columns);
  const int64_t units = one_group ? parts_of(p.in_features) + parts_of(p.out_features) : token_units;
  const int threads = thread_count(p, units > parts ? units : parts);
  const Chunks of_B = row_chunks<Row>(p.out_features),
               chunks = column_chunks<T>(p.in_features, terms, one_group && threads > 1 ? 4 * threads : 1);
  const int64_t block = one_group && is_direct<T, Row>(a.dy) ? p.tokens : block_tokens(p);
  const bool own = p.threads > 1 && weight_bytes<T>(p) <= kOwnBytes;
  const int64_t size_of_B = a.dy && !one_group ? of_B.count * of_B.width * p.total_rank : 0;
  const int64_t size_of_A = a.dx && !one_group ? chunks.count * chunks.width * terms : 0;
  const int64_t size_of_router = a.dx && a.router_weight && !one_group ? chunks.count * chunks.width * p.experts : 0;
  Scratch<Row> shared_B(own ? 0 : size_of_B);
  Scratch<Column> shared_A(own ? 0 : size_of_A);
  Scratch<C> shared_router(own ? 0 : size_of_router);
  Scratch<C> t(one_group ? p.tokens * p.total_rank : 0);
  OpenTokens<T> open(p, a.dA != nullptr, out);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Team team = Team::current(), layers = own ? Team{0, 1} : team;
    {
      Scratch<Row> own_B(own ? size_of_B : 0);
      Scratch<Column> own_A(own ? size_of_A : 0);
      Scratch<C> own_router(own ? size_of_router : 0);
      Row* const B = own ? own_B.get() : shared_B.get();
      Column* const A = own ? own_A.get() : shared_A.get();
      C* const router = own ? own_router.get() : shared_router.get();
      layers.each(size_of_B > 0 ? of_B.count : 0, [&](int64_t i) {
        pack_transposed<T>(a.B, i, of_B, {&all_ranks, 1}, p.total_rank, p.out_features, B + i * of_B.width * p.total_rank);
      });
      layers.each(size_of_A > 0 ? chunks.count : 0, [&](int64_t i) {
        pack_rows_as_columns<T>(p, a.A, i, chunks, {&all_terms, 1}, A + i * chunks.width * terms);
        if (a.router_weight)
          pack_rows<T>(a.router_weight, i, chunks, {&experts, 1}, p.in_features, router + i * chunks.width * p.experts);
      });
      if (!own && !one_group) {
#pragma omp barrier
      }
      const BackwardWeights<T> weights = {
          {one_group ? nullptr : B, p.total_rank, p.out_features, of_B.width}, one_group ? nullptr : A, router, chunks, terms};
      TokenGradients<T> pass(p, a, weights, block);
      const int64_t of_dx = a.dx ? chunks.count : 0;
      if (one_group) {
        pass.grad_output_pass(team, t.get());
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t m = 0; m < p.tokens; ++m) pass.gate_backward(m, t.get());
        if (of_dx > 0) pass.take(0, p.tokens);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < of_dx; ++i) pass.grad_input_pass(i);
      }
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < token_units; ++b) {
        const int64_t m0 = b * unit, tokens = p.tokens - m0 < unit ? p.tokens - m0 : unit;
        pass.grad_output_pass(m0, tokens);
        if (of_dx == 0) continue;
        pass.take(m0, tokens);
        for (int64_t i = 0; i < of_dx; ++i) pass.grad_input_pass(i);
      }
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < (parts > 0 ? open.blocks() : 0); ++b)
      open.collect(b, static_cast<const C*>(a.g), a.dA == nullptr ? nullptr : static_cast<const C*>(a.du),
                   out ? static_cast<const C*>(a.v) : nullptr, a.drouter_weight == nullptr ? nullptr : static_cast<const C*>(a.dh));
    WeightGradients<T> pass(p, a, open);
    // A thread has neighbouring columns: otherwise the processor would read ahead into lines that another thread writes.
    pass.input_columns(first_column(in_columns, team.thread, team.threads, true),
                       first_column(in_columns, team.thread + 1, team.threads, true));
    pass.output_columns(first_column(out_columns, team.thread, team.threads, false),
                        first_column(out_columns, team.thread + 1, team.threads, false));
  }
  if (a.dbias != nullptr) bias_gradient<C>(p, a);
}

}  // namespace

namespace rode::RODE_ISA {

void backward(const Problem& p, const BackwardArrays& a) {
  with_type(p.dtype, [&](auto of) { ::backward<decltype(of)>(p, a); });
}

}  // namespace rode::RODE_ISA
