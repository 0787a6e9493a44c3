// Vectors of the accumulation type, loads and stores in every dtype, and the three inner loops of the operation.
//
// Included by files that are compiled once per instruction set. Everything stands in an anonymous namespace, and no template of
// the standard library is used, so that the linker cannot keep the AVX-512 copy of an inline function for every machine.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#error "the native core uses GNU vector extensions: build with GCC or Clang, or set RODE_NATIVE=off"
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 4;  // 4 x 4 sums in flight need 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 2;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 2;
#endif

template <class C>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <class C>
using Vector = typename VectorOf<C>::type;
template <class C>
constexpr int kLanes = kVectorBytes / sizeof(C);

struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

template <class T>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};

inline double widen(double v) { return v; }
inline float widen(float v) { return v; }
inline float widen(Float16 v) { return static_cast<float>(v); }
inline float widen(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

template <class T>
inline T narrow(typename AccumulationOf<T>::type v) {
  return static_cast<T>(v);
}
template <>
inline BFloat16 narrow<BFloat16>(float v) {  // round to nearest even; a NaN stays a NaN
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>(v != v ? 0x7FC0u : rounded >> 16)};
}

template <>
inline float narrow<float>(float v) { return v; }

// A value rounded to T, held in the accumulation type: what enters a second product.
template <class T>
inline typename AccumulationOf<T>::type round_to(typename AccumulationOf<T>::type v) {
  return widen(narrow<T>(v));
}

