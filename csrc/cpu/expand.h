// Sums of rows of weights under tokens' coefficients: v B^T, and du A. Lanes run along the outputs; a chunk of weights stays in
// cache while all tokens pass over it.
#pragma once

#include "dots.h"

namespace {

#if defined(__AVX512F__)
constexpr int kTogether = 4;  // tokens whose sums are in flight at once: 4 x 4 vectors
constexpr int kAlone = 8;     // vectors of a token on its own
#else
constexpr int kTogether = 2;
constexpr int kAlone = 4;
#endif
constexpr int kTileVectors = 4;
constexpr int64_t kGroupTokens = 128;  // tokens among which those with the same open experts are found

// Chunks of weights that sums of `terms` rows read; `least` of them if columns are enough.
template <class T>
Chunks column_chunks(int64_t columns, int64_t terms, int64_t least = 1) {
  using C = typename AccumulationOf<T>::type;
  return chunks_of(columns, terms, sizeof(typename Path<T>::Column), kTileVectors * kLanes<C>, least);
}

// The number of tokens in a unit of work: as many as can be grouped, but enough units for every thread.
inline int64_t unit_tokens(const rode::Problem& p) {
  const int64_t block = block_tokens(p), per_thread = p.tokens / (p.threads > 0 ? p.threads : 1) / block * block;
  return per_thread < block ? block : per_thread > kGroupTokens ? kGroupTokens : per_thread;
}

// Prefetches memory that sums will be added to and stored in, a few cache lines at a time while others are computed: a processor
// that is asked for more lines at once than it can keep track of waits.
class RowPrefetcher {
 public:
  void clear(int64_t bytes) { bytes_ = bytes, count_ = 0; }
  // Where a token's `bytes` bytes begin.
  void add(const void* first) { rows_[count_++] = static_cast<const char*>(first); }
  // From here on, all of them within so many steps.
  void begin(int64_t steps) {
    row_ = -1, each_ = (count_ * ((bytes_ + 63) / 64) + steps - 1) / steps;
    next();
  }

  RODE_INLINE void step() {
    for (int64_t k = each_; k > 0; --k) {
      __builtin_prefetch(at_, 0, 2);
      at_ += 64;
      if (at_ >= end_) next();
    }
  }

 private:
  __attribute__((noinline)) void next() {
    if (++row_ < count_)
      at_ = rows_[row_], end_ = at_ + bytes_;
    else
      each_ = 0;
  }

  const char *at_ = nullptr, *end_ = nullptr, *rows_[2 * kGroupTokens];
  int64_t each_ = 0, bytes_ = 0, count_ = 0, row_ = 0;
};

template <class T>
class Expansion {
  using C = typename AccumulationOf<T>::type;
  using Column = typename Path<T>::Column;
  static constexpr int kTerm = Path<T>::kTerm;

 public:
  Expansion(const rode::Problem& problem, int64_t terms, int64_t width)
      : p(problem),
        all_terms_(terms),
        v_(kGroupTokens * terms),
        terms_(kGroupTokens * terms),
        identity_(terms),
        starts_of_experts_(p.experts + 1),
        ranges_(p.experts),
        sums_(terms > kFewTerms ? kGroupTokens * width : 0),
        open_(terms > kFewTerms ? kGroupTokens * p.experts : 0),
        open_counts_(terms > kFewTerms ? p.experts : 0) {
    for (int64_t t = 0; t < terms; ++t) identity_.get()[t] = static_cast<int32_t>(t);
    starts_of_experts_.get()[0] = 0;
    for (int64_t e = 0; e < p.experts; ++e)
      starts_of_experts_.get()[e + 1] = starts_of_experts_.get()[e] + (p.offsets[e + 1] - p.offsets[e] + kTerm - 1) / kTerm;
  }

  // The coefficients of token i, R values in T's precision; those of closed experts are not read.
  void token(int64_t i, const C* g, const C* values) {
    Column* v = v_.get() + i * all_terms_;
    int32_t* terms = terms_.get() + i * all_terms_;
    int64_t count = 0;
    uint64_t pattern = 0;
    for (int64_t e = 0; e < p.experts; ++e) {
      if (g[e] == 0) continue;
      pattern = pattern * 0x9E3779B97F4A7C15u + static_cast<uint64_t>(e + 1);
      const int64_t begin = starts_of_experts_.get()[e], end = starts_of_experts_.get()[e + 1];
      coefficients(values + p.offsets[e], p.offsets[e + 1] - p.offsets[e], v + begin);
      for (int64_t term = begin; term < end; ++term) terms[count++] = static_cast<int32_t>(term);
    }
    counts_[i] = count;
    patterns_[i] = pattern;
  }

