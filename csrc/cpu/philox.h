// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) for dropout.
#pragma once

#include "../problem.h"

namespace {

constexpr int kCounters = 16;  // computed side by side: the loops below become vector code

// words[w * kCounters + i] = word w of counter (first + i, 0, 0).
inline void philox(uint64_t first, uint64_t seed, uint32_t* words) {
  uint32_t c0[kCounters], c1[kCounters], c2[kCounters] = {}, c3[kCounters] = {};
  for (int i = 0; i < kCounters; ++i) {
    c0[i] = static_cast<uint32_t>(first + i);
    c1[i] = static_cast<uint32_t>((first + i) >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kCounters; ++i) {
      const uint64_t p0 = 0xD2511F53ull * c0[i], p1 = 0xCD9E8D57ull * c2[i];
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(p1);
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  std::memcpy(words, c0, sizeof c0);
  std::memcpy(words + kCounters, c1, sizeof c1);
  std::memcpy(words + 2 * kCounters, c2, sizeof c2);
  std::memcpy(words + 3 * kCounters, c3, sizeof c3);
}

#if defined(__AVX512F__)
// The high and the low half of each product with `factor`. Even lanes, then odd ones: the instruction multiplies 32 bits in 64.
RODE_INLINE void multiply(__m512i factor, __m512i lanes, __m512i& high, __m512i& low) {
  const __m512i even = _mm512_maskz_mul_epu32(0xFF, lanes, factor);
  const __m512i odd = _mm512_maskz_mul_epu32(0xFF, _mm512_maskz_srli_epi64(0xFF, lanes, 32), factor);
  high = _mm512_mask_blend_epi32(0xAAAA, _mm512_maskz_srli_epi64(0xFF, even, 32), odd);
  low = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_maskz_slli_epi64(0xFF, odd, 32));
}

// kept[w]: bit i says whether word w of counter first + i is at least the threshold.
inline void kept_words(const rode::Dropout& dropout, uint64_t first, uint32_t* kept) {
  alignas(64) uint32_t lows[kCounters], highs[kCounters];
  for (int i = 0; i < kCounters; ++i) {
    lows[i] = static_cast<uint32_t>(first + i);
    highs[i] = static_cast<uint32_t>((first + i) >> 32);
  }
  __m512i c0 = _mm512_load_si512(lows), c1 = _mm512_load_si512(highs), c2 = _mm512_setzero_si512(), c3 = c2;
  const __m512i factor0 = _mm512_set1_epi64(0xD2511F53), factor1 = _mm512_set1_epi64(0xCD9E8D57);
  uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
  RODE_UNROLL for (int round = 0; round < 10; ++round) {
    __m512i high0, low0, high1, low1;
    multiply(factor0, c0, high0, low0);
    multiply(factor1, c2, high1, low1);
    constexpr int kXor = 0x96;  // of all three
    c0 = _mm512_ternarylogic_epi32(high1, c1, _mm512_set1_epi32(static_cast<int>(k0)), kXor);
    c2 = _mm512_ternarylogic_epi32(high0, c3, _mm512_set1_epi32(static_cast<int>(k1)), kXor);
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const __m512i threshold = _mm512_set1_epi32(static_cast<int>(dropout.threshold));
  kept[0] = _mm512_cmpge_epu32_mask(c0, threshold);
  kept[1] = _mm512_cmpge_epu32_mask(c1, threshold);
  kept[2] = _mm512_cmpge_epu32_mask(c2, threshold);
  kept[3] = _mm512_cmpge_epu32_mask(c3, threshold);
}
#else
inline void kept_words(const rode::Dropout& dropout, uint64_t first, uint32_t* kept) {
  uint32_t words[4 * kCounters];
  philox(first, dropout.seed, words);
  const uint32_t threshold = static_cast<uint32_t>(dropout.threshold);
  for (int w = 0; w < 4; ++w) {
    kept[w] = 0;
    for (int i = 0; i < kCounters; ++i)
      kept[w] |= static_cast<uint32_t>(words[w * kCounters + i] >= threshold) << i;
  }
}
#endif

// Bit i of 16 as bit 4 i of 64.
inline uint64_t every_fourth(uint64_t bits) {
  bits = (bits | bits << 24) & 0x000000FF000000FFull;
  bits = (bits | bits << 12) & 0x000F000F000F000Full;
  bits = (bits | bits << 6) & 0x0303030303030303ull;
  return (bits | bits << 3) & 0x1111111111111111ull;
}

constexpr int64_t kGroup = 4 * kCounters;  // elements whose bits are one word

// Bit i: whether element first + i of x is kept; first is a multiple of 64.
inline uint64_t kept_group(const rode::Dropout& dropout, uint64_t first) {
  if (dropout.threshold >> 32) return 0;
  uint32_t kept[4];
  kept_words(dropout, first >> 2, kept);
  return every_fourth(kept[0]) | every_fourth(kept[1]) << 1 | every_fourth(kept[2]) << 2 | every_fourth(kept[3]) << 3;
}

// out[i] = in[i] where bit i is set, else 0, for i < n <= 64; in may be out. A select: a dropped infinity is gone.
template <class C>
RODE_INLINE void select(uint64_t bits, int64_t n, const C* in, C* out) {
#if defined(__AVX512F__)
  const uint64_t inside = n < kGroup ? (uint64_t{1} << n) - 1 : ~uint64_t{0};
  constexpr int64_t lanes = 64 / sizeof(C);
  for (int64_t j = 0; j < n; j += lanes) {
    const uint64_t some = inside >> j, kept = bits >> j & some;
    if constexpr (sizeof(C) == 2)
      _mm512_mask_storeu_epi16(out + j, static_cast<__mmask32>(some), _mm512_maskz_loadu_epi16(static_cast<__mmask32>(kept), in + j));
    else if constexpr (sizeof(C) == 4)
      _mm512_mask_storeu_epi32(out + j, static_cast<__mmask16>(some), _mm512_maskz_loadu_epi32(static_cast<__mmask16>(kept), in + j));
    else
      _mm512_mask_storeu_epi64(out + j, static_cast<__mmask8>(some), _mm512_maskz_loadu_epi64(static_cast<__mmask8>(kept), in + j));
  }
#else
  for (int64_t j = 0; j < n; ++j) out[j] = bits >> j & 1 ? in[j] : C{};
#endif
}

// out[i] = kept ? in[i] : 0 for elements first .. first + n of x; in may be out.
template <class C>
void drop(const rode::Dropout& dropout, uint64_t first, int64_t n, const C* in, C* out) {
  for (int64_t i = 0; i < n;) {
    const int64_t begin = static_cast<int64_t>((first + i) % kGroup), left = kGroup - begin;
    const int64_t count = n - i < left ? n - i : left;
    select(kept_group(dropout, first + i - begin) >> begin, count, in + i, out + i);
    i += count;
  }
}

// Words of a row of bits: one more than the columns need, for a piece of 64 may begin anywhere in one.
inline int64_t kept_words_of(int64_t columns) { return (columns + kGroup - 1) / kGroup + 1; }

// Bit by bit, which elements of row m of x are kept.
inline void fill_kept(const rode::Dropout& dropout, int64_t m, int64_t columns, uint64_t* row) {
  const uint64_t first = static_cast<uint64_t>(m) * columns, shift = first % kGroup, last = first + columns;
  const int64_t words = kept_words_of(columns);
  uint64_t group = first - shift, low = kept_group(dropout, group);
  for (int64_t w = 0; w + 1 < words; ++w) {
    group += kGroup;
    const uint64_t high = group < last ? kept_group(dropout, group) : 0;
    row[w] = shift ? low >> shift | high << (kGroup - shift) : low;
    low = high;
  }
  row[words - 1] = 0;
}

// out[i] = kept ? in[i] : 0 for columns c .. c + n of row m.
template <class C>
RODE_INLINE void drop_columns(const rode::Dropout& dropout, int64_t m, int64_t columns, int64_t c, int64_t n, const C* in, C* out) {
  if (dropout.kept == nullptr) return drop(dropout, static_cast<uint64_t>(m) * columns + c, n, in, out);
  for (int64_t i = 0; i < n; i += kGroup) {
    const int64_t count = n - i < kGroup ? n - i : kGroup, shift = (c + i) % kGroup;
    const uint64_t* const word = dropout.kept + m * dropout.words + (c + i) / kGroup;
    select(shift ? word[0] >> shift | word[1] << (kGroup - shift) : word[0], count, in + i, out + i);
  }
}

}  // namespace