template <class C>
inline Vector<C> load(const C* p) {
  Vector<C> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class C>
inline Vector<C> load_first(const C* p, int64_t n) {  // the first n lanes, the rest 0
  C lanes[kLanes<C>] = {};
  std::memcpy(lanes, p, n * sizeof(C));
  return load(lanes);
}
template <class C>
inline void store(C* p, Vector<C> v) {
  std::memcpy(p, &v, sizeof v);
}
// The sum of the lanes, by halves: the same bits wherever it stands.
template <int N, class C>
inline C sum_of_halves(const C* p) {
  if constexpr (N == 1) {
    return p[0];
  } else {
    typedef C Half __attribute__((vector_size(N / 2 * sizeof(C))));
    Half low, high;
    std::memcpy(&low, p, sizeof low);
    std::memcpy(&high, p + N / 2, sizeof high);
    low += high;
    C rest[N / 2];
    std::memcpy(rest, &low, sizeof low);
    return sum_of_halves<N / 2, C>(rest);
  }
}
template <class C>
inline C sum(Vector<C> v) {
  C lanes[kLanes<C>];
  std::memcpy(lanes, &v, sizeof v);
  return sum_of_halves<kLanes<C>, C>(lanes);
}

// kLanes elements of T as the accumulation type, and back, rounded.
template <class T>
inline Vector<typename AccumulationOf<T>::type> load_wide(const T* p) {
  using C = typename AccumulationOf<T>::type;
  if constexpr (sizeof(T) == sizeof(C)) {
    return load(reinterpret_cast<const C*>(p));
  } else {
    Vector<C> v;
    for (int i = 0; i < kLanes<C>; ++i) v[i] = widen(p[i]);
    return v;
  }
}
template <class T>
inline void store_narrow(T* p, Vector<typename AccumulationOf<T>::type> v) {
  using C = typename AccumulationOf<T>::type;
  if constexpr (sizeof(T) == sizeof(C)) {
    store(reinterpret_cast<C*>(p), v);
  } else {
    for (int i = 0; i < kLanes<C>; ++i) p[i] = narrow<T>(v[i]);
  }
}
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
template <>
inline Vector<float> load_wide<BFloat16>(const BFloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  const Words w = __builtin_convertvector(h, Words) << 16;
  Vector<float> v;
  std::memcpy(&v, &w, sizeof v);
  return v;
}
template <>
inline void store_narrow<BFloat16>(BFloat16* p, Vector<float> v) {
  Words w;
  std::memcpy(&w, &v, sizeof w);
  w = (w + 0x7FFFu + ((w >> 16) & 1u)) >> 16;
  w = v != v ? Words{} + 0x7FC0u : w;
  const Halves h = __builtin_convertvector(w, Halves);
  std::memcpy(p, &h, sizeof h);
}

#if defined(__F16C__)
template <>
inline Vector<float> load_wide<Float16>(const Float16* p) {
#if defined(__AVX512F__)
  // with a mask of all lanes: GCC 12 warns of its own header otherwise
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
}
template <>
inline void store_narrow<Float16>(Float16* p, Vector<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xFFFF, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
}
#endif

// A vector of what enters a product: the accumulation type, or with dot-product instructions pairs of bfloat16.
template <class E>
struct Operand {
  using C = E;
  using V = Vector<E>;
  static constexpr int lanes = kLanes<E>;
  static V at(const E* p) { return load(p); }
  static V first(const E* p, int64_t n) { return load_first(p, n); }
  static void add(Vector<C>& sum, V x, V w) { sum += x * w; }
};
#if defined(__AVX512BF16__)
template <>
struct Operand<BFloat16> {
  using C = float;
  using V = __m512bh;
  static constexpr int lanes = 32;
  static V at(const BFloat16* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static V first(const BFloat16* p, int64_t n) {
    BFloat16 elements[lanes] = {};
    std::memcpy(elements, p, n * sizeof(BFloat16));
    return at(elements);
  }
  static void add(Vector<float>& sum, V x, V w) { sum = (Vector<float>)_mm512_dpbf16_ps((__m512)sum, x, w); }
};
#endif

// dots[m * stride + r] = <rows[m], weights[r]> over n elements, for TM x TR pairs. Sums run along lanes, so a pair's bits do not
// depend on the tile that it is computed in.
template <class E, int TM, int TR>
void dot_tile(const E* const* rows, const E* weights, int64_t n, typename Operand<E>::C* dots, int64_t stride) {
  using O = Operand<E>;
  using C = typename O::C;
  Vector<C> sums[TM][TR];
  for (int m = 0; m < TM; ++m)
    for (int r = 0; r < TR; ++r) sums[m][r] = Vector<C>{};
  const auto step = [&](int64_t k, auto load_at) {
    typename O::V x[TM];
    for (int m = 0; m < TM; ++m) x[m] = load_at(rows[m] + k);
    for (int r = 0; r < TR; ++r) {
      const typename O::V w = load_at(weights + r * n + k);
      for (int m = 0; m < TM; ++m) O::add(sums[m][r], x[m], w);
    }
  };
  int64_t k = 0;
  for (; k + O::lanes <= n; k += O::lanes) step(k, [](const E* p) { return O::at(p); });
  if (k < n) step(k, [left = n - k](const E* p) { return O::first(p, left); });
  for (int m = 0; m < TM; ++m)
    for (int r = 0; r < TR; ++r) dots[m * stride + r] = sum<C>(sums[m][r]);
}

template <class E, int TM, class C>
void dots_of_rows(const E* const* rows, const E* weights, int64_t count, int64_t n, C* dots, int64_t stride) {
  int64_t r = 0;
  for (; r + kTileRows <= count; r += kTileRows)
    dot_tile<E, TM, kTileRows>(rows, weights + r * n, n, dots + r, stride);
  switch (count - r) {
    case 3: if constexpr (kTileRows > 3) dot_tile<E, TM, 3>(rows, weights + r * n, n, dots + r, stride); break;
    case 2: if constexpr (kTileRows > 2) dot_tile<E, TM, 2>(rows, weights + r * n, n, dots + r, stride); break;
    case 1: dot_tile<E, TM, 1>(rows, weights + r * n, n, dots + r, stride); break;
  }
}

// dots (tokens, count), row stride `stride`: every row against every one of `count` weight rows of length n.
template <class E, class C>
void dots(const E* const* rows, int64_t tokens, const E* weights, int64_t count, int64_t n, C* out, int64_t stride) {
  int64_t m = 0;
  for (; m + 4 <= tokens; m += 4) dots_of_rows<E, 4>(rows + m, weights, count, n, out + m * stride, stride);
  switch (tokens - m) {
    case 3: dots_of_rows<E, 3>(rows + m, weights, count, n, out + m * stride, stride); break;
    case 2: dots_of_rows<E, 2>(rows + m, weights, count, n, out + m * stride, stride); break;
    case 1: dots_of_rows<E, 1>(rows + m, weights, count, n, out + m * stride, stride); break;
  }
}

// out[c] = sum_j coefficients[j] * rows[j][c] for c in [0, n).
template <class C>
void combine(const C* coefficients, const C* const* rows, int64_t count, int64_t n, C* out) {
  constexpr int64_t kWide = 4 * kLanes<C>;
  int64_t c = 0;
  for (; c + kWide <= n; c += kWide) {
    Vector<C> sums[4] = {};
    for (int64_t j = 0; j < count; ++j)
      for (int i = 0; i < 4; ++i) sums[i] += coefficients[j] * load(rows[j] + c + i * kLanes<C>);
    for (int i = 0; i < 4; ++i) store(out + c + i * kLanes<C>, sums[i]);
  }
  for (; c < n; c += kLanes<C>) {
    const int64_t left = n - c < kLanes<C> ? n - c : kLanes<C>;
    Vector<C> sums = {};
    for (int64_t j = 0; j < count; ++j) sums += coefficients[j] * load_first(rows[j] + c, left);
    std::memcpy(out + c, &sums, left * sizeof(C));
  }
}

// out[r * out_stride + c] += sum_m coefficients[m][r] * rows[m][c], for TR rows and one pair of vectors. The sum over these tokens
// is formed first and added as a whole: long sums over tokens stay accurate.
template <class C, int TR>
void outer_tile(const C* const* coefficients, const C* const* rows, int64_t tokens, int64_t c, int64_t width, C* out,
                int64_t out_stride) {
  Vector<C> sums[TR][2] = {};
  const int64_t lanes = kLanes<C>, left = width - c;
  if (left >= 2 * lanes) {
    for (int64_t m = 0; m < tokens; ++m) {
      const Vector<C> x0 = load(rows[m] + c), x1 = load(rows[m] + c + lanes);
      for (int r = 0; r < TR; ++r) {
        sums[r][0] += coefficients[m][r] * x0;
        sums[r][1] += coefficients[m][r] * x1;
      }
    }
  } else {
    const int64_t first = left < lanes ? left : lanes, second = left - first;
    for (int64_t m = 0; m < tokens; ++m) {
      const Vector<C> x0 = load_first(rows[m] + c, first), x1 = load_first(rows[m] + c + first, second);
      for (int r = 0; r < TR; ++r) {
        sums[r][0] += coefficients[m][r] * x0;
        sums[r][1] += coefficients[m][r] * x1;
      }
    }
  }
  for (int r = 0; r < TR; ++r)
    for (int64_t i = 0; i < 2 * lanes && i < left; ++i) out[r * out_stride + c + i] += sums[r][i / lanes][i % lanes];
}

// A block that a thread keeps for itself; freed with it.
template <class C>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = (count > 0 ? count : 1) * sizeof(C);
    // whole vectors on whole cache lines: a load across two costs twice
    data_ = static_cast<C*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (data_ == nullptr) std::abort();  // out of memory inside a parallel region: no exception may cross it
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  C* get() const { return data_; }

 private:
  C* data_;
};

}  // namespace
