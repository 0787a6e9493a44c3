// The backward pass, of one mixture and of several that read the same x. Compiled once per instruction set; RODE_ISA names the
// namespace.
//
// First over tokens, a group of them at a time (token_gradients.h). Then over columns of the weight gradients
// (weight_gradients.h).
#include "siblings.h"
#include "token_gradients.h"
#include "weight_gradients.h"

namespace {

template <class C>
void bias_gradient(const rode::Problem& p, const rode::BackwardArrays& a) {
  C* out = static_cast<C*>(a.dbias);
  for (int64_t e = 0; e < p.experts; ++e) {
    out[e] = 0;
    for (int64_t m0 = 0; m0 < p.tokens; m0 += kSumTokens) {
      C part = 0;
      for (int64_t m = m0; m < p.tokens && m < m0 + kSumTokens; ++m) part += static_cast<const C*>(a.dh)[m * p.experts + e];
      out[e] += part;
    }
  }
}

// The first column of weight gradients that belongs to a thread: those of dA are rounded up, those of dB down.
inline int64_t parts_of(int64_t columns) { return (columns + kLeastColumns - 1) / kLeastColumns; }
inline int64_t first_column(int64_t columns, int64_t thread, int64_t threads, bool up) {
  const int64_t at = (thread * parts_of(columns) + (up ? threads - 1 : 0)) / threads * kLeastColumns;
  return at < columns ? at : columns;
}

// A problem whose dropout is computed once, bit by bit, for both halves of the pass: dA and dx.
struct KnownDropout : rode::Problem {
  KnownDropout(const rode::Problem& problem, const rode::BackwardArrays& a)
      : rode::Problem(problem), bits_(dropout.on && a.dA != nullptr && a.dx ? tokens * kept_words_of(in_features) : 0) {
    dropout.kept = bits_.get();
    dropout.words = kept_words_of(in_features);
  }

  // Computes the bits; all threads of a region take part, and wait for each other.
  template <class C>
  void fill(const C* g) const {
    if (dropout.kept == nullptr) return;
#pragma omp for schedule(static)
    for (int64_t m = 0; m < tokens; ++m)
      if (any_open(g + m * experts, experts)) fill_kept(dropout, m, in_features, bits_.get() + m * dropout.words);
  }

