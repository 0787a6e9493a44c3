// The forward pass. Compiled once per instruction set; RODE_ISA names the namespace.
//
// A block of tokens at a time. Down: each expert's rows of A against the tokens that have it open, lanes along K. Up: chunks of B that
// stay in cache, tokens with the same open experts together.
#include "weights.h"

namespace {

#if defined(__AVX512F__)
constexpr int kTogether = 4;  // tokens whose sums are in flight at once: 4 x 4 vectors
constexpr int kAlone = 8;     // vectors of a token on its own
#else
constexpr int kTogether = 2;
constexpr int kAlone = 4;
#endif
constexpr int kTileVectors = 4;

template <class T>
struct ForwardWeights {
  const typename Path<T>::Row *A, *router;  // rows of K
  const typename Path<T>::Column* B;        // in chunks
  Chunks chunks;
  int64_t terms;  // of a chunk: R, or what R comes to in pairs
};

template <class T>
class ForwardPass {
  using C = typename AccumulationOf<T>::type;
  using Row = typename Path<T>::Row;
  using Column = typename Path<T>::Column;
  static constexpr int kTerm = Path<T>::kTerm;

 public:
  ForwardPass(const rode::Problem& problem, const rode::Forward& arrays, const ForwardWeights<T>& weights)
      : p(problem),
        a(arrays),
        w(weights),
        x_(is_direct<T, Row>(a.x) ? 0 : kBlockTokens * p.in_features),
        dropped_(p.dropout.on ? kBlockTokens * p.in_features : 0),
        v_(kBlockTokens * w.terms),
        terms_(kBlockTokens * w.terms) {}

  void run(int64_t m0, int64_t tokens) {
    const Row* rows[kBlockTokens];
    gather_rows<T>(a.x, m0, tokens, 0, p.in_features, x_.get(), rows);
    C* g = static_cast<C*>(a.g) + m0 * p.experts;
    if (a.router) gate(rows, tokens, g);
    if (p.dropout.on) {
      for (int64_t i = 0; i < tokens; ++i) {
        if (!p.dense && !any_open(g + i * p.experts, p.experts)) continue;
        Row* out = dropped_.get() + i * p.in_features;
        drop(p.dropout, static_cast<uint64_t>(m0 + i) * p.in_features, p.in_features, rows[i], out);
        rows[i] = out;
      }
    }
    C* u = static_cast<C*>(a.u) + m0 * p.total_rank;
    for (int64_t i = 0; i < tokens * p.total_rank; ++i) u[i] = 0;
    dots_where_open(p, g, rows, tokens, w.A, p.in_features, u);
    for (int64_t i = 0; i < tokens; ++i) weigh(i, g + i * p.experts, u + i * p.total_rank);
    sort(tokens);
    group(tokens);
    expand(m0);
  }

 private:
  void gate(const Row* const* rows, int64_t tokens, C* g) const {
    dots(rows, tokens, w.router, p.experts, p.in_features, g, p.experts);
    const C* bias = static_cast<const C*>(a.router_bias);
    for (int64_t i = 0; i < tokens; ++i)
      for (int64_t e = 0; e < p.experts; ++e) {
        C& h = g[i * p.experts + e];
        if (bias != nullptr) h += bias[e];
        h = h <= 0 ? C(0) : h;  // a NaN passes, as through torch.relu
      }
  }

  // v of one token's open experts, and the rows of a chunk that it multiplies.
  void weigh(int64_t i, const C* g, const C* u) {
    Column* v = v_.get() + i * w.terms;
    int32_t* terms = terms_.get() + i * w.terms;
    int64_t count = 0;
    int32_t term = 0;
    uint64_t pattern = 0;
    for (int64_t e = 0; e < p.experts; ++e) {
      const int64_t begin = p.offsets[e], end = p.offsets[e + 1];
      if (g[e] == 0) {
        term += static_cast<int32_t>((end - begin + kTerm - 1) / kTerm);
        continue;
      }
      pattern = pattern * 0x9E3779B97F4A7C15u + static_cast<uint64_t>(e + 1);
      const C factor = static_cast<C>(p.scaling[e]) * g[e];
      for (int64_t j = begin; j < end; j += kTerm) {
        v[count] = coefficient(factor, u, j, end);
        terms[count++] = term++;
      }
    }
    counts_[i] = count;
    patterns_[i] = pattern;
  }

