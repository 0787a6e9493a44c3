// Weights as the kernels read them: rounded to x's dtype once, and laid out anew where that pays.
#pragma once

#include "rows.h"

namespace {

// Element (r, c) of a weight, rounded to T, in the accumulation type.
template <class T>
typename AccumulationOf<T>::type weight_at(const rode::Weight& w, int64_t r, int64_t c) {
  using C = typename AccumulationOf<T>::type;
  const int64_t at = r * w.row + c * w.column;
  return w.in_acc_dtype ? round_to<T>(static_cast<const C*>(w.data)[at]) : widen(static_cast<const T*>(w.data)[at]);
}

// The types that products read: the accumulation type, or pairs of bfloat16 where the processor has dot products of them.
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

// Elements (r, c) to (r, c + n) of a weight, rounded to T, in the first lanes; the other lanes are 0.
template <class T>
Vector<typename AccumulationOf<T>::type> weights_at(const rode::Weight& w, int64_t r, int64_t c, int64_t n) {
  using C = typename AccumulationOf<T>::type;
  const int64_t at = r * w.row + c;
  if (w.column != 1) {
    C lanes[kLanes<C>] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = weight_at<T>(w, r, c + i);
    return load(lanes);
  }
  if (sizeof(T) == sizeof(C) || w.in_acc_dtype) {
    const C* p = static_cast<const C*>(w.data) + at;
    const Vector<C> v = n == kLanes<C> ? load(p) : load_first(p, n);
    if (!w.in_acc_dtype) return v;
    T rounded[kLanes<C>];
    store_narrow<T>(rounded, v);
    return load_widened<T>(rounded);
  }
  const T* p = static_cast<const T*>(w.data) + at;
  if (n == kLanes<C>) return load_widened<T>(p);
  T some[kLanes<C>] = {};
  std::memcpy(some, p, n * sizeof(T));
  return load_widened<T>(some);
}

// Whether the rows of a weight can be used in place.
template <class T>
bool stands_as_rows(const rode::Weight& w, int64_t columns) {
  return !w.in_acc_dtype && sizeof(T) == sizeof(typename Path<T>::Row) && w.column == 1 && w.row == columns;
}

// Brings columns [c, c + n) of row r, which will be read soon, into the cache.
template <class T>
void prefetch(const rode::Weight& w, int64_t r, int64_t c, int64_t n) {
  const int64_t element = w.in_acc_dtype ? sizeof(typename AccumulationOf<T>::type) : sizeof(T);
  const char* first = static_cast<const char*>(w.data) + (r * w.row + c * w.column) * element;
  for (int64_t at = 0; at < n * w.column * element; at += 64) __builtin_prefetch(first + at, 0, 2);
}

// Columns [c, c + n) of row r.
template <class T, class Out>
void copy_row(const rode::Weight& w, int64_t r, int64_t c, int64_t n, Out* out) {
  constexpr int64_t lanes = kLanes<typename AccumulationOf<T>::type>;
  for (int64_t i = 0; i < n; i += lanes) {
    const int64_t some = n - i < lanes ? n - i : lanes;
    if (some == lanes) {
      store_narrow<Out>(out + i, weights_at<T>(w, r, c + i, lanes));
    } else {
      Out last[lanes];
      store_narrow<Out>(last, weights_at<T>(w, r, c + i, some));
      std::memcpy(out + i, last, some * sizeof(Out));
    }
  }
}

// A matrix in chunks of columns, (chunks, rows, width): a chunk's rows lie together, and stay in cache.
struct Chunks {
  int64_t width, count;
  int64_t columns(int64_t i, int64_t all) const { return all - i * width < width ? all - i * width : width; }
};

// Chunks of as many columns as keep `rows` rows small, in steps of `step`; at least `least` chunks where there are so many steps.
inline Chunks chunks_of(int64_t columns, int64_t rows, int64_t element, int64_t step, int64_t least) {
  constexpr int64_t kBytes = 24 * 1024;
  int64_t width = kBytes / (rows * element) / step * step;
  const int64_t most = 4 * step;
  if (width < step) width = step;
  if (width > most) width = most;
  while (width > step && width * least > columns) width -= step;
  return {width, (columns + width - 1) / width};
}

// Rows that will be read, as ranges in ascending order.
struct Range {
  int64_t begin, end;
};
struct Ranges {
  const Range* first;
  int64_t count;
  const Range* begin() const { return first; }
  const Range* end() const { return first + count; }
};

// Chunk i of a matrix that is given transposed: out[j * width + o] = row(o, j) for j in the ranges, and 0 beyond the last of
// `columns`. `row(o, j, n)`: n neighbours from j on of given row o, as a vector.
template <class C, class Out, class Row>
void transpose_chunk(int64_t i, const Chunks& chunks, Ranges wanted, int64_t columns, Row row, Out* out) {
  constexpr int64_t lanes = kLanes<C>;
  const int64_t first = i * chunks.width, n = chunks.columns(i, columns);
  for (int64_t o = 0; o < chunks.width; o += lanes)
    for (const Range& range : wanted)
      for (int64_t j = range.begin; j < range.end; j += lanes) {
        const int64_t some = range.end - j < lanes ? range.end - j : lanes;
        Vector<C> v[lanes];
        RODE_UNROLL for (int l = 0; l < lanes; ++l) v[l] = o + l < n ? row(first + o + l, j, some) : Vector<C>{};
        transpose<lanes / 2, C>(v);
        RODE_UNROLL for (int k = 0; k < lanes; ++k) if (k < some) store_narrow<Out>(out + (j + k) * chunks.width + o, v[k]);
      }
}

// The same by words of 32 bits that stand in memory, `row` from row to row: put(j, o, v, begin, end) gets words j + begin to j +
// end of given rows o to o + kQuadRows in vectors v[begin] to v[end - 1]; done(o) comes after all of those rows.
template <class Put, class Done>
void transpose_words(int64_t i, const Chunks& chunks, Ranges wanted, int64_t words, int64_t columns, const Word* data, int64_t row,
                     Put put, Done done) {
  const int64_t width = chunks.width, first = i * width, n = chunks.columns(i, columns);
  int64_t o = 0;
  for (; words >= 4 && o + kQuadRows <= n; o += kQuadRows) {
    const Word* const from = data + (first + o) * row;
    for (const Range& range : wanted) {
      for (int64_t l = 16; l < 16 + kQuadRows; ++l)  // rows that come later, in the order in which they stand
        for (int64_t j = range.begin; j < range.end; j += 16) __builtin_prefetch(from + l * row + j);
      for (int64_t j = range.begin; j < range.end; j += 4) {
        const int64_t at = j < words - 4 ? j : words - 4, left = range.end - at;
        Quads v[4];
        transpose_quads(from + at, row, v);
        if (at == j && left >= 4)
          put(at, o, v, 0, 4);
        else
          put(at, o, v, j - at, left < 4 ? left : 4);
      }
    }
    done(o);
  }
  for (; o < width; o += kQuadRows) {
    for (const Range& range : wanted)
      for (int64_t j = range.begin; j < range.end; j += 4) {
        Quads v[4] = {};
        const int64_t some = range.end - j < 4 ? range.end - j : 4;
        for (int64_t l = 0; l < kQuadRows && o + l < n; ++l)
          for (int64_t k = 0; k < some; ++k) v[k][l] = data[(first + o + l) * row + j + k];
        put(j, o, v, 0, some);
      }
    done(o);
  }
}

template <class Put>
void transpose_words(int64_t i, const Chunks& chunks, Ranges wanted, int64_t words, int64_t columns, const Word* data, int64_t row,
                     Put put) {
  transpose_words(i, chunks, wanted, words, columns, data, row, put, [](int64_t) {});
}

// Bytes of A and B in x's dtype.
template <class T>
int64_t weight_bytes(const rode::Problem& p) {
  return p.total_rank * (p.in_features + p.out_features) * static_cast<int64_t>(sizeof(T));
}

// Where weights have at most so many bytes, each thread lays them out for itself: lines that another core wrote may be as far as
// memory is.
constexpr int64_t kOwnBytes = 256 * 1024;

// The number of Path's columns that all experts take together.
template <class T>
int64_t terms_of(const rode::Problem& p) {
  int64_t terms = 0;
  for (int64_t e = 0; e < p.experts; ++e) terms += (p.offsets[e + 1] - p.offsets[e] + Path<T>::kTerm - 1) / Path<T>::kTerm;
  return terms;
}

#if defined(__AVX512BF16__)
inline uint32_t pair_of(BFloat16 first, BFloat16 second) { return first.bits | static_cast<uint32_t>(second.bits) << 16; }

// For each pair of an expert's ranks (term, its first rank, the expert's end): the last one's second is missing where ranks are
// odd.
template <class Run>
void each_pair(const rode::Problem& p, Run run) {
  int64_t term = 0;
  for (int64_t e = 0; e < p.experts; ++e)
    for (int64_t j = p.offsets[e]; j < p.offsets[e + 1]; j += 2) run(term++, j, p.offsets[e + 1]);
}

inline bool ranks_are_even(const rode::Problem& p) {
  for (int64_t e = 0; e < p.experts; ++e)
    if (p.offsets[e] % 2 != 0) return false;
  return p.total_rank % 2 == 0;
}
#endif

// Rows `wanted` of chunk i of B^T; w is B, (O, R). A neighbouring row may be written too.
template <class T, class Out>
void pack_transposed(const rode::Weight& w, int64_t i, const Chunks& chunks, Ranges wanted, int64_t rows, int64_t columns,
                     Out* out) {
  using C = typename AccumulationOf<T>::type;
  const int64_t width = chunks.width;
  if constexpr (std::is_same_v<C, float> && !std::is_same_v<T, Float16>) {
    if (w.column == 1 && (w.in_acc_dtype || sizeof(T) == sizeof(float))) {
      transpose_words(i, chunks, wanted, rows, columns, static_cast<const Word*>(w.data), w.row,
                      [=](int64_t j, int64_t o, const Quads* v, int64_t begin, int64_t end) __attribute__((always_inline)) {
                        RODE_UNROLL for (int l = 0; l < 4; ++l) if (begin <= l && l < end)
                            store_rounded<T>(out + (j + l) * width + o, v[l]);
                      });
      return;
    }
  }
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (w.column == 1 && w.row % 2 == 0 && rows % 2 == 0) {  // two neighbours are a word
      for (const Range& range : wanted) {
        const Range words{range.begin / 2, (range.end + 1) / 2};
        transpose_words(i, chunks, {&words, 1}, rows / 2, columns, static_cast<const Word*>(w.data), w.row / 2,
                        [=](int64_t j, int64_t o, const Quads* v, int64_t begin, int64_t end) __attribute__((always_inline)) {
                          RODE_UNROLL for (int l = 0; l < 4; ++l) if (begin <= l && l < end)
                              store_halves(out + 2 * (j + l) * width + o, width, v[l]);
                        });
      }
      return;
    }
  }
  transpose_chunk<C, Out>(
      i, chunks, wanted, columns, [&](int64_t o, int64_t j, int64_t n) { return weights_at<T>(w, o, j, n); }, out);
}

