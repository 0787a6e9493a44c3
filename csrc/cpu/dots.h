// Products of tokens' rows with rows of weights: u = x A^T, h = x Wr^T, t = dy B. Lanes run along the rows, so the bits of a
// product do not depend on what is computed beside it.
#pragma once

#include "weights.h"

namespace {

#if defined(__AVX512F__)
constexpr int kMostTokens = 6, kMostRows = 4;  // 6 x 4 sums in flight, 6 + 1 operands: 31 of 32 registers
#else
constexpr int kMostTokens = 4, kMostRows = 2;
#endif
// Bytes of a row at a time: an expert's rows and those of a few tokens then stay in the first cache.
constexpr int64_t kStepBytes = 2048;

// sums[m * width + r] = (or += unless `first`) products of elements [0, n) of TM rows of tokens from k on with TR rows of weights.
// Meanwhile as many elements from `ahead` on are prefetched. A function of its own has the registers for its sums.
template <class E, int TM, int TR>
__attribute__((noinline)) void dot_tile(const E* const* rows, int64_t k, const E* weights, int64_t stride, int64_t n, bool first,
                                        Vector<typename Operand<E>::C>* sums, int64_t width, const E* ahead) {
  using O = Operand<E>;
  using C = typename O::C;
  Vector<C> s[TM][TR];
  const E* x[TM];
  RODE_UNROLL for (int m = 0; m < TM; ++m) x[m] = rows[m] + k;
  RODE_UNROLL for (int m = 0; m < TM; ++m) RODE_UNROLL for (int r = 0; r < TR; ++r) s[m][r] =
      first ? Vector<C>{} : sums[m * width + r];
  const auto step = [&](int64_t i, auto load_at) __attribute__((always_inline)) {
    __builtin_prefetch(ahead + i, 0, 2);
    typename O::V of_x[TM];
    RODE_UNROLL for (int m = 0; m < TM; ++m) of_x[m] = load_at(x[m] + i);
    RODE_UNROLL for (int r = 0; r < TR; ++r) {
      const typename O::V w = load_at(weights + r * stride + i);
      RODE_UNROLL for (int m = 0; m < TM; ++m) O::add(s[m][r], of_x[m], w);
    }
  };
  int64_t i = 0;
  for (; i + O::lanes <= n; i += O::lanes) step(i, [](const E* p) { return O::at(p); });
  if (i < n) step(i, [left = n - i](const E* p) { return O::first(p, left); });
  RODE_UNROLL for (int m = 0; m < TM; ++m) RODE_UNROLL for (int r = 0; r < TR; ++r) sums[m * width + r] = s[m][r];
}

// run<n>() for n in [1, kMost].
template <int kMost, class Run>
RODE_INLINE void with_constant(int64_t n, const Run& run) {
  if constexpr (kMost > 1)
    if (n < kMost) return with_constant<kMost - 1>(n, run);
  run.template operator()<kMost>();
}

// Cuts n into the fewest parts of at most `most`, as even as they can be.
struct Parts {
  Parts(int64_t n, int64_t most) : count((n + most - 1) / most), n_(n) {}
  int64_t size(int64_t i) const { return n_ / count + (i < n_ % count ? 1 : 0); }
  int64_t count;

 private:
  int64_t n_;
};

// Weights as rows that stand in chunks, (chunks, rows, width): element (r, c) in chunk c / width. Rows of their own: one chunk.
template <class E>
struct RowsOf {
  const E* data;
  int64_t rows, length, width;
  const E* chunk(int64_t i) const { return data + i * width * rows; }
};

// The same with one chunk in memory at a time: `make(i, out)` writes it.
template <class E, class Make>
struct RowsMade {
  Make make;
  E* out;
  int64_t rows, length, width;
  const E* chunk(int64_t i) const {
    make(i, out);
    return out;
  }
};

// The number of a row's elements at a time, in whole vectors: about kStepBytes, and no short last step.
template <class E>
int64_t step_of(int64_t length) {
  constexpr int64_t lanes = Operand<E>::lanes, most = kStepBytes / sizeof(E);
  const int64_t steps = length > most ? length / most : 1;
  return (length + steps * lanes - 1) / (steps * lanes) * lanes;
}

// Rows of weights in chunks of one step each.
template <class E>
Chunks row_chunks(int64_t length) {
  const int64_t width = step_of<E>(length);
  return {width, (length + width - 1) / width};
}

// The ranks of expert e among `ranks`.
inline Range within(const rode::Problem& p, int64_t e, Range ranks) {
  const int64_t begin = p.offsets[e], end = p.offsets[e + 1];
  return {ranks.begin > begin ? ranks.begin : begin, ranks.end < end ? ranks.end : end};
}

// The number of tokens that want expert e: those that have it open, or all if `dense`.
template <class C>
int64_t count_wanting(const rode::Problem& p, const C* gates, int64_t tokens, int64_t e, bool dense) {
  if (dense) return tokens;
  int64_t count = 0;
  for (int64_t i = 0; i < tokens; ++i) count += gates[i * p.experts + e] != 0;
  return count;
}

// The ranks of a thread: an even share of those that tokens want.
template <class C>
Range ranks_of_thread(const rode::Problem& p, const C* gates, int64_t tokens, Team team) {
  int64_t all = 0;
  for (int64_t e = 0; e < p.experts; ++e) all += (p.offsets[e + 1] - p.offsets[e]) * count_wanting(p, gates, tokens, e, p.dense);
  const auto first_of = [&](int64_t thread) {
    if (thread == 0) return int64_t{0};
    int64_t before = thread * all / team.threads;
    for (int64_t e = 0; e < p.experts; ++e) {
      const int64_t width = p.offsets[e + 1] - p.offsets[e], each = count_wanting(p, gates, tokens, e, p.dense);
      if (before < width * each) return p.offsets[e] + before / each;
      before -= width * each;
    }
    return p.total_rank;
  };
  return {first_of(team.thread), team.thread + 1 == team.threads ? p.total_rank : first_of(team.thread + 1)};
}

// The ranges range_of(e) of the experts that tokens want. Empty ranges are left out, and neighbours become one range.
template <class C, class Of>
Ranges wanted_ranges(const rode::Problem& p, const C* gates, int64_t tokens, bool dense, Of range_of, Range* out) {
  int64_t count = 0;
  for (int64_t e = 0; e < p.experts; ++e) {
    const Range range = range_of(e);
    if (range.begin >= range.end || count_wanting(p, gates, tokens, e, dense) == 0) continue;
    if (count > 0 && out[count - 1].end == range.begin)
      out[count - 1].end = range.end;
    else
      out[count++] = range;
  }
  return {out, count};
}

// Rows that will be read later: each tile prefetches one of them.
template <class E>
struct Upcoming {
  const E* const* rows = nullptr;
  int64_t count = 0;