  static Column coefficient(C factor, const C* u, int64_t j, [[maybe_unused]] int64_t end) {
    if constexpr (kTerm == 1) {
      return round_to<T>(factor * u[j]);
    } else {
#if defined(__AVX512BF16__)
      return pair_of(narrow<BFloat16>(factor * u[j]), j + 1 < end ? narrow<BFloat16>(factor * u[j + 1]) : BFloat16{});
#endif
    }
  }

  // Tokens with one pattern next to each other.
  void sort(int64_t tokens) {
    for (int64_t i = 0; i < tokens; ++i) {
      int64_t at = i;
      for (; at > 0 && patterns_[order_[at - 1]] > patterns_[i]; --at) order_[at] = order_[at - 1];
      order_[at] = i;
    }
  }

  // Hashes decide who may stand together; whether they are alike is seen here.
  bool alike(int64_t i, int64_t k) const {
    return patterns_[i] == patterns_[k] && counts_[i] == counts_[k] &&
           std::memcmp(terms_.get() + i * w.terms, terms_.get() + k * w.terms, counts_[i] * sizeof(int32_t)) == 0;
  }

  // Who is computed together: kTogether tokens with the same open experts, or one. Of those that y is base for, only who adds to it.
  void group(int64_t tokens) {
    const bool in_place = a.base && a.base.data == a.y.data;
    groups_ = 0;
    for (int64_t i = 0; i < tokens;) {
      int64_t together = 1;
      while (together < kTogether && i + together < tokens && alike(order_[i], order_[i + together])) ++together;
      if (together < kTogether) together = 1;
      if (!in_place || counts_[order_[i]] != 0) {
        starts_[groups_] = i;
        sizes_[groups_++] = together;
      }
      i += together;
    }
  }

  // y = base + v B^T.
  void expand(int64_t m0) const {
    for (int64_t chunk = 0; chunk < w.chunks.count; ++chunk) {
      const Column* B = w.B + chunk * w.chunks.width * w.terms;
      const int64_t c = chunk * w.chunks.width;
      const int64_t n = p.out_features - c < w.chunks.width ? p.out_features - c : w.chunks.width;
      for (int64_t i = 0; i < groups_; ++i)
        if (sizes_[i] == kTogether)
          tile<kTogether, kTileVectors>(m0, order_ + starts_[i], B, c, n);
        else
          tile<1, kAlone>(m0, order_ + starts_[i], B, c, n);
    }
  }

  template <int TM, int V>
  void tile(int64_t m0, const int64_t* who, const Column* B, int64_t c, int64_t n) const {
    constexpr int64_t lanes = kLanes<C>;
    int64_t k = 0;
    for (; k + V * lanes <= n; k += V * lanes) columns<TM, V>(m0, who, B + k, c + k, V * lanes);
    for (; k < n; k += lanes) columns<TM, 1>(m0, who, B + k, c + k, n - k < lanes ? n - k : lanes);
  }

  template <int TM, int V>
  void columns(int64_t m0, const int64_t* who, const Column* B, int64_t c, int64_t n) const {
    constexpr int64_t lanes = kLanes<C>;
    const int64_t count = counts_[who[0]], width = w.chunks.width;
    const int32_t* terms = terms_.get() + who[0] * w.terms;
    const Column* v[TM];
    for (int m = 0; m < TM; ++m) v[m] = v_.get() + who[m] * w.terms;
    Vector<C> sums[TM][V];
    for (int m = 0; m < TM; ++m)
      for (int i = 0; i < V; ++i) sums[m][i] = Vector<C>{};
    for (int64_t j = 0; j < count; ++j) {
      const Column* row = B + terms[j] * width;
      if constexpr (kTerm == 1) {
        Vector<C> b[V];
        for (int i = 0; i < V; ++i) b[i] = load(row + i * lanes);
        for (int m = 0; m < TM; ++m)
          for (int i = 0; i < V; ++i) sums[m][i] += v[m][j] * b[i];
      } else {
#if defined(__AVX512BF16__)
        for (int m = 0; m < TM; ++m)
          for (int i = 0; i < V; ++i)
            Operand<BFloat16>::add(sums[m][i], (__m512bh)_mm512_set1_epi32(static_cast<int>(v[m][j])),
                                   (__m512bh)_mm512_loadu_si512(row + i * lanes));
#endif
      }
    }
    for (int m = 0; m < TM; ++m) finish<V>(m0 + who[m], c, n, sums[m]);
  }

