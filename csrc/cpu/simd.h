// Vectors of the accumulation type, loads and stores in every dtype, and the three inner loops of the operation.
//
// Included by files that are compiled once per instruction set. Everything stands in an anonymous namespace, and no template of
// the standard library is used, so that the linker cannot keep the AVX-512 copy of an inline function for every machine.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>  // integer_sequence: a type without functions

#include "scratch.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#error "the native core uses GNU vector extensions: build with GCC or Clang, or set RODE_NATIVE=off"
#endif

// Before loops over what is to stay in registers: without it GCC passes their sums through the stack.
#define RODE_UNROLL _Pragma("GCC unroll 16")
// And on functions that are handed them by reference.
#define RODE_INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
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
#if defined(__aarch64__) && !defined(__clang__) && __GNUC__ < 13
using Float16 = __fp16;  // this GCC has _Float16 in C only; both are IEEE halves
#else
using Float16 = _Float16;
#endif

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
inline float narrow<float>(float v) {
  return v;
}

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
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) return (Vector<C>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#endif
  C lanes[kLanes<C>] = {};
  std::memcpy(lanes, p, n * sizeof(C));
  return load(lanes);
}
template <class C>
inline void store(C* p, Vector<C> v) {
  std::memcpy(p, &v, sizeof v);
}
// kLanes vectors as the rows of a square: after it lane i of v[j] is what was lane j of v[i].
template <int Half, int... I, class V>
RODE_INLINE void swap_blocks(V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
  const V low = __builtin_shufflevector(a, b, (I & Half ? lanes + I - Half : I)...);
  b = __builtin_shufflevector(a, b, (I & Half ? lanes + I : I + Half)...);
  a = low;
}
template <int Half, class C>
RODE_INLINE void transpose(Vector<C>* v) {
  if constexpr (Half > 0) {
    RODE_UNROLL for (int i = 0; i < kLanes<C>; ++i) if (!(i & Half))
        swap_blocks<Half>(v[i], v[i + Half], std::make_integer_sequence<int, kLanes<C>>{});
    transpose<Half / 2, C>(v);
  }
}

// Squares of four words of a row each are turned in vectors of this size: in wider ones that takes longer.
constexpr int kQuadRows = kVectorBytes >= 32 ? 8 : 4;
typedef float Quads __attribute__((vector_size(4 * kQuadRows)));
// A word, and four of them, in memory: floats, or pairs of bfloat16 from any of them on.
typedef float Word __attribute__((aligned(2), may_alias));
typedef float QuadInMemory __attribute__((vector_size(16), aligned(2), may_alias));

typedef uint32_t QuadWords __attribute__((vector_size(4 * kQuadRows)));
typedef uint16_t QuadHalves __attribute__((vector_size(2 * kQuadRows)));

// v, of floats, rounded to bfloat16, as `narrow` rounds. W: as many words.
template <class W, class V>
inline W bfloat16_bits(V v) {
  const W w = (W)v;
  return v != v ? W{} + 0x7FC0u : (w + 0x7FFFu + ((w >> 16) & 1u)) >> 16;
}
// v rounded to T as what stands at `out`, float or bfloat16.
template <class T, class Out>
inline void store_rounded(Out* out, Quads v) {
  if constexpr (sizeof(Out) == sizeof(uint16_t)) {
    const QuadHalves bits = __builtin_convertvector(bfloat16_bits<QuadWords>(v), QuadHalves);
    std::memcpy(out, &bits, sizeof bits);
  } else {
    if constexpr (sizeof(T) == sizeof(uint16_t)) v = (Quads)(bfloat16_bits<QuadWords>(v) << 16);
    std::memcpy(out, &v, sizeof v);
  }
}
// Words of two bfloat16 each: the first ones at `out`, the second ones `width` after it.
template <class Out>
inline void store_halves(Out* out, int64_t width, Quads v) {
  const QuadWords first = (QuadWords)v & 0xFFFFu, second = (QuadWords)v >> 16;
  if constexpr (sizeof(Out) == sizeof(uint16_t)) {
    const QuadHalves a = __builtin_convertvector(first, QuadHalves), b = __builtin_convertvector(second, QuadHalves);
    std::memcpy(out, &a, sizeof a);
    std::memcpy(out + width, &b, sizeof b);
  } else {
    const QuadWords a = first << 16, b = second << 16;
    std::memcpy(out, &a, sizeof a);
    std::memcpy(out + width, &b, sizeof b);
  }
}