// Terms `wanted` of chunk i of B^T as sums of rows read it.
template <class T>
void pack_columns(const rode::Problem& p, const rode::Weight& w, int64_t i, const Chunks& chunks, Ranges wanted,
                  typename Path<T>::Column* out) {
  if constexpr (Path<T>::kTerm == 1) {
    pack_transposed<T>(w, i, chunks, wanted, p.total_rank, p.out_features, out);
  } else {
#if defined(__AVX512BF16__)
    const int64_t terms = terms_of<T>(p), width = chunks.width;
    const bool even = ranks_are_even(p);
    if (even && !w.in_acc_dtype && w.column == 1 && w.row % 2 == 0) {
      transpose_words(i, chunks, wanted, terms, p.out_features, static_cast<const Word*>(w.data), w.row / 2,
                      [=](int64_t j, int64_t o, const Quads* v, int64_t begin, int64_t end) __attribute__((always_inline)) {
                        RODE_UNROLL for (int l = 0; l < 4; ++l) if (begin <= l && l < end)
                            std::memcpy(out + (j + l) * width + o, &v[l], sizeof v[l]);
                      });
      return;
    }
    if (even && w.in_acc_dtype && w.column == 1) {
      for (const Range& range : wanted) {
        const Range ranks{2 * range.begin, 2 * range.end};
        transpose_words(i, chunks, {&ranks, 1}, p.total_rank, p.out_features, static_cast<const Word*>(w.data), w.row,
                        [=](int64_t j, int64_t o, const Quads* v, int64_t begin, int64_t end) __attribute__((always_inline)) {
                          RODE_UNROLL for (int l = 0; l < 4; l += 2) if (begin <= l && l < end) {
                            const QuadWords pairs = bfloat16_bits<QuadWords>(v[l]) | bfloat16_bits<QuadWords>(v[l + 1]) << 16;
                            std::memcpy(out + (j + l) / 2 * width + o, &pairs, sizeof pairs);
                          }
                        });
      }
      return;
    }
    Scratch<int64_t> ranks(terms), ends(terms);
    each_pair(p, [&](int64_t term, int64_t j, int64_t end) { ranks.get()[term] = j, ends.get()[term] = end; });
    transpose_chunk<float, float>(  // pairs travel as the bits of floats
        i, chunks, wanted, p.out_features,
        [&](int64_t o, int64_t t, int64_t n) {
          uint32_t pairs[kLanes<float>] = {};
          for (int64_t l = 0; l < n; ++l) {
            const int64_t j = ranks.get()[t + l];
            const BFloat16 last = j + 1 < ends.get()[t + l] ? narrow<BFloat16>(weight_at<T>(w, o, j + 1)) : BFloat16{};
            pairs[l] = pair_of(narrow<BFloat16>(weight_at<T>(w, o, j)), last);
          }
          return load(reinterpret_cast<const float*>(pairs));
        },
        reinterpret_cast<float*>(out));
#endif
  }
}