  // Terms that any of `tokens` tokens has open.
  Ranges open_terms(int64_t tokens, const C* g) {
    const int64_t* starts = starts_of_experts_.get();
    return wanted_ranges(p, g, tokens, false, [&](int64_t e) { return Range{starts[e], starts[e + 1]}; }, ranges_.get());
  }

  // Decides which of tokens [0, tokens) are computed together. Tokens without an open expert are left out if `skip_closed`.
  void group(int64_t tokens, const C* g, bool skip_closed) {
    sort(tokens);
    groups_ = 0;
    for (int64_t i = 0; i < tokens;) {
      int64_t run = 1;
      while (i + run < tokens && same_experts(order_[i], order_[i + run])) ++run;
      if (!skip_closed || counts_[order_[i]] != 0) {
        const Parts parts(run, kTogether);
        for (int64_t k = 0, at = i; k < parts.count; at += parts.size(k++)) {
          starts_[groups_] = at;
          sizes_[groups_++] = parts.size(k);
        }
      }
      i += run;
    }
    // Where few have the same experts open and the weights do not fit the first cache, an expert at a time is better: its weights
    // do.
    by_expert_ = tokens >= 2 * kTogether && 2 * groups_ > tokens && all_terms_ > kFewTerms;
    if (by_expert_) list_open(tokens, g);
  }

  // Columns [c, c + n) from a chunk of weights (terms, width). `epilogue.add<TM, V>(tokens, c, n, sums)` gets sums of tokens
  // tokens[0 .. TM), n columns of V vectors, and may change them; `epilogue.prefetch(i, c, prefetcher)` adds what it will touch for
  // a token.
  template <class Epilogue>
  void chunk(const Column* B, int64_t width, int64_t c, int64_t n, Epilogue& epilogue) {
    if (by_expert_) return chunk_by_expert(B, width, c, n, epilogue);
    RowPrefetcher prefetcher;
    for (int64_t i = 0; i < groups_; ++i) {
      prefetcher.clear(n * static_cast<int64_t>(sizeof(T)));
      if (i + 1 < groups_)
        for (int64_t k = 0; k < sizes_[i + 1]; ++k) epilogue.prefetch(order_[starts_[i + 1] + k], c, prefetcher);
      const int64_t* tokens = order_ + starts_[i];
      prefetcher.begin(steps(sizes_[i] == 1 ? kAlone : kTileVectors, n, counts_[*tokens]));
      with_constant<kTogether>(
          sizes_[i], [&]<int TM>() { tile<TM, TM == 1 ? kAlone : kTileVectors>(tokens, B, width, c, n, epilogue, prefetcher); });
    }
  }

 private:
  static constexpr int64_t kTile = kTileVectors * kLanes<C>;
  static constexpr int64_t kFewTerms = 96;  // a chunk of so many fits the first cache

  // n ranks of an expert.
  static void coefficients(const C* values, int64_t n, Column* out) {
    if constexpr (kTerm == 1) {
      for (int64_t j = 0; j < n; ++j) out[j] = values[j];
    } else {
#if defined(__AVX512BF16__)
      for (int64_t j = 0; j < n; j += kLanes<C>) {  // exact: they are bfloat16 already
        const int64_t some = n - j < kLanes<C> ? n - j : kLanes<C>;
        // with masks of all lanes: GCC 12 warns of its own header otherwise
        const __m512i high = _mm512_maskz_srli_epi32(0xFFFF, (__m512i)load_first(values + j, some), 16);
        const __m256i halves = _mm512_maskz_cvtepi32_epi16(0xFFFF, high);
        _mm256_mask_storeu_epi32(out + j / 2, static_cast<__mmask8>((1u << ((some + 1) / 2)) - 1), halves);
      }
#endif
    }
  }

  // Tokens with one pattern next to each other, patterns and their tokens in the order in which they come.
  void sort(int64_t tokens) {
    constexpr int64_t kSlots = 2 * kGroupTokens;
    static_assert(kSlots == 256);  // 8 bits of a hash
    int64_t of_slot[kSlots], of_token[kGroupTokens], starts[kGroupTokens + 1], count = 0;
    std::memset(of_slot, -1, sizeof of_slot);
    for (int64_t i = 0; i < tokens; ++i) {
      int64_t slot = static_cast<int64_t>(patterns_[i] * 0x9E3779B97F4A7C15u >> 56);
      while (of_slot[slot] >= 0 && patterns_[first_[of_slot[slot]]] != patterns_[i]) slot = (slot + 1) % kSlots;
      if (of_slot[slot] < 0) {
        first_[count] = i, starts[count] = 0;
        of_slot[slot] = count++;
      }
      of_token[i] = of_slot[slot];
      ++starts[of_token[i]];
    }
    for (int64_t k = 0, at = 0; k < count; ++k) {
      const int64_t size = starts[k];
      starts[k] = at, at += size;
    }
    for (int64_t i = 0; i < tokens; ++i) order_[starts[of_token[i]]++] = i;
  }

