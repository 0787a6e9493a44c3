// The first half of the backward pass, as far as one thread takes it: over tokens, a group of them at a time. t = dy B
// (grad_output_pass), then v, du and dh (gate_backward), then dx = drop'(du A) + dh Wr (grad_input_pass).
#pragma once

#include "expand.h"

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

// A chunk of dx that several mixtures add to, one after the other: a group of tokens, in the accumulation type. Without data: there
// is only one.
template <class C>
struct SharedChunk {
  C* data = nullptr;
  bool first = true, last = true;
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
  SharedChunk<C> shared;

  void prefetch(int64_t i, int64_t c, RowPrefetcher& prefetcher) const {
    if (!shared.last) return;
    prefetcher.add(static_cast<T*>(a.dx.data) + (m0 + i) * a.dx.row + c);
  }

  template <int TM, int V>
  RODE_INLINE void add(const int64_t* tokens, int64_t c, int64_t n, Vector<C> (&sums)[TM][V]) const {
    constexpr int64_t lanes = kLanes<C>;
    const C* g = static_cast<const C*>(a.g) + (m0 + tokens[0]) * p.experts;  // open experts are the same for all of them
    if (p.dropout.on && any_open(g, p.experts)) RODE_UNROLL for (int m = 0; m < TM; ++m) {
        C kept[V * lanes];  // sums themselves stay in registers
        RODE_UNROLL for (int i = 0; i < V; ++i) store(kept + i * lanes, sums[m][i]);
        drop_columns(p.dropout, m0 + tokens[m], p.in_features, c, n, kept, kept);
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
    if (shared.data != nullptr) {
      RODE_UNROLL for (int m = 0; m < TM; ++m) {
        C* const at = shared.data + tokens[m] * w.chunks.width + (c - first);
        RODE_UNROLL for (int i = 0; i < V; ++i) {
          if (!shared.first) sums[m][i] += load(at + i * lanes);
          if (!shared.last) store(at + i * lanes, sums[m][i]);
        }
      }
      if (!shared.last) return;
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
  void grad_input_pass(int64_t i, SharedChunk<C> shared = {}) {
    const int64_t first = i * w.chunks.width;
    const typename Path<T>::Column* A = w.A == nullptr ? A_.get() : w.A + first * w.terms;
    const C* router = w.A == nullptr ? router_.get() : a.router_weight ? w.router_weight + first * p.experts : nullptr;
    if (w.A == nullptr) {
      const Range experts{0, p.experts};
      pack_rows_as_columns<T>(p, a.A, i, w.chunks, wanted_, A_.get());
      if (a.router_weight) pack_rows<T>(a.router_weight, i, w.chunks, {&experts, 1}, p.in_features, router_.get());
    }
    IntoInputGradient<T> output{p, a, w, m0_, first, router, shared};
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

}  // namespace