// Row j of A, (R, K), into each of its chunks.
template <class T, class Out>
void pack_row(const rode::Weight& w, int64_t j, const Chunks& chunks, int64_t rows, int64_t columns, Out* out) {
  for (int64_t i = 0; i < chunks.count; ++i) {
    const int64_t n = chunks.columns(i, columns);
    Out* to = out + (i * rows + j) * chunks.width;
    copy_row<T>(w, j, i * chunks.width, n, to);
    for (int64_t c = n; c < chunks.width; ++c) to[c] = Out{};
  }
}

// Rows `wanted` of chunk i of a matrix. The next chunk's are prefetched.
template <class T, class Out>
void pack_rows(const rode::Weight& w, int64_t i, const Chunks& chunks, Ranges wanted, int64_t columns, Out* out) {
  const int64_t first = i * chunks.width, n = chunks.columns(i, columns);
  for (const Range& range : wanted)
    for (int64_t j = range.begin; j < range.end; ++j) {
      Out* to = out + j * chunks.width;
      prefetch<T>(w, j, first + chunks.width, columns - first - chunks.width < n ? columns - first - chunks.width : n);
      copy_row<T>(w, j, first, n, to);
      for (int64_t c = n; c < chunks.width; ++c) to[c] = Out{};
    }
}

