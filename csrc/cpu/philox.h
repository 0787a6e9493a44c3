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

// out[i] = kept ? in[i] : 0 for elements first .. first + n of x; in may be out.
template <class C>
void drop(const rode::Dropout& dropout, uint64_t first, int64_t n, const C* in, C* out) {
  uint32_t words[4 * kCounters];
  constexpr uint64_t kElements = 4 * kCounters;
  for (int64_t i = 0; i < n;) {
    const uint64_t element = first + i, group = element / kElements * kElements;
    philox(group >> 2, dropout.seed, words);
    const int64_t begin = static_cast<int64_t>(element - group);
    const int64_t count = n - i < static_cast<int64_t>(kElements) - begin ? n - i : kElements - begin;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t e = begin + j;
      const uint32_t word = words[(e & 3) * kCounters + (e >> 2)];
      out[i + j] = word >= dropout.threshold ? in[i + j] : C{};  // select: a dropped infinity is gone
    }
    i += count;
  }
}

}  // namespace
