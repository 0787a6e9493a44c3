// The forward pass, of one mixture and of several that read the same x. Compiled once per instruction set; RODE_ISA names the
// namespace.
#include "forward_pass.h"
#include "siblings.h"

namespace {

constexpr int64_t kLeastTokens = 4;  // fewer are not worth a thread

// Tokens that a thread takes down where all tokens together are one group.
inline int64_t tokens_per_thread(const rode::Problem& p) {
  const int64_t most = block_tokens(p), threads = p.threads > 0 ? p.threads : 1;
  const int64_t per_thread = (p.tokens + threads - 1) / threads;
  return per_thread < kLeastTokens ? kLeastTokens : per_thread > most ? most : per_thread;
}

// With fewer tokens still, threads share the weights: a thread is not worth waking for fewer bytes of A and B.
constexpr int64_t kBytesOfThread = 192 * 1024;

template <class T>
void forward(const rode::Problem& p, const rode::ForwardArrays& a) {
  using Row = typename Path<T>::Row;
  using Column = typename Path<T>::Column;
  // Few tokens are one group: threads share y by columns, and each lays out the weights of its own.
  const bool one_group = p.tokens <= kGroupTokens;
  const int64_t unit = one_group ? tokens_per_thread(p) : unit_tokens(p), units = (p.tokens + unit - 1) / unit;
  const int64_t kept_busy = weight_bytes<T>(p) / kBytesOfThread;
  const bool by_rank = p.tokens > 0 && p.tokens < 2 * kLeastTokens && p.threads > 1 && kept_busy > 1;
  const int threads = thread_count(p, by_rank ? kept_busy : units);
  const int64_t terms = terms_of<T>(p);
  const Range all_terms{0, terms};
  const Chunks chunks = column_chunks<T>(p.out_features, terms, one_group && threads > 1 ? 4 * threads : 1);
  // Rows at strides of a power of two collide in the first cache: they are copied where there are enough tokens to pay for it.
  const bool stands = stands_as_rows<T>(a.A, p.in_features), few_tokens = p.tokens < 2 * kLeastTokens;
  const bool copies = !few_tokens && (!one_group || (threads == 1 && p.tokens >= kBlockTokens) || !stands);
  const bool copies_router = a.router_weight && !stands_as_rows<T>(a.router_weight, p.in_features);
  const Chunks of_rows = copies || !stands ? row_chunks<Row>(p.in_features) : Chunks{p.in_features, 1};
  const bool own = p.threads > 1 && weight_bytes<T>(p) <= kOwnBytes;
  const int64_t of_A = copies ? p.total_rank * of_rows.width * of_rows.count : 0,
                of_router = copies_router ? p.experts * p.in_features : 0;
  const int64_t of_B = one_group ? 0 : chunks.count * chunks.width * terms;
  Scratch<Row> shared_A(own ? 0 : of_A), shared_router(own ? 0 : of_router);
  Scratch<Column> shared_B(own ? 0 : of_B);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch<Row> own_A(own ? of_A : 0), own_router(own ? of_router : 0);
    Scratch<Column> own_B(own ? of_B : 0);
    Row *const A = own ? own_A.get() : shared_A.get(), *const router = own ? own_router.get() : shared_router.get();
    Column* const B = own ? own_B.get() : shared_B.get();
    const Team team = Team::current(), layers = own ? Team{0, 1} : team;
    layers.each(copies ? p.total_rank : 0, [&](int64_t r) { pack_row<T>(a.A, r, of_rows, p.total_rank, p.in_features, A); });
    layers.each(copies_router ? p.experts : 0,
                [&](int64_t r) { copy_row<T>(a.router_weight, r, 0, p.in_features, router + r * p.in_features); });
    layers.each(one_group ? 0 : chunks.count,
                [&](int64_t i) { pack_columns<T>(p, a.B, i, chunks, {&all_terms, 1}, B + i * chunks.width * terms); });
    const ForwardWeights<T> weights = {
        {copies   ? A
         : stands ? static_cast<const Row*>(a.A.data)
                  : nullptr,
         p.total_rank, p.in_features, of_rows.width},
        {copies_router ? router : static_cast<const Row*>(a.router_weight.data), p.experts, p.in_features, p.in_features},
        one_group ? nullptr : B,
        chunks,
        terms};
    ForwardPass<T> pass(p, a, weights);
    if (!own && (of_A > 0 || of_router > 0 || of_B > 0)) {
#pragma omp barrier
    }
    if (by_rank) {
      pass.down_together(team);
#pragma omp barrier
    }
    if (one_group) {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < (by_rank ? 0 : units); ++b)
        pass.down(b * unit, p.tokens - b * unit < unit ? p.tokens - b * unit : unit);
      pass.apply_gates(0, p.tokens);
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < chunks.count; ++i) pass.up(i);
    } else {
#pragma omp for schedule(dynamic) nowait
      for (int64_t b = 0; b < units; ++b) {
        const int64_t m0 = b * unit, tokens = p.tokens - m0 < unit ? p.tokens - m0 : unit;
        pass.down(m0, tokens);
        pass.apply_gates(m0, tokens);
        for (int64_t i = 0; i < chunks.count; ++i) pass.up(i);
      }
    }
  }
}

