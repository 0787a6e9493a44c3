// Vectors of the accumulation type, loads and stores in every dtype, and the three inner loops of the operation.
//
// Included by files that are compiled once per instruction set. Everything stands in an anonymous namespace, and no template of
// the standard library is used, so that the linker cannot keep the AVX-512 copy of an inline function for every machine.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

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
template <class C>
inline C sum(Vector<C> v) {  // in the order of lanes: the same bits wherever it stands
  C total = v[0];
  for (int i = 1; i < kLanes<C>; ++i) total += v[i];
  return total;
}

// dots[m * stride + r] = <rows[m], weights[r]> over n elements, for TM x TR pairs. Sums run along lanes, so a pair's bits do not
// depend on the tile that it is computed in.
template <class C, int TM, int TR>
void dot_tile(const C* const* rows, const C* weights, int64_t n, C* dots, int64_t stride) {
  Vector<C> sums[TM][TR] = {};
  const auto step = [&](int64_t k, auto load_at) {
    Vector<C> x[TM];
    for (int m = 0; m < TM; ++m) x[m] = load_at(rows[m] + k);
    for (int r = 0; r < TR; ++r) {
      const Vector<C> w = load_at(weights + r * n + k);
      for (int m = 0; m < TM; ++m) sums[m][r] += x[m] * w;
    }
  };
  int64_t k = 0;
  for (; k + kLanes<C> <= n; k += kLanes<C>) step(k, [](const C* p) { return load(p); });
  if (k < n) step(k, [left = n - k](const C* p) { return load_first(p, left); });
  for (int m = 0; m < TM; ++m)
    for (int r = 0; r < TR; ++r) dots[m * stride + r] = sum<C>(sums[m][r]);
}

template <class C, int TM>
void dots_of_rows(const C* const* rows, const C* weights, int64_t count, int64_t n, C* dots, int64_t stride) {
  int64_t r = 0;
  for (; r + kTileRows <= count; r += kTileRows)
    dot_tile<C, TM, kTileRows>(rows, weights + r * n, n, dots + r, stride);
  for (; r < count; ++r) dot_tile<C, TM, 1>(rows, weights + r * n, n, dots + r, stride);
}

// dots (tokens, count), row stride `stride`: every row against every one of `count` weight rows of length n.
template <class C>
void dots(const C* const* rows, int64_t tokens, const C* weights, int64_t count, int64_t n, C* out, int64_t stride) {
  int64_t m = 0;
  for (; m + 4 <= tokens; m += 4) dots_of_rows<C, 4>(rows + m, weights, count, n, out + m * stride, stride);
  for (; m < tokens; ++m) dots_of_rows<C, 1>(rows + m, weights, count, n, out + m * stride, stride);
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
  explicit Scratch(int64_t count) : data_(static_cast<C*>(std::malloc((count > 0 ? count : 1) * sizeof(C)))) {
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
