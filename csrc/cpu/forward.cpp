// The forward pass. Compiled once per instruction set; RODE_ISA names the namespace.
#include "rows.h"

namespace {

template <class T>
class ForwardPass {
  using C = typename AccumulationOf<T>::type;

 public:
  ForwardPass(const rode::Problem& problem, const rode::Forward& arrays)
      : p(problem),
        a(arrays),
        x_(kBlockTokens * p.in_features),
        dropped_(p.dropout.on ? kBlockTokens * p.in_features : 0),
        coefficients_(p.total_rank),
        terms_(p.total_rank) {}

  void run(int64_t m0, int64_t tokens) {
    const C* rows[kBlockTokens];
    gather_rows<T>(a.x, m0, tokens, 0, p.in_features, x_.get(), rows);
    C* g = static_cast<C*>(a.g) + m0 * p.experts;
    if (a.router != nullptr) gate(rows, tokens, g);
    if (p.dropout.on) {
      for (int64_t i = 0; i < tokens; ++i) {
        if (!p.dense && !any_open(g + i * p.experts, p.experts)) continue;
        C* out = dropped_.get() + i * p.in_features;
        drop(p.dropout, static_cast<uint64_t>(m0 + i) * p.in_features, p.in_features, rows[i], out);
        rows[i] = out;
      }
    }
    C* u = static_cast<C*>(a.u) + m0 * p.total_rank;
    for (int64_t i = 0; i < tokens * p.total_rank; ++i) u[i] = 0;
    dots_where_open(p, g, rows, tokens, static_cast<const C*>(a.A), p.in_features, u);
    for (int64_t i = 0; i < tokens; ++i) expand(m0 + i, g + i * p.experts, u + i * p.total_rank);
  }

 private:
  void gate(const C* const* rows, int64_t tokens, C* g) const {
    dots(rows, tokens, static_cast<const C*>(a.router), p.experts, p.in_features, g, p.experts);
    const C* bias = static_cast<const C*>(a.router_bias);
    for (int64_t i = 0; i < tokens; ++i)
      for (int64_t e = 0; e < p.experts; ++e) {
        C& h = g[i * p.experts + e];
        if (bias != nullptr) h += bias[e];
        h = h <= 0 ? C(0) : h;  // a NaN passes, as through torch.relu
      }
  }

  // y = base + v B^T for one token; a token with nothing open leaves y alone where y is base.
  void expand(int64_t m, const C* g, const C* u) const {
    int64_t count = 0;
    for (int64_t e = 0; e < p.experts; ++e) {
      if (g[e] == 0) continue;
      const C factor = static_cast<C>(p.scaling[e]) * g[e];
      for (int64_t j = p.offsets[e]; j < p.offsets[e + 1]; ++j) {
        coefficients_.get()[count] = round_to<T>(factor * u[j]);
        terms_.get()[count++] = static_cast<const C*>(a.B) + j * p.out_features;
      }
    }
    const T* base = static_cast<const T*>(a.base.data) + (a.base ? m * a.base.row : 0);
    T* y = static_cast<T*>(a.y.data) + m * a.y.row;
    if (count == 0 && base == y) return;
    C sums[kChunk];
    const C* chunk_rows[kRowsAtOnce];
    for (int64_t c = 0; c < p.out_features; c += kChunk) {
      const int64_t n = p.out_features - c < kChunk ? p.out_features - c : kChunk;
      combine_columns(count, c, n, sums, chunk_rows);
      for (int64_t i = 0; i < n; ++i) {
        const C start = a.base ? widen(base[(c + i) * a.base.column]) : C(0);
        y[(c + i) * a.y.column] = narrow<T>(start + sums[i]);
      }
    }
  }

  static constexpr int64_t kRowsAtOnce = 64;

  void combine_columns(int64_t count, int64_t c, int64_t n, C* sums, const C** chunk_rows) const {
    C part[kChunk];
    for (int64_t j = 0; j == 0 || j < count; j += kRowsAtOnce) {
      const int64_t some = count - j < kRowsAtOnce ? count - j : kRowsAtOnce;
      for (int64_t i = 0; i < some; ++i) chunk_rows[i] = terms_.get()[j + i] + c;
      combine(coefficients_.get() + j, chunk_rows, some, n, j == 0 ? sums : part);
      for (int64_t i = 0; j > 0 && i < n; ++i) sums[i] += part[i];
    }
  }

  const rode::Problem& p;
  const rode::Forward& a;
  Scratch<C> x_, dropped_, coefficients_;
  Scratch<const C*> terms_;
};

template <class T>
void forward(const rode::Problem& p, const rode::Forward& a) {
  const int64_t blocks = (p.tokens + kBlockTokens - 1) / kBlockTokens;
  const int threads = thread_count(p, blocks);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    ForwardPass<T> pass(p, a);
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