// The weights of one of several mixtures, as many tokens read them.
template <class T>
struct ForwardLayout {
  using Row = typename Path<T>::Row;
  using Column = typename Path<T>::Column;

  ForwardLayout(const rode::Problem& problem, const rode::ForwardArrays& arrays)
      : p(problem),
        a(arrays),
        terms(terms_of<T>(p)),
        of_rows(row_chunks<Row>(p.in_features)),
        chunks(column_chunks<T>(p.out_features, terms)),
        copies_router(a.router_weight && !stands_as_rows<T>(a.router_weight, p.in_features)),
        A(p.total_rank * of_rows.width * of_rows.count),
        router(copies_router ? p.experts * p.in_features : 0),
        B(chunks.count * chunks.width * terms) {}

  void fill(Team team) const {
    const Range all_terms{0, terms};
    team.each(p.total_rank, [&](int64_t r) { pack_row<T>(a.A, r, of_rows, p.total_rank, p.in_features, A.get()); });
    team.each(copies_router ? p.experts : 0,
              [&](int64_t r) { copy_row<T>(a.router_weight, r, 0, p.in_features, router.get() + r * p.in_features); });
    team.each(chunks.count, [&](int64_t i) {
      pack_columns<T>(p, a.B, i, chunks, {&all_terms, 1}, B.get() + i * chunks.width * terms);
    });
  }

  ForwardWeights<T> weights() const {
    return {{A.get(), p.total_rank, p.in_features, of_rows.width},
            {copies_router ? router.get() : static_cast<const Row*>(a.router_weight.data), p.experts, p.in_features, p.in_features},
            B.get(),
            chunks,
            terms};
  }

  const rode::Problem& p;
  const rode::ForwardArrays& a;
  const int64_t terms;
  const Chunks of_rows, chunks;
  const bool copies_router;
  Scratch<Row> A, router;
  Scratch<Column> B;
};

// Blocks of tokens go down through all mixtures while x is in cache, then a unit of them goes up through one after the other.
template <class T>
void forward_siblings(const rode::Problem* p, const rode::ForwardArrays* a, int64_t count) {
  const int64_t tokens = p->tokens, unit = unit_of_all(p, count), units = (tokens + unit - 1) / unit;
  const int threads = thread_count(*p, units);
  const bool own = own_weights<T>(p, count);
  Each<ForwardLayout<T>> shared;
  for (int64_t j = 0; j < count && !own; ++j) shared.add(p[j], a[j]);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Each<ForwardLayout<T>> mine;
    for (int64_t j = 0; j < count && own; ++j) mine.add(p[j], a[j]);
    const Each<ForwardLayout<T>>& layouts = own ? mine : shared;
    std::vector<ForwardWeights<T>> weights;
    for (int64_t j = 0; j < count; ++j) {
      layouts[j].fill(own ? Team{0, 1} : Team::current());
      weights.push_back(layouts[j].weights());
    }
    Each<ForwardPass<T>> passes;
    for (int64_t j = 0; j < count; ++j) passes.add(p[j], a[j], weights[j]);
    if (!own) {
#pragma omp barrier
    }
#pragma omp for schedule(dynamic) nowait
    for (int64_t b = 0; b < units; ++b) {
      const int64_t m0 = b * unit, end = tokens - m0 < unit ? tokens : m0 + unit;
      for (int64_t m = m0; m < end; m += kBlockTokens)
        for (int64_t j = 0; j < count; ++j) passes[j].down(m, end - m < kBlockTokens ? end - m : kBlockTokens);
      for (int64_t j = 0; j < count; ++j) {
        passes[j].apply_gates(m0, end - m0);
        for (int64_t i = 0; i < layouts[j].chunks.count; ++i) passes[j].up(i);
      }
    }
  }
}

}  // namespace

namespace rode::RODE_ISA {

void forward(const Problem& p, const ForwardArrays& a) {
  with_type(p.dtype, [&](auto of) { ::forward<decltype(of)>(p, a); });
}

void forward_siblings(const Problem* p, const ForwardArrays* a, int64_t count) {
  with_type(p->dtype, [&](auto of) { ::forward_siblings<decltype(of)>(p, a, count); });
}

void keep_mask(const Dropout& dropout, uint64_t first, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = 1.0f;
  drop(dropout, first, n, out, out);
}

}  // namespace rode::RODE_ISA
