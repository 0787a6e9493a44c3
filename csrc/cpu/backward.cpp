// The backward pass. Compiled once per instruction set; RODE_ISA names the namespace.
//
// First over tokens: t = dy B, then v, du, dh and dx. Then over columns of the weight gradients: each thread owns columns and walks
// all tokens in order, so the bits do not depend on the number of threads.
#include "rows.h"

namespace {

template <class T>
class TokenPass {
  using C = typename AccumulationOf<T>::type;

 public:
  TokenPass(const rode::Problem& problem, const rode::Backward& arrays)
      : p(problem),
        a(arrays),
        dy_(kBlockTokens * p.out_features),
        t_(kBlockTokens * p.total_rank),
        coefficients_(p.total_rank > p.experts ? p.total_rank : p.experts),
        terms_(p.total_rank > p.experts ? p.total_rank : p.experts) {}

  void run(int64_t m0, int64_t tokens) {
    const C* g = static_cast<const C*>(a.g) + m0 * p.experts;
    C* t = t_.get();
    for (int64_t i = 0; i < tokens * p.total_rank; ++i) t[i] = 0;
    if (a.dy) {
      const C* rows[kBlockTokens];
      gather_rows<T>(a.dy, m0, tokens, 0, p.out_features, dy_.get(), rows);
      dots_where_open(p, g, rows, tokens, static_cast<const C*>(a.B), p.out_features, t);
    }
    for (int64_t i = 0; i < tokens; ++i) {
      gates_and_coefficients(m0 + i, g + i * p.experts, t + i * p.total_rank);
      if (a.dx) input_gradient(m0 + i, g + i * p.experts);
    }
  }

 private:
  void gates_and_coefficients(int64_t m, const C* g, const C* t) const {
    const C* u = static_cast<const C*>(a.u) + m * p.total_rank;
    C* du = static_cast<C*>(a.du) + m * p.total_rank;
    C* v = a.v == nullptr ? nullptr : static_cast<C*>(a.v) + m * p.total_rank;
    for (int64_t e = 0; e < p.experts; ++e) {
      const C scaling = static_cast<C>(p.scaling[e]);
      const bool open = g[e] != 0;
      C dg = 0;
      for (int64_t j = p.offsets[e]; j < p.offsets[e + 1]; ++j) {
        if (open || p.dense) dg += t[j] * u[j];
        du[j] = open ? round_to<T>(scaling * g[e] * t[j]) : C(0);  // select, never 0 * infinity
        if (v != nullptr) v[j] = open ? round_to<T>(scaling * g[e] * u[j]) : C(0);
      }
      dg *= scaling;
      if (a.router != nullptr) {
        if (a.dgates != nullptr) dg += static_cast<const C*>(a.dgates)[m * p.experts + e];
        if (!open) dg = 0;
      }
      static_cast<C*>(a.dh)[m * p.experts + e] = dg;
    }
  }

  // dx = drop'(du A) + dh Wr for one token.
  void input_gradient(int64_t m, const C* g) const {
    const C* du = static_cast<const C*>(a.du) + m * p.total_rank;
    const C* dh = static_cast<const C*>(a.dh) + m * p.experts;
    T* dx = static_cast<T*>(a.dx.data) + m * a.dx.row;
    C sums[kChunk], router[kChunk];
    for (int64_t c = 0; c < p.in_features; c += kChunk) {
      const int64_t n = p.in_features - c < kChunk ? p.in_features - c : kChunk;
      int64_t count = 0;
      for (int64_t e = 0; e < p.experts; ++e)
        for (int64_t j = p.offsets[e]; g[e] != 0 && j < p.offsets[e + 1]; ++j)
          add_term(du[j], static_cast<const C*>(a.A) + j * p.in_features + c, &count);
      combine(coefficients_.get(), terms_.get(), count, n, sums);
      if (p.dropout.on && count > 0) drop(p.dropout, static_cast<uint64_t>(m) * p.in_features + c, n, sums, sums);
      if (a.router != nullptr) {
        count = 0;
        for (int64_t e = 0; e < p.experts; ++e)
          if (g[e] != 0) add_term(dh[e], static_cast<const C*>(a.router) + e * p.in_features + c, &count);
        combine(coefficients_.get(), terms_.get(), count, n, router);
        for (int64_t i = 0; i < n; ++i) sums[i] += router[i];
      }
      for (int64_t i = 0; i < n; ++i) dx[c + i] = narrow<T>(sums[i]);
    }
  }

  void add_term(C coefficient, const C* row, int64_t* count) const {
    coefficients_.get()[*count] = coefficient;
    terms_.get()[(*count)++] = row;
  }

  const rode::Problem& p;
  const rode::Backward& a;
  Scratch<C> dy_, t_, coefficients_;
  Scratch<const C*> terms_;
};

constexpr int64_t kSumTokens = 256;  // tokens whose contributions are summed before they join the total
constexpr int64_t kColumns = 128;    // columns of a weight gradient that one unit of work owns

template <class T>
class WeightPass {
  using C = typename AccumulationOf<T>::type;

 public:
  explicit WeightPass(const rode::Problem& problem, const rode::Backward& arrays)
      : p(problem), a(arrays), x_(kSumTokens * kColumns), dropped_(p.dropout.on ? kSumTokens * kColumns : 0) {}