 private:
  Scratch<uint64_t> bits_;
};

template <class T>
void backward(const rode::Problem& problem, const rode::BackwardArrays& a) {
  using C = typename AccumulationOf<T>::type;
  using Row = typename Path<T>::Row;
  using Column = typename Path<T>::Column;
  const KnownDropout p(problem, a);
  const bool in = a.dA != nullptr || a.drouter_weight != nullptr, out = a.dB != nullptr && a.dy;
  const int64_t in_columns = in ? p.in_features : 0, out_columns = out ? p.out_features : 0;
  if (a.dB != nullptr && !out) std::memset(a.dB, 0, p.total_rank * p.out_features * (a.B.in_acc_dtype ? sizeof(C) : sizeof(T)));
  const int64_t terms = terms_of<T>(p);

  // Few tokens are one group: threads share dx by columns, and each lays out the weights of its own.
  const bool one_group = p.tokens > 0 && p.tokens <= kGroupTokens;
  const int64_t unit = unit_tokens(p), token_units = one_group ? 0 : (p.tokens + unit - 1) / unit;
  const Range all_ranks{0, p.total_rank}, all_terms{0, terms}, experts{0, p.experts};
  const int64_t parts = parts_of(in_columns) + parts_of(out_columns);
  const int64_t units = one_group ? parts_of(p.in_features) + parts_of(p.out_features) : token_units;
  const int threads = thread_count(p, units > parts ? units : parts);
  const Chunks of_B = row_chunks<Row>(p.out_features),
               chunks = column_chunks<T>(p.in_features, terms, one_group && threads > 1 ? 4 * threads : 1);
  const int64_t block = one_group && is_direct<T, Row>(a.dy) ? p.tokens : block_tokens(p);
  const bool own = p.threads > 1 && weight_bytes<T>(p) <= kOwnBytes;
  const int64_t size_of_B = a.dy && !one_group ? of_B.count * of_B.width * p.total_rank : 0;
  const int64_t size_of_A = a.dx && !one_group ? chunks.count * chunks.width * terms : 0;
  const int64_t size_of_router = a.dx && a.router_weight && !one_group ? chunks.count * chunks.width * p.experts : 0;
  Scratch<Row> shared_B(own ? 0 : size_of_B);
  Scratch<Column> shared_A(own ? 0 : size_of_A);
  Scratch<C> shared_router(own ? 0 : size_of_router);
  Scratch<C> t(one_group ? p.tokens * p.total_rank : 0);
  OpenTokens<T> open(p, a.dA != nullptr, out);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Team team = Team::current(), layers = own ? Team{0, 1} : team;
    p.fill(static_cast<const C*>(a.g));
    {
      Scratch<Row> own_B(own ? size_of_B : 0);
      Scratch<Column> own_A(own ? size_of_A : 0);
      Scratch<C> own_router(own ? size_of_router : 0);
      Row* const B = own ? own_B.get() : shared_B.get();
      Column* const A = own ? own_A.get() : shared_A.get();
      C* const router = own ? own_router.get() : shared_router.get();
      layers.each(size_of_B > 0 ? of_B.count : 0, [&](int64_t i) {
        pack_transposed<T>(a.B, i, of_B, {&all_ranks, 1}, p.total_rank, p.out_features, B + i * of_B.width * p.total_rank);
      });
      layers.each(size_of_A > 0 ? chunks.count : 0, [&](int64_t i) {
        pack_rows_as_columns<T>(p, a.A, i, chunks, {&all_terms, 1}, A + i * chunks.width * terms);
        if (a.router_weight)
          pack_rows<T>(a.router_weight, i, chunks, {&experts, 1}, p.in_features, router + i * chunks.width * p.experts);
      });
      if (!own && !one_group) {
#pragma omp barrier
      }
      const BackwardWeights<T> weights = {
          {one_group ? nullptr : B, p.total_rank, p.out_features, of_B.width}, one_group ? nullptr : A, router, chunks, terms};
      TokenGradients<T> pass(p, a, weights, block);
      const int64_t of_dx = a.dx ? chunks.count : 0;
      if (one_group) {
        pass.grad_output_pass(team, t.get());
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t m = 0; m < p.tokens; ++m) pass.gate_backward(m, t.get());
        if (of_dx > 0) pass.take(0, p.tokens);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < of_dx; ++i) pass.grad_input_pass(i);
      }
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < token_units; ++b) {
        const int64_t m0 = b * unit, tokens = p.tokens - m0 < unit ? p.tokens - m0 : unit;
        pass.grad_output_pass(m0, tokens);
        if (of_dx == 0) continue;
        pass.take(m0, tokens);
        for (int64_t i = 0; i < of_dx; ++i) pass.grad_input_pass(i);
      }
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < (parts > 0 ? open.blocks() : 0); ++b)
      open.collect(b, static_cast<const C*>(a.g), a.dA == nullptr ? nullptr : static_cast<const C*>(a.du),
                   out ? static_cast<const C*>(a.v) : nullptr, a.drouter_weight == nullptr ? nullptr : static_cast<const C*>(a.dh));
    WeightGradients<T> pass(p, a, open);
    // A thread has neighbouring columns: otherwise the processor would read ahead into lines that another thread writes.
    pass.input_columns(first_column(in_columns, team.thread, team.threads, true),
                       first_column(in_columns, team.thread + 1, team.threads, true));
    pass.output_columns(first_column(out_columns, team.thread, team.threads, false),
                        first_column(out_columns, team.thread + 1, team.threads, false));
  }
  if (a.dbias != nullptr) bias_gradient<C>(p, a);
}