  // The next one, or `other` where there is none.
  const E* take(const E* other) {
    if (count == 0) return other;
    --count;
    return *rows++;
  }
};

template <class E>
class Dots {
  using C = typename Operand<E>::C;

 public:
  // At most `most` tokens at a time.
  Dots(const rode::Problem& problem, int64_t most)
      : p(problem),
        block_(most),
        sums_(block_ * (p.total_rank > p.experts ? p.total_rank : p.experts)),
        results_(block_ * p.total_rank),
        chosen_(block_ * p.experts),
        index_(block_ * p.experts),
        counts_(p.experts) {}

  // out[i * experts + e] for all experts: every token against every row.
  void all(const E* const* rows, int64_t tokens, const RowsOf<E>& weights, C* out) {
    each_step(weights, [&](const E* w, int64_t stride, int64_t k, int64_t n) {
      Upcoming<E> none;
      part(rows, tokens, k, w, weights.rows, stride, n, sums_.get(), none);
    });
    sums<C>(sums_.get(), tokens * weights.rows, out);
  }

  // For each token in turn, out[expert's columns] where the expert is open (or `dense`), of `ranks`. Other pairs leave `out`
  // alone. `next`: rows that will be read after these.
  template <class Weights>
  void where_open(const C* gates, const E* const* rows, int64_t tokens, const Weights& weights, Range ranks, C* out,
                  const Upcoming<E>& next) {
    for (int64_t e = 0; e < p.experts; ++e) {
      int64_t count = 0;
      for (int64_t i = 0; i < tokens; ++i)
        if (p.dense || gates[i * p.experts + e] != 0) {
          index_.get()[e * block_ + count] = i;
          chosen_.get()[e * block_ + count++] = rows[i];
        }
      counts_.get()[e] = count;
    }
    each_step(weights, [&](const E* w, int64_t stride, int64_t k, int64_t n) {
      Upcoming<E> upcoming = next;
      for (int64_t e = 0; e < p.experts; ++e) {
        const Range r = within(p, e, ranks);
        if (r.begin < r.end)
          part(chosen_.get() + e * block_, counts_.get()[e], k, w + r.begin * stride, r.end - r.begin, stride, n,
               sums_.get() + block_ * r.begin, upcoming);
      }
    });
    for (int64_t e = 0; e < p.experts; ++e) {
      const Range r = within(p, e, ranks);
      const int64_t begin = r.begin, width = r.end - begin;
      if (width <= 0) continue;
      sums<C>(sums_.get() + block_ * begin, counts_.get()[e] * width, results_.get());
      for (int64_t i = 0; i < counts_.get()[e]; ++i)
        std::memcpy(out + index_.get()[e * block_ + i] * p.total_rank + begin, results_.get() + i * width, width * sizeof(C));
    }
  }

 private:
  template <class Weights, class Run>
  void each_step(const Weights& weights, Run run) {
    for (int64_t c = 0; c < weights.length; c += weights.width) {
      const E* chunk = weights.chunk(c / weights.width);
      const int64_t width = weights.length - c < weights.width ? weights.length - c : weights.width;
      const int64_t step = step_of<E>(width);
      for (int64_t k = 0; k < width; k += step) run(chunk + k, weights.width, c + k, width - k < step ? width - k : step);
    }
  }

  void part(const E* const* rows, int64_t tokens, int64_t k, const E* weights, int64_t count, int64_t stride, int64_t n,
            Vector<C>* sums, Upcoming<E>& upcoming) {
    if (tokens == 0) return;
    const Parts of_rows(count, kMostRows), of_tokens(tokens, kMostTokens);
    for (int64_t a = 0, m = 0; a < of_tokens.count; m += of_tokens.size(a++))
      for (int64_t b = 0, r = 0; b < of_rows.count; r += of_rows.size(b++)) {
        const E* ahead = upcoming.take(rows[m]) + k;  // rows[m]: nothing new
        with_constant<kMostTokens>(of_tokens.size(a), [&]<int TM>() {
          with_constant<kMostRows>(of_rows.size(b), [&]<int TR>() {
            dot_tile<E, TM, TR>(rows + m, k, weights + r * stride, stride, n, k == 0, sums + m * count + r, count, ahead);
          });
        });
      }
  }

  const rode::Problem& p;
  const int64_t block_;
  Scratch<Vector<C>> sums_;
  Scratch<C> results_;
  Scratch<const E*> chosen_;
  Scratch<int64_t> index_, counts_;
};

}  // namespace