  // The number of additions to sums of so many vectors over so many terms.
  static int64_t steps(int64_t vectors, int64_t n, int64_t terms) {
    const int64_t tile = vectors * kLanes<C>, tiles = (n + tile - 1) / tile;
    return tiles * (terms > 0 ? terms : 1);
  }

  // Hashes decide which tokens may stand together; this decides whether they have the same experts open.
  bool same_experts(int64_t i, int64_t k) const {
    return patterns_[i] == patterns_[k] && counts_[i] == counts_[k] &&
           std::memcmp(terms_.get() + i * all_terms_, terms_.get() + k * all_terms_, counts_[i] * sizeof(int32_t)) == 0;
  }

  template <int TM, int V, class Epilogue>
  void tile(const int64_t* tokens, const Column* B, int64_t width, int64_t c, int64_t n, Epilogue& epilogue,
            RowPrefetcher& prefetcher) {
    constexpr int64_t lanes = kLanes<C>;
    int64_t k = 0;
    for (; k + V * lanes <= n; k += V * lanes) columns<TM, V>(tokens, B + k, width, c + k, V * lanes, epilogue, prefetcher);
    if constexpr (V > kTileVectors)
      for (; k + kTileVectors * lanes <= n; k += kTileVectors * lanes)
        columns<TM, kTileVectors>(tokens, B + k, width, c + k, kTileVectors * lanes, epilogue, prefetcher);
    for (; k < n; k += lanes) columns<TM, 1>(tokens, B + k, width, c + k, n - k < lanes ? n - k : lanes, epilogue, prefetcher);
  }

  template <int TM, int V, class Epilogue>
  void columns(const int64_t* tokens, const Column* B, int64_t width, int64_t c, int64_t n, Epilogue& epilogue,
               RowPrefetcher& prefetcher) {
    Vector<C> sums[TM][V];
    RODE_UNROLL for (int m = 0; m < TM; ++m) RODE_UNROLL for (int i = 0; i < V; ++i) sums[m][i] = Vector<C>{};
    accumulate<TM, V>(tokens, B, width, terms_.get() + tokens[0] * all_terms_, counts_[tokens[0]], sums, prefetcher);
    epilogue.template add<TM, V>(tokens, c, n, sums);
  }

  template <int TM, int V>
  RODE_INLINE void accumulate(const int64_t* tokens, const Column* B, int64_t width, const int32_t* terms, int64_t count,
                              Vector<C> (&sums)[TM][V], RowPrefetcher& prefetcher) {
    constexpr int64_t lanes = kLanes<C>;
    const Column* v[TM];
    RODE_UNROLL for (int m = 0; m < TM; ++m) v[m] = v_.get() + tokens[m] * all_terms_;
    for (int64_t j = 0; j < count; ++j) {
      prefetcher.step();
      const int64_t term = terms[j];
      const Column* row = B + term * width;
      if constexpr (kTerm == 1) {
        Vector<C> b[V];
        RODE_UNROLL for (int i = 0; i < V; ++i) b[i] = load(row + i * lanes);
        RODE_UNROLL for (int m = 0; m < TM; ++m) RODE_UNROLL for (int i = 0; i < V; ++i) sums[m][i] += v[m][term] * b[i];
      } else {
#if defined(__AVX512BF16__)
        __m512bh b[V];
        RODE_UNROLL for (int i = 0; i < V; ++i) b[i] = (__m512bh)_mm512_loadu_si512(row + i * lanes);
        RODE_UNROLL for (int m = 0; m < TM; ++m) RODE_UNROLL for (int i = 0; i < V; ++i)
            Operand<BFloat16>::add(sums[m][i], (__m512bh)_mm512_set1_epi32(static_cast<int>(v[m][term])), b[i]);
#endif
      }
    }
  }

  // For `chunk_by_expert`: positions in the order of the tokens that have each expert open.
  void list_open(int64_t tokens, const C* g) {
    for (int64_t k = 0; k < tokens; ++k) experts_of_[k] = 0;
    for (int64_t e = 0; e < p.experts; ++e) {
      int32_t* open = open_.get() + e * kGroupTokens;
      int32_t count = 0;
      for (int64_t k = 0; k < tokens; ++k) {
        if (g[order_[k] * p.experts + e] == 0) continue;
        open[count++] = static_cast<int32_t>(k);
        ++experts_of_[k];
      }
      open_counts_.get()[e] = count;
    }
  }