// The weights of one of several mixtures, as many tokens read them. `of_dx`: chunks of dx, the same for all of them.
template <class T>
struct BackwardLayout {
  using C = typename AccumulationOf<T>::type;

  BackwardLayout(const rode::Problem& problem, const rode::BackwardArrays& arrays, const Chunks& of_dx)
      : p(problem),
        a(arrays),
        terms(terms_of<T>(p)),
        of_B(row_chunks<typename Path<T>::Row>(p.out_features)),
        chunks(of_dx),
        B(a.dy ? of_B.count * of_B.width * p.total_rank : 0),
        A(a.dx ? chunks.count * chunks.width * terms : 0),
        router(a.dx && a.router_weight ? chunks.count * chunks.width * p.experts : 0) {}

  void fill(Team team) const {
    const Range all_ranks{0, p.total_rank}, all_terms{0, terms}, experts{0, p.experts};
    team.each(a.dy ? of_B.count : 0, [&](int64_t i) {
      pack_transposed<T>(a.B, i, of_B, {&all_ranks, 1}, p.total_rank, p.out_features, B.get() + i * of_B.width * p.total_rank);
    });
    team.each(a.dx ? chunks.count : 0, [&](int64_t i) {
      pack_rows_as_columns<T>(p, a.A, i, chunks, {&all_terms, 1}, A.get() + i * chunks.width * terms);
      if (a.router_weight)
        pack_rows<T>(a.router_weight, i, chunks, {&experts, 1}, p.in_features, router.get() + i * chunks.width * p.experts);
    });
  }

  BackwardWeights<T> weights() const {
    return {{B.get(), p.total_rank, p.out_features, of_B.width}, A.get(), router.get(), chunks, terms};
  }

  const rode::Problem& p;
  const rode::BackwardArrays& a;
  const int64_t terms;
  const Chunks of_B, chunks;
  Scratch<typename Path<T>::Row> B;
  Scratch<typename Path<T>::Column> A;
  Scratch<C> router;
};

