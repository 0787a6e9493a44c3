// The forward pass of one mixture, as far as one thread takes it.
//
// One group of tokens at a time. The way down takes blocks of tokens: each expert's rows of A against the tokens that have it open.
// The way up takes chunks of B: tokens with the same open experts are computed together.
#pragma once

#include "expand.h"

namespace {

template <class T>
struct ForwardWeights {
  RowsOf<typename Path<T>::Row> A, router_weight;  // A without data: the thread that needs it lays it out
  const typename Path<T>::Column* B;               // in chunks; null: the thread that needs one packs it
  Chunks chunks;
  int64_t terms;
};

// y = base + sums.
template <class T>
struct IntoOutput {
  using C = typename AccumulationOf<T>::type;
  const rode::ForwardArrays& a;
  int64_t m0;

  const T* base_at(int64_t m, int64_t c) const { return static_cast<const T*>(a.base.data) + m * a.base.row + c * a.base.column; }
  T* y_at(int64_t m, int64_t c) const { return static_cast<T*>(a.y.data) + m * a.y.row + c * a.y.column; }

  void prefetch(int64_t i, int64_t c, RowPrefetcher& prefetcher) const {
    if (a.base && a.base.column == 1) prefetcher.add(base_at(m0 + i, c));
    if (a.y.data != a.base.data && a.y.column == 1) prefetcher.add(y_at(m0 + i, c));
  }

  template <int TM, int V>
  RODE_INLINE void add(const int64_t* tokens, int64_t c, int64_t n, Vector<C> (&sums)[TM][V]) const {
    RODE_UNROLL for (int m = 0; m < TM; ++m) one<V>(m0 + tokens[m], c, n, sums[m]);
  }

  // Columns [c, c + kQuadRows) of a token, as far as there are n.
  RODE_INLINE void quads(int64_t m, int64_t c, int64_t n, Quads sums) const {
    const float* base = a.base ? base_at(m, c) : nullptr;
    float* y = y_at(m, c);
    if (n >= kQuadRows && a.y.column == 1 && (!a.base || a.base.column == 1)) {
      Quads start{};
      if (base != nullptr) std::memcpy(&start, base, sizeof start);
      sums = start + sums;
      std::memcpy(y, &sums, sizeof sums);
      return;
    }
    for (int64_t l = 0; l < kQuadRows && l < n; ++l)
      y[l * a.y.column] = (base != nullptr ? base[l * a.base.column] : 0.0f) + sums[l];
  }

  template <int V>
  RODE_INLINE void one(int64_t m, int64_t c, int64_t n, const Vector<C> (&sums)[V]) const {
    constexpr int64_t lanes = kLanes<C>;
    const T* base = a.base ? base_at(m, c) : nullptr;
    T* y = y_at(m, c);
    if (n == V * lanes && a.y.column == 1 && (!a.base || a.base.column == 1)) {
      RODE_UNROLL for (int i = 0; i < V; ++i) {
        const Vector<C> start = base != nullptr ? load_widened<T>(base + i * lanes) : Vector<C>{};
        store_narrow<T>(y + i * lanes, start + sums[i]);
      }
      return;
    }
    RODE_UNROLL for (int i = 0; i < V; ++i) {
      C some[lanes];  // sums themselves stay in registers
      store(some, sums[i]);
      for (int64_t l = 0, at = i * lanes; l < lanes && at < n; ++l, ++at)
        y[at * a.y.column] = narrow<T>((a.base ? widen(base[at * a.base.column]) : C(0)) + some[l]);
    }
  }
};

template <class T>
class ForwardPass {
  using C = typename AccumulationOf<T>::type;
  using Row = typename Path<T>::Row;
  using Column = typename Path<T>::Column;

 public:
  ForwardPass(const rode::Problem& problem, const rode::ForwardArrays& arrays, const ForwardWeights<T>& weights)
      : p(problem),
        a(arrays),
        w(weights),
        x_(is_direct<T, Row>(a.x) ? 0 : block_ * p.in_features),
        dropped_(p.dropout.on ? block_ * p.in_features : 0),
        v_(p.total_rank),
        gates_(block_ * p.experts),
        A_(w.A.data == nullptr ? w.A.width * p.total_rank : 0),
        ranges_(w.A.data == nullptr ? p.experts : 0),
        B_(w.B == nullptr ? w.chunks.width * w.terms : 0),
        dots_(p, block_),
        up_(p, w.terms, w.chunks.width) {}

  // u of tokens [m0, m0 + tokens), and with a router their gates.
  void down(int64_t m0, int64_t tokens) {
    for (int64_t i = 0; i < tokens; i += block_) down_block(m0 + i, tokens - i < block_ ? tokens - i : block_, {0, 1});
  }

  // The same for all tokens, at most one block: threads share their ranks.
  void down_together(Team team) { down_block(0, p.tokens, team); }

  // Makes v of them, for `up`.
  void apply_gates(int64_t m0, int64_t tokens) {
    m0_ = m0;
    const C* g = static_cast<const C*>(a.g) + m0 * p.experts;
    for (int64_t i = 0; i < tokens; ++i) {
      apply_gates_to_token(g + i * p.experts, static_cast<const C*>(a.u) + (m0 + i) * p.total_rank);
      up_.token(i, g + i * p.experts, v_.get());
    }
    up_.group(tokens, g, in_place());
    if (w.B == nullptr) wanted_ = up_.open_terms(tokens, g);
  }