  // The same sums in the same order, in memory between a token's experts.
  template <class Epilogue>
  void chunk_by_expert(const Column* B, int64_t width, int64_t c, int64_t n, Epilogue& epilogue) {
    RowPrefetcher prefetcher;
    prefetcher.clear(n * static_cast<int64_t>(sizeof(T)));
    for (int64_t i = 0; i < groups_; ++i)
      for (int64_t k = 0; k < sizes_[i]; ++k) epilogue.prefetch(order_[starts_[i] + k], c, prefetcher);
    prefetcher.begin(steps(kTileVectors, width, all_terms_));
    int32_t done[kGroupTokens] = {};
    for (int64_t e = 0; e < p.experts; ++e) {
      const int32_t* open = open_.get() + e * kGroupTokens;
      const Parts parts(open_counts_.get()[e], kTogether);
      for (int64_t k = 0; k < parts.count; open += parts.size(k++))
        with_constant<kTogether>(parts.size(k), [&]<int TM>() { expert<TM>(open, done, e, B, width, c, n, epilogue, prefetcher); });
    }
    for (int64_t i = 0; i < groups_; ++i)  // tokens with no open expert
      for (int64_t k = 0; k < sizes_[i]; ++k) {
        const int64_t at = starts_[i] + k;
        if (experts_of_[at] != 0) continue;
        for (int64_t j = 0; j < n; j += kTile) {
          Vector<C> none[1][kTileVectors] = {};  // each tile's own: the epilogue adds to what it is given
          epilogue.template add<1, kTileVectors>(order_ + at, c + j, n - j < kTile ? n - j : kTile, none);
        }
      }
  }

  // A token's first expert starts its sums, the last one ends them.
  template <int TM, class Epilogue>
  void expert(const int32_t* open, int32_t* done, int64_t e, const Column* B, int64_t width, int64_t c, int64_t n,
              Epilogue& epilogue, RowPrefetcher& prefetcher) {
    constexpr int64_t lanes = kLanes<C>;
    const int64_t begin = starts_of_experts_.get()[e], count = starts_of_experts_.get()[e + 1] - begin;
    int64_t tokens[TM];
    RODE_UNROLL for (int m = 0; m < TM; ++m) tokens[m] = order_[open[m]];
    for (int64_t k = 0; k < n; k += kTile) {
      C* at[TM];
      RODE_UNROLL for (int m = 0; m < TM; ++m) at[m] = sums_.get() + open[m] * width + k;
      Vector<C> sums[TM][kTileVectors];
      RODE_UNROLL for (int m = 0; m < TM; ++m) {
        if (done[open[m]] == 0) {
          RODE_UNROLL for (int v = 0; v < kTileVectors; ++v) sums[m][v] = Vector<C>{};
        } else {
          RODE_UNROLL for (int v = 0; v < kTileVectors; ++v) sums[m][v] = load(at[m] + v * lanes);
        }
      }
      accumulate<TM, kTileVectors>(tokens, B + k, width, identity_.get() + begin, count, sums, prefetcher);
      RODE_UNROLL for (int m = 0; m < TM; ++m) {
        if (done[open[m]] + 1 < experts_of_[open[m]]) {
          RODE_UNROLL for (int v = 0; v < kTileVectors; ++v) store(at[m] + v * lanes, sums[m][v]);
        } else {
          Vector<C> all[1][kTileVectors];
          RODE_UNROLL for (int v = 0; v < kTileVectors; ++v) all[0][v] = sums[m][v];
          epilogue.template add<1, kTileVectors>(tokens + m, c + k, n - k < kTile ? n - k : kTile, all);
        }
      }
    }
    RODE_UNROLL for (int m = 0; m < TM; ++m) done[open[m]] += 1;
  }

  const rode::Problem& p;
  const int64_t all_terms_;
  Scratch<Column> v_;
  Scratch<int32_t> terms_, identity_;
  Scratch<int64_t> starts_of_experts_;
  Scratch<Range> ranges_;
  bool by_expert_ = false;
  int32_t experts_of_[kGroupTokens];
  Scratch<C> sums_;
  Scratch<int32_t> open_, open_counts_;
  int64_t counts_[kGroupTokens], order_[kGroupTokens], first_[kGroupTokens];
  int64_t starts_[kGroupTokens], sizes_[kGroupTokens], groups_ = 0;
  uint64_t patterns_[kGroupTokens];
};

}  // namespace