// A unit of tokens goes through dy of one mixture after the other, then through dx, chunk by chunk, each of which all of them add
// to before it is written. Weight gradients: all of them take a block of x before the next one comes.
template <class T>
void backward_siblings(const rode::Problem* p, const rode::BackwardArrays* a, int64_t count) {
  using C = typename AccumulationOf<T>::type;
  Each<KnownDropout> known;
  for (int64_t j = 0; j < count; ++j) known.add(p[j], a[j]);
  const int64_t tokens = p->tokens, unit = unit_of_all(p, count), units = (tokens + unit - 1) / unit;
  const auto reads_x = [&](int64_t j) { return a[j].dA != nullptr || a[j].drouter_weight != nullptr; };
  const auto out_columns = [&](int64_t j) { return a[j].dB != nullptr && a[j].dy ? p[j].out_features : 0; };
  int64_t most_terms = 0, in_columns = 0, parts = 0;
  for (int64_t j = 0; j < count; ++j) {
    most_terms = terms_of<T>(p[j]) > most_terms ? terms_of<T>(p[j]) : most_terms;
    if (reads_x(j)) in_columns = p->in_features;
    parts += parts_of(out_columns(j));
    if (a[j].dB != nullptr && !a[j].dy)
      std::memset(a[j].dB, 0, p[j].total_rank * p[j].out_features * (a[j].B.in_acc_dtype ? sizeof(C) : sizeof(T)));
  }
  parts += parts_of(in_columns);
  const int threads = thread_count(*p, units > parts ? units : parts);
  const Chunks chunks = column_chunks<T>(p->in_features, most_terms);
  const int64_t of_dx = a->dx ? chunks.count : 0;
  const bool own = own_weights<T>(p, count);
  Each<OpenTokens<T>> open;
  for (int64_t j = 0; j < count; ++j) open.add(p[j], a[j].dA != nullptr, out_columns(j) > 0);
  Each<BackwardLayout<T>> shared;
  for (int64_t j = 0; j < count && !own; ++j) shared.add(p[j], a[j], chunks);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Team team = Team::current();
    for (int64_t j = 0; j < count; ++j) known[j].fill(static_cast<const C*>(a[j].g));
    {
      Each<BackwardLayout<T>> mine;
      for (int64_t j = 0; j < count && own; ++j) mine.add(p[j], a[j], chunks);
      const Each<BackwardLayout<T>>& layouts = own ? mine : shared;
      std::vector<BackwardWeights<T>> weights;
      for (int64_t j = 0; j < count; ++j) {
        layouts[j].fill(own ? Team{0, 1} : team);
        weights.push_back(layouts[j].weights());
      }
      if (!own) {
#pragma omp barrier
      }
      Each<TokenGradients<T>> passes;
      for (int64_t j = 0; j < count; ++j) passes.add(known[j], a[j], weights[j], block_tokens(p[j]));
      Scratch<C> chunk(of_dx > 0 ? kGroupTokens * chunks.width : 0);
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < units; ++b) {
        const int64_t m0 = b * unit, some = tokens - m0 < unit ? tokens - m0 : unit;
        for (int64_t j = 0; j < count; ++j) {
          passes[j].grad_output_pass(m0, some);
          if (of_dx > 0) passes[j].take(m0, some);
        }
        for (int64_t i = 0; i < of_dx; ++i)
          for (int64_t j = 0; j < count; ++j) passes[j].grad_input_pass(i, {chunk.get(), j == 0, j + 1 == count});
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      const bool with_x = a[j].dA != nullptr, with_dy = out_columns(j) > 0, with_dh = a[j].drouter_weight != nullptr;
#pragma omp for schedule(static)
      for (int64_t b = 0; b < (with_x || with_dy || with_dh ? open[j].blocks() : 0); ++b)
        open[j].collect(b, static_cast<const C*>(a[j].g), with_x ? static_cast<const C*>(a[j].du) : nullptr,
                        with_dy ? static_cast<const C*>(a[j].v) : nullptr, with_dh ? static_cast<const C*>(a[j].dh) : nullptr);
    }
    Each<WeightGradients<T>> passes;
    for (int64_t j = 0; j < count; ++j) passes.add(known[j], a[j], open[j]);
    const int64_t begin = first_column(in_columns, team.thread, team.threads, true),
                  end = first_column(in_columns, team.thread + 1, team.threads, true);
    for (int64_t c = begin; c < end; c += kColumns) {
      const int64_t n = end - c < kColumns ? end - c : kColumns;
      for (int64_t j = 0; j < count; ++j) passes[j].start();
      for (int64_t block = 0; block < open[0].blocks(); ++block)
        for (int64_t j = 0; j < count; ++j)
          if (reads_x(j)) passes[j].add_input(block, c, n, end);
      for (int64_t j = 0; j < count; ++j) passes[j].finish_input(c, n);
    }
    for (int64_t j = 0; j < count; ++j)
      passes[j].output_columns(first_column(out_columns(j), team.thread, team.threads, false),
                               first_column(out_columns(j), team.thread + 1, team.threads, false));
  }
  for (int64_t j = 0; j < count; ++j)
    if (a[j].dbias != nullptr) bias_gradient<C>(p[j], a[j]);
}

}  // namespace

namespace rode::RODE_ISA {

void backward(const Problem& p, const BackwardArrays& a) {
  with_type(p.dtype, [&](auto of) { ::backward<decltype(of)>(p, a); });
}

void backward_siblings(const Problem* p, const BackwardArrays* a, int64_t count) {
  with_type(p->dtype, [&](auto of) { ::backward_siblings<decltype(of)>(p, a, count); });
}

}  // namespace rode::RODE_ISA