  // Chunk i of y.
  void up(int64_t i) {
    if (w.B == nullptr && wanted_.count == 0 && in_place()) return;  // y is already right
    IntoOutput<T> output{a, m0_};
    if constexpr (std::is_same_v<T, float>) {
      if (p.tokens == 1 && w.B == nullptr && a.B.column == 1) return up_alone(i, output);
    }
    const Column* B = w.B == nullptr ? B_.get() : w.B + i * w.chunks.width * w.terms;
    if (w.B == nullptr) pack_columns<T>(p, a.B, i, w.chunks, wanted_, B_.get());
    up_.chunk(B, w.chunks.width, i * w.chunks.width, w.chunks.columns(i, p.out_features), output);
  }

 private:
  bool in_place() const { return a.base && a.base.data == a.y.data; }

  // The same for a single token, which needs no layout of B: the same sums, in registers.
  void up_alone(int64_t i, const IntoOutput<T>& output) {
    const C* const v = v_.get();
    const int64_t first = i * w.chunks.width;
    Quads sums{};
    transpose_words(
        i, w.chunks, wanted_, p.total_rank, p.out_features, static_cast<const Word*>(a.B.data), a.B.row,
        [&](int64_t j, int64_t, const Quads* of_B, int64_t begin, int64_t end) __attribute__((always_inline)) {
          RODE_UNROLL for (int l = 0; l < 4; ++l) if (begin <= l && l < end) sums += v[j + l] * of_B[l];
        },
        [&](int64_t o) __attribute__((always_inline)) {
          output.quads(m0_, first + o, p.out_features - first - o, sums);
          sums = Quads{};
        });
  }

  void down_block(int64_t m0, int64_t tokens, Team team) {
    const Row* rows[kBlockTokens];
    gather_rows<T>(a.x, m0, tokens, 0, p.in_features, x_.get(), rows);
    C* g = static_cast<C*>(a.g) + m0 * p.experts;
    if (a.router_weight) {
      if (team.thread > 0) g = gates_.get();  // computing them twice beats waiting
      gate(rows, tokens, g);
    }
    if (p.dropout.on) {
      for (int64_t i = 0; i < tokens; ++i) {
        if (!p.dense && !any_open(g + i * p.experts, p.experts)) continue;
        Row* out = dropped_.get() + i * p.in_features;
        drop(p.dropout, static_cast<uint64_t>(m0 + i) * p.in_features, p.in_features, rows[i], out);
        rows[i] = out;
      }
    }
    C* u = static_cast<C*>(a.u) + m0 * p.total_rank;
    const Range ranks = team.threads == 1 ? Range{0, p.total_rank} : ranks_of_thread(p, g, tokens, team);
    for (int64_t i = 0; i < tokens; ++i)
      for (int64_t r = ranks.begin; r < ranks.end; ++r) u[i * p.total_rank + r] = 0;
    if (w.A.data == nullptr) {
      const Ranges wanted = wanted_ranges(p, g, tokens, p.dense, [&](int64_t e) { return within(p, e, ranks); }, ranges_.get());
      const auto make = [&](int64_t i, Row* out) { pack_rows<T>(a.A, i, {w.A.width, 0}, wanted, p.in_features, out); };
      const RowsMade<Row, decltype(make)> A{make, A_.get(), p.total_rank, p.in_features, w.A.width};
      return dots_.where_open(g, rows, tokens, A, ranks, u, {});
    }
    const Row* next[kBlockTokens];
    const int64_t left = p.tokens - m0 - tokens, of_next = left < block_ ? left : block_;
    const bool direct = is_direct<T, Row>(a.x);
    if (direct) gather_rows<T>(a.x, m0 + tokens, of_next, 0, p.in_features, x_.get(), next);
    dots_.where_open(g, rows, tokens, w.A, ranks, u, {next, direct ? of_next : 0});
  }

  void gate(const Row* const* rows, int64_t tokens, C* g) {
    dots_.all(rows, tokens, w.router_weight, g);
    const C* bias = static_cast<const C*>(a.router_bias);
    for (int64_t i = 0; i < tokens; ++i)
      for (int64_t e = 0; e < p.experts; ++e) {
        C& h = g[i * p.experts + e];
        if (bias != nullptr) h += bias[e];
        h = h <= 0 ? C(0) : h;  // a NaN passes, as through torch.relu
      }
  }

  // v of one token's open experts.
  void apply_gates_to_token(const C* g, const C* u) {
    for (int64_t e = 0; e < p.experts; ++e) {
      if (g[e] == 0) continue;
      const C factor = static_cast<C>(p.scaling[e]) * g[e];
      const int64_t begin = p.offsets[e];
      scale_rounded<T, C>(factor, u + begin, p.offsets[e + 1] - begin, v_.get() + begin);
    }
  }

  const rode::Problem& p;
  const rode::ForwardArrays& a;
  const ForwardWeights<T>& w;
  const int64_t block_ = block_tokens(p);
  int64_t m0_ = 0;
  Ranges wanted_{};
  Scratch<Row> x_, dropped_;
  Scratch<C> v_, gates_;
  Scratch<Row> A_;
  Scratch<Range> ranges_;
  Scratch<Column> B_;
  Dots<Row> dots_;
  Expansion<T> up_;
};

}  // namespace