  // Columns [c, c + n) of dA and of the router's gradient, from the same rows of x.
  void input_columns(int64_t c, int64_t n) {
    for (int64_t m0 = 0; m0 < p.tokens; m0 += kSumTokens) {
      const int64_t tokens = p.tokens - m0 < kSumTokens ? p.tokens - m0 : kSumTokens;
      const C* rows[kSumTokens];
      gather_rows<T>(a.x, m0, tokens, c, n, x_.get(), rows);
      if (a.drouter != nullptr)
        for (int64_t e = 0; e < p.experts; ++e)
          add(static_cast<const C*>(a.dh), p.experts, e, e, e + 1, m0, tokens, rows, n,
              static_cast<C*>(a.drouter) + c, p.in_features);
      if (a.dA == nullptr) continue;
      if (p.dropout.on)
        for (int64_t i = 0; i < tokens; ++i) {
          if (!any_open(static_cast<const C*>(a.g) + (m0 + i) * p.experts, p.experts)) continue;
          C* out = dropped_.get() + i * kColumns;
          drop(p.dropout, static_cast<uint64_t>(m0 + i) * p.in_features + c, n, rows[i], out);
          rows[i] = out;
        }
      experts(static_cast<const C*>(a.du), m0, tokens, rows, n, static_cast<C*>(a.dA) + c, p.in_features);
    }
  }

  void output_columns(int64_t c, int64_t n) {
    for (int64_t m0 = 0; m0 < p.tokens; m0 += kSumTokens) {
      const int64_t tokens = p.tokens - m0 < kSumTokens ? p.tokens - m0 : kSumTokens;
      const C* rows[kSumTokens];
      gather_rows<T>(a.dy, m0, tokens, c, n, x_.get(), rows);
      experts(static_cast<const C*>(a.v), m0, tokens, rows, n, static_cast<C*>(a.dB) + c, p.out_features);
    }
  }

 private:
  void experts(const C* coefficients, int64_t m0, int64_t tokens, const C* const* rows, int64_t n, C* out,
               int64_t stride) const {
    for (int64_t e = 0; e < p.experts; ++e)
      add(coefficients, p.total_rank, e, p.offsets[e], p.offsets[e + 1], m0, tokens, rows, n, out, stride);
  }

  // out[j] += sum over the tokens that have expert e open of coefficients[m][j] * rows[m], for j in [begin, end).
  void add(const C* coefficients, int64_t width, int64_t e, int64_t begin, int64_t end, int64_t m0, int64_t tokens,
           const C* const* rows, int64_t n, C* out, int64_t stride) const {
    const C* chosen[kSumTokens];
    const C* factors[kSumTokens];
    int64_t count = 0;
    for (int64_t i = 0; i < tokens; ++i)
      if (static_cast<const C*>(a.g)[(m0 + i) * p.experts + e] != 0) {
        chosen[count] = rows[i];
        factors[count++] = coefficients + (m0 + i) * width + begin;
      }
    for (int64_t j = begin; j < end && count > 0;) {
      const bool four = j + 4 <= end;
      for (int64_t c = 0; c < n; c += 2 * kLanes<C>)
        if (four)
          outer_tile<C, 4>(factors, chosen, count, c, n, out + j * stride, stride);
        else
          outer_tile<C, 1>(factors, chosen, count, c, n, out + j * stride, stride);
      const int64_t step = four ? 4 : 1;
      for (int64_t i = 0; i < count; ++i) factors[i] += step;
      j += step;
    }
  }

  const rode::Problem& p;
  const rode::Backward& a;
  Scratch<C> x_, dropped_;
};

template <class C>
void zero(void* out, int64_t count) {
  for (int64_t i = 0; out != nullptr && i < count; ++i) static_cast<C*>(out)[i] = 0;
}

template <class C>
void bias_gradient(const rode::Problem& p, const rode::Backward& a) {
  C* out = static_cast<C*>(a.dbias);
  for (int64_t e = 0; e < p.experts; ++e) {
    for (int64_t m0 = 0; m0 < p.tokens; m0 += kSumTokens) {
      C part = 0;
      for (int64_t m = m0; m < p.tokens && m < m0 + kSumTokens; ++m)
        part += static_cast<const C*>(a.dh)[m * p.experts + e];
      out[e] += part;
    }
  }
}

template <class T>
void backward(const rode::Problem& p, const rode::Backward& a) {
  using C = typename AccumulationOf<T>::type;
  const int64_t blocks = (p.tokens + kBlockTokens - 1) / kBlockTokens;
  const bool in = a.dA != nullptr || a.drouter != nullptr, out = a.dB != nullptr && a.dy;
  const int64_t in_units = in ? (p.in_features + kColumns - 1) / kColumns : 0;
  const int64_t units = in_units + (out ? (p.out_features + kColumns - 1) / kColumns : 0);
  zero<C>(a.dA, p.total_rank * p.in_features);
  zero<C>(a.dB, p.total_rank * p.out_features);
  zero<C>(a.drouter, p.experts * p.in_features);
  zero<C>(a.dbias, p.experts);
  const int threads = thread_count(p, blocks > units ? blocks : units);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    {
      TokenPass<T> pass(p, a);
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t m0 = b * kBlockTokens, left = p.tokens - m0;
        pass.run(m0, left < kBlockTokens ? left : kBlockTokens);
      }
    }
    WeightPass<T> pass(p, a);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) {
      const bool input = unit < in_units;
      const int64_t c = (input ? unit : unit - in_units) * kColumns;
      const int64_t left = (input ? p.in_features : p.out_features) - c, n = left < kColumns ? left : kColumns;
      input ? pass.input_columns(c, n) : pass.output_columns(c, n);
    }
  }
  if (a.dbias != nullptr) bias_gradient<C>(p, a);
}

}  // namespace

namespace rode {
namespace RODE_ISA {

void backward(const Problem& p, const Backward& a) {
  switch (p.dtype) {
    case DType::float64: return ::backward<double>(p, a);
    case DType::float32: return ::backward<float>(p, a);
    case DType::float16: return ::backward<Float16>(p, a);
    case DType::bfloat16: return ::backward<BFloat16>(p, a);
  }
}

}  // namespace RODE_ISA
}  // namespace rode