  template <int V>
  void finish(int64_t m, int64_t c, int64_t n, const Vector<C> (&sums)[V]) const {
    constexpr int64_t lanes = kLanes<C>;
    const T* base = static_cast<const T*>(a.base.data) + (a.base ? m * a.base.row + c * a.base.column : 0);
    T* y = static_cast<T*>(a.y.data) + m * a.y.row + c * a.y.column;
    if (n == V * lanes && a.y.column == 1 && (!a.base || a.base.column == 1)) {
      for (int i = 0; i < V; ++i) {
        const Vector<C> start = a.base ? load_wide<T>(base + i * lanes) : Vector<C>{};
        store_narrow<T>(y + i * lanes, start + sums[i]);
      }
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      const C start = a.base ? widen(base[i * a.base.column]) : C(0);
      y[i * a.y.column] = narrow<T>(start + sums[i / lanes][i % lanes]);
    }
  }

  const rode::Problem& p;
  const rode::Forward& a;
  const ForwardWeights<T>& w;
  Scratch<Row> x_, dropped_;
  Scratch<Column> v_;
  Scratch<int32_t> terms_;
  int64_t counts_[kBlockTokens], order_[kBlockTokens];
  int64_t starts_[kBlockTokens], sizes_[kBlockTokens], groups_ = 0;
  uint64_t patterns_[kBlockTokens];
};

template <class T>
void forward(const rode::Problem& p, const rode::Forward& a) {
  using C = typename AccumulationOf<T>::type;
  using Row = typename Path<T>::Row;
  using Column = typename Path<T>::Column;
  const int64_t blocks = (p.tokens + kBlockTokens - 1) / kBlockTokens;
  const int threads = thread_count(p, blocks);
  int64_t terms = 0;
  for (int64_t e = 0; e < p.experts; ++e) terms += (p.offsets[e + 1] - p.offsets[e] + Path<T>::kTerm - 1) / Path<T>::kTerm;
  const bool copies = !stands_as_rows<T>(a.A, p.in_features);
  const bool copies_router = a.router && !stands_as_rows<T>(a.router, p.in_features);
  const Chunks chunks = chunks_of(p.out_features, terms, sizeof(Column), kAlone * kLanes<C>);
  Scratch<Row> A(copies ? p.total_rank * p.in_features : 0), router(copies_router ? p.experts * p.in_features : 0);
  Scratch<Column> B(chunks.count * chunks.width * terms);
  const ForwardWeights<T> weights = {copies ? A.get() : static_cast<const Row*>(a.A.data),
                                     copies_router ? router.get() : static_cast<const Row*>(a.router.data), B.get(),
                                     chunks, terms};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < (copies ? p.total_rank : 0); ++r) copy_row<T>(a.A, r, p.in_features, A.get() + r * p.in_features);
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < (copies_router ? p.experts : 0); ++r)
      copy_row<T>(a.router, r, p.in_features, router.get() + r * p.in_features);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks.count; ++i) {
      Column* out = B.get() + i * chunks.width * terms;
      if constexpr (Path<T>::kTerm == 1) {
        pack_chunk<T>(a.B, i, chunks, p.total_rank, p.out_features, out);
      } else {
#if defined(__AVX512BF16__)
        pack_pairs(p, a.B, i, chunks, out);
#endif
      }
    }
    ForwardPass<T> pass(p, a, weights);
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t m0 = b * kBlockTokens, left = p.tokens - m0;
      pass.run(m0, left < kBlockTokens ? left : kBlockTokens);
    }
  }
}

}  // namespace

namespace rode {
namespace RODE_ISA {

void forward(const Problem& p, const Forward& a) {
  switch (p.dtype) {
    case DType::float64: return ::forward<double>(p, a);
    case DType::float32: return ::forward<float>(p, a);
    case DType::float16: return ::forward<Float16>(p, a);
    case DType::bfloat16: return ::forward<BFloat16>(p, a);
  }
}

void keep_mask(const Dropout& dropout, uint64_t first, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = 1.0f;
  drop(dropout, first, n, out, out);
}

}  // namespace RODE_ISA
}  // namespace rode