// out[j], for j in [0, 4): word j of kQuadRows rows, `stride` words apart.
RODE_INLINE void transpose_quads(const Word* rows, int64_t stride, Quads* out) {
  const auto at = [&](int64_t l)
                      __attribute__((always_inline)) { return *reinterpret_cast<const QuadInMemory*>(rows + l * stride); };
#if defined(__AVX2__)
  const Word* others = rows + 4 * stride;
  const auto both = [&](int64_t l) __attribute__((always_inline)) {
    return __builtin_shufflevector(at(l), *reinterpret_cast<const QuadInMemory*>(others + l * stride), 0, 1, 2, 3, 4, 5, 6, 7);
  };
  const Quads a = both(0), b = both(1), c = both(2), d = both(3);
  const Quads ab = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13),
              ab2 = __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  const Quads cd = __builtin_shufflevector(c, d, 0, 8, 1, 9, 4, 12, 5, 13),
              cd2 = __builtin_shufflevector(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
  out[0] = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13),
  out[1] = __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  out[2] = __builtin_shufflevector(ab2, cd2, 0, 1, 8, 9, 4, 5, 12, 13),
  out[3] = __builtin_shufflevector(ab2, cd2, 2, 3, 10, 11, 6, 7, 14, 15);
#else
  const Quads a = at(0), b = at(1), c = at(2), d = at(3);
  const Quads ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Quads cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  out[0] = __builtin_shufflevector(ab, cd, 0, 1, 4, 5), out[1] = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  out[2] = __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5), out[3] = __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7);
#endif
}

// out[i] = the sum of v[i]'s lanes, by halves; of n vectors, the same bits wherever one stands.
template <int Half, class C>
RODE_INLINE void merge(Vector<C>* v) {
  if constexpr (Half > 0) {
    RODE_UNROLL for (int i = 0; i < Half; ++i) {
      swap_blocks<Half>(v[i], v[i + Half], std::make_integer_sequence<int, kLanes<C>>{});
      v[i] += v[i + Half];
    }
    merge<Half / 2, C>(v);
  }
}
template <class C>
void sums(const Vector<C>* v, int64_t n, C* out) {
  constexpr int64_t lanes = kLanes<C>;
  for (int64_t i = 0; i < n; i += lanes) {
    Vector<C> some[lanes];
    RODE_UNROLL for (int l = 0; l < lanes; ++l) some[l] = i + l < n ? v[i + l] : Vector<C>{};
    merge<lanes / 2, C>(some);
    if (n - i >= lanes)
      store(out + i, some[0]);
    else
      std::memcpy(out + i, some, (n - i) * sizeof(C));
  }
}

// kLanes elements of T as the accumulation type, and back, rounded.
template <class T>
inline Vector<typename AccumulationOf<T>::type> load_widened(const T* p) {
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
inline Vector<float> load_widened<BFloat16>(const BFloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Vector<float>)(__builtin_convertvector(h, Words) << 16);
}
template <>
inline void store_narrow<BFloat16>(BFloat16* p, Vector<float> v) {
#if defined(__AVX512BF16__)
  if (_mm512_fpclass_ps_mask((__m512)v, 0x20) == 0) {  // the instruction makes zeros of denormal numbers
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &h, sizeof h);
    return;
  }
#endif
  const Halves h = __builtin_convertvector(bfloat16_bits<Words>(v), Halves);
  std::memcpy(p, &h, sizeof h);
}

#if defined(__F16C__)
template <>
inline Vector<float> load_widened<Float16>(const Float16* p) {
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

// The first n lanes, rounded.
template <class T, class C>
inline void store_first(T* p, const Vector<C>& v, int64_t n) {
  if (n == kLanes<C>) return store_narrow<T>(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#endif
  T lanes[kLanes<C>];
  store_narrow<T>(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}
template <class T, class C>
inline void store_some(T* p, const C* values, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<C> <= n; i += kLanes<C>) store_narrow<T>(p + i, load(values + i));
  if (i < n) store_first<T, C>(p + i, load_first(values + i, n - i), n - i);
}

// out[i] = factor * in[i] for i in [0, n), rounded to T, in the accumulation type.
template <class T, class C>
inline void scale_rounded(C factor, const C* in, int64_t n, C* out) {
  constexpr int64_t lanes = kLanes<C>;
  for (int64_t i = 0; i < n; i += lanes) {
    const int64_t some = n - i < lanes ? n - i : lanes;
    Vector<C> v = factor * (some == lanes ? load(in + i) : load_first(in + i, some));
    if constexpr (sizeof(T) != sizeof(C)) {
      T rounded[lanes];
      store_narrow<T>(rounded, v);
      v = load_widened<T>(rounded);
    }
    store_first<C, C>(out + i, v, some);
  }
}

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

// A block that a thread uses for itself; given back with it, in the reverse order of taking.
template <class C>
class Scratch {
 public:
  explicit Scratch(int64_t count) : bytes_((count * sizeof(C) + 63) / 64 * 64) {
    if (bytes_ == 0) return;
    // whole vectors on whole cache lines: a load across two costs twice
    data_ = static_cast<C*>(rode::take_scratch(bytes_));
    kept_ = data_ != nullptr;
    if (!kept_) data_ = static_cast<C*>(std::aligned_alloc(64, bytes_));
    if (data_ == nullptr) std::abort();  // out of memory inside a parallel region: no exception may cross it
  }
  ~Scratch() {
    if (bytes_ == 0) return;
    if (!kept_) std::free(data_);
    rode::give_back_scratch(bytes_, kept_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  C* get() const { return data_; }

 private:
  size_t bytes_;
  C* data_ = nullptr;
  bool kept_ = false;
};

}  // namespace