// Terms `wanted` of chunk i of A as sums of rows read it.
template <class T>
void pack_rows_as_columns(const rode::Problem& p, const rode::Weight& w, int64_t i, const Chunks& chunks, Ranges wanted,
                          typename Path<T>::Column* out) {
  if constexpr (Path<T>::kTerm == 1) {
    pack_rows<T>(w, i, chunks, wanted, p.in_features, out);
  } else {
#if defined(__AVX512BF16__)
    constexpr int64_t lanes = kLanes<float>;
    const int64_t first = i * chunks.width, n = chunks.columns(i, p.in_features), left = p.in_features - first - chunks.width;
    const Range* range = wanted.begin();
    each_pair(p, [&](int64_t term, int64_t j, int64_t end) {
      while (range != wanted.end() && range->end <= term) ++range;
      if (range == wanted.end() || term < range->begin) return;
      for (int64_t rank = j; rank < end && rank < j + 2; ++rank) prefetch<T>(w, rank, first + chunks.width, left < n ? left : n);
      for (int64_t c = 0; c < chunks.width; c += lanes) {
        const int64_t some = n - c >= lanes ? lanes : n > c ? n - c : 0;
        const auto bits = [&](int64_t rank) {  // exact: what is loaded is bfloat16 already
          return some > 0 ? (Words)weights_at<T>(w, rank, first + c, some) : Words{};
        };
        Words pairs = bits(j) >> 16;
        if (j + 1 < end) pairs |= bits(j + 1);
        std::memcpy(out + term * chunks.width + c, &pairs, sizeof pairs);
      }
    });
#endif
  }
}

}  // namespace
