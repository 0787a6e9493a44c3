// A random problem for random_problems.cpp, and what the formula in float64 says of it.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>

#include "arrays.h"

namespace {

// Whether dropout keeps element e of x: Philox4x32-10, one word at a time.
bool keeps(const rode::Dropout& dropout, uint64_t e) {
  uint32_t c[4] = {static_cast<uint32_t>(e >> 2), static_cast<uint32_t>(e >> 34), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p = 0xD2511F53ull * c[0], q = 0xCD9E8D57ull * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(q >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(q),
                              static_cast<uint32_t>(p >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p)};
    std::memcpy(c, next, sizeof c);
  }
  return c[e & 3] >= dropout.threshold;
}

class Trial {
 public:
  // With `first`: a sibling of it, which reads the same x.
  explicit Trial(int64_t number, const Trial* first = nullptr)
      : number_(number), random{std::mt19937_64(static_cast<uint64_t>(number))} {
    choose_sizes();
    choose_options();
    if (first != nullptr) join(*first);
    draw(first == nullptr);
    expect_forward();
    expect_backward();
  }

  // Results of one pass, and the arrays to hand to the core.
  struct Forward {
    Table y, u, g;
    rode::ForwardArrays arrays;
  };
  struct Backward {
    Table v, du, dh, dA, dB, drouter, dbias;
    rode::BackwardArrays arrays;
  };

  rode::Problem problem(int threads) const {
    rode::Problem of_threads = p;
    of_threads.threads = threads;
    return of_threads;
  }
  Table empty_dx() const { return Table(T, M, K); }

  Forward start_forward() const {
    Forward f{in_place ? base->like() : y_strides->like(), Table(C, M, R), Table(C, M, N), {}};
    for (int64_t i = 0; in_place && i < M * O; ++i) f.y.set(i / O, i % O, base->get(i / O, i % O));
    for (int64_t i = 0; !has_router && i < M * N; ++i) f.g.set(i / N, i % N, gates.of[i].value);
    rode::ForwardArrays& a = f.arrays;
    a.x = x->matrix(), a.y = f.y.matrix();
    if (has_base) a.base = in_place ? a.y : base->matrix();
    a.A = weight_of(A), a.B = weight_of(B), a.router_weight = weight_of(router);
    a.router_bias = has_bias ? bias->data() : nullptr;
    a.u = f.u.data(), a.g = f.g.data();
    return f;
  }
  void check(const Forward& f, const std::string& run) const {
    check("g", f.g, gates, C, run);
    check("u", f.u, u, C, run);
    check("y", f.y, y, T, run);
  }

  Backward start_backward(const Forward& f, const Table& into_dx) const {
    Backward b{Table(C, M, R),          Table(C, M, R),          Table(C, M, N), Table(A->dtype(), R, K),
               Table(B->dtype(), O, R), Table(router_type, N, K), Table(C, 1, N), {}};
    rode::BackwardArrays& a = b.arrays;
    if (has_dy) a.dy = dy->matrix();
    a.x = x->matrix(), a.dx = {wants_dx ? into_dx.data() : nullptr, K, 1};
    a.dgates = has_dgates ? dgates->data() : nullptr;
    a.u = f.u.data(), a.g = f.g.data();
    a.A = weight_of(A), a.B = weight_of(B), a.router_weight = weight_of(router);
    a.v = wants_dB ? b.v.data() : nullptr, a.du = b.du.data(), a.dh = b.dh.data();
    a.dA = wants_dA ? b.dA.data() : nullptr, a.dB = wants_dB ? b.dB.data() : nullptr;
    a.drouter_weight = wants_drouter ? b.drouter.data() : nullptr, a.dbias = wants_dbias ? b.dbias.data() : nullptr;
    return b;
  }
  void check(const Backward& b, const std::string& run) const {
    check("dh", b.dh, dh, C, run);
    if (wants_dA) check("dA", b.dA, dA, T, run);
    if (wants_dB) check("dB", b.dB, dB, T, run);
    if (wants_drouter) check("drouter", b.drouter, drouter, router_type, run);
    if (wants_dbias) check("dbias", b.dbias, dbias, C, run);
  }
  // dx is the sum of the siblings', one after the other.
  void check_dx(const Table& out, const Numbers& expected, const std::string& run) const {
    if (wants_dx) check("dx", out, expected, T, run);
  }
  const Numbers& expected_dx() const { return dx; }

 private:
  void choose_sizes() {
    M = random.one_of({0, 1, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 40, 64, 100, 128, 129, 130, 200, 257, 300});
    for (int64_t* columns : {&K, &O})
      *columns = random.one_of({1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 66, 100, 127, 129, 160, 257});
    N = 1 + random.below(6);
    int64_t most = random.one_of({1, 4, 9, 20});
    if (random.one_in(6)) K = random.one_of({520, 700, 1050});   // a row takes more than one step
    if (random.one_in(8)) N = 8, most = 24, K += 200, O += 300;  // threads share the weights
    const bool even = random.one_in(2);                          // ranks of bfloat16 are read in pairs
    for (int64_t e = 0; e < N; ++e) {
      const int64_t rank = random.one_in(3) ? most : 1 + random.below(most);
      offsets.push_back(offsets.back() + (even ? rank + rank % 2 : rank));
    }
    R = offsets.back();
    while (M > 2 && M * R * (K + O) > 2000000) M /= 2;
  }

  void choose_options() {
    T = static_cast<DType>(random.one_of({0, 1, 1, 2, 2, 3, 3, 3}));
    C = T == DType::float64 ? T : DType::float32;
    has_router = !random.one_in(4), has_bias = has_router && random.one_in(2);
    has_base = !random.one_in(3), in_place = has_base && random.one_in(2);
    has_dy = !random.one_in(6), has_dgates = has_router && random.one_in(2);
    for (bool* wanted : {&wants_dx, &wants_dA, &wants_dB}) *wanted = !random.one_in(4);
    wants_drouter = has_router && !random.one_in(4), wants_dbias = has_bias && !random.one_in(4);
    for (int64_t e = 0; e < N; ++e) scaling.push_back(0.5 * static_cast<double>(1 + random.below(4)));
    p.dtype = T, p.tokens = M, p.in_features = K, p.out_features = O, p.experts = N, p.total_rank = R;
    p.offsets = offsets.data(), p.scaling = scaling.data(), p.dense = random.one_in(4);
    p.dropout = {random.one_in(3), random.engine(), uint64_t{1} << random.below(33)};
  }

  // What siblings have in common. Seeds, ranks, weights, and whether there is dropout, stay its own.
  void join(const Trial& first) {
    M = first.M, K = first.K, T = first.T, C = first.C, x = first.x, wants_dx = first.wants_dx;
    p.tokens = M, p.in_features = K, p.dtype = T;
  }

  Table matrix(int64_t rows, int64_t columns, bool repeats) {
    Table table = Table::at_some_strides(random, T, rows, columns, repeats);
    table.fill(random);
    return table;
  }
  // A weight is of x's type, or of the type of sums.
  Table weight(int64_t rows, int64_t columns) {
    Table table = Table::at_some_strides(random, random.one_in(3) ? C : T, rows, columns, false);
    table.fill(random);
    return table;
  }
  rode::Weight weight_of(const std::optional<Table>& table) const {
    rode::Weight w;
    if (!table) return w;
    static_cast<rode::Matrix&>(w) = table->matrix();
    w.in_acc_dtype = table->dtype() != T;
    return w;
  }

  void draw(bool with_x) {
    if (with_x) x = std::make_shared<Table>(matrix(M, K, true));
    A = weight(R, K), B = weight(O, R);
    base = matrix(M, O, false), y_strides = matrix(M, O, false), dy = matrix(M, O, true);
    bias = Table(C, 1, N), dgates = Table(C, M, N);
    bias->fill(random), dgates->fill(random);
    gates = Numbers(M, N);
    if (has_router) router = weight(N, K);
    if (has_router && with_x)
      for (int64_t m = 0; m < M; ++m)
        while (!decides(m)) x->fill_row(random, m);
    for (int tries = 0; has_router && !with_x && !decides_all(); router = weight(N, K))
      if (++tries == 20) has_router = has_bias = has_dgates = wants_drouter = wants_dbias = false;
    if (has_router) router_type = router->dtype();
    if (has_router) return;
    router.reset();
    for (int64_t i = 0; i < M * N; ++i) gates.of[i] = random.one_in(2) ? rounded(C, random.value()) : 0;
  }

  bool decides_all() {
    for (int64_t m = 0; m < M; ++m)
      if (!decides(m)) return false;
    return true;
  }

  // Computes the gates of token m; false where whether one is open hangs on a rounding.
  bool decides(int64_t m) {
    if (m > 0 && x->repeats()) {
      for (int64_t e = 0; e < N; ++e) gates(m, e) = gates(0, e);
      return true;
    }
    for (int64_t e = 0; e < N; ++e) {
      Number h = has_bias ? bias->get(0, e) : 0;
      for (int64_t k = 0; k < K; ++k) h += Number(x->get(m, k)) * read(router, e, k);
      if (std::fabs(h.value) <= type_of(C).tolerance * h.size) return false;
      gates(m, e) = h.value > 0 ? h : 0;
    }
    return true;
  }

  // A weight is rounded to x's type.
  Number read(const std::optional<Table>& w, int64_t r, int64_t c) const { return rounded(T, w->get(r, c)); }
  bool kept(int64_t m, int64_t k) const { return !p.dropout.on || keeps(p.dropout, static_cast<uint64_t>(m * K + k)); }
  bool open(int64_t m, int64_t e) const { return gates(m, e).value != 0; }

  // For each expert that token m has open, or each of all: run(expert, rank).
  template <class Run>
  void each_rank(int64_t m, bool all, Run run) const {
    for (int64_t e = 0; e < N; ++e)
      for (int64_t r = offsets[e]; (all || open(m, e)) && r < offsets[e + 1]; ++r) run(e, r);
  }

  void expect_forward() {
    u = Numbers(M, R), v = Numbers(M, R), y = Numbers(M, O), dropped = Numbers(M, K);
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t k = 0; k < K; ++k) dropped(m, k) = kept(m, k) ? x->get(m, k) : 0;
      each_rank(m, p.dense, [&](int64_t, int64_t r) {
        for (int64_t k = 0; k < K; ++k) u(m, r) += dropped(m, k) * read(A, r, k);
      });
      each_rank(m, false, [&](int64_t e, int64_t r) { v(m, r) = scaling[e] * gates(m, e) * u(m, r); });
      for (int64_t o = 0; o < O; ++o) {
        y(m, o) = has_base ? base->get(m, o) : 0;
        each_rank(m, false, [&](int64_t, int64_t r) { y(m, o) += v(m, r) * read(B, o, r); });
      }
    }
  }

  void expect_backward() {
    du = Numbers(M, R), dh = Numbers(M, N), dx = Numbers(M, K), dA = Numbers(R, K), dB = Numbers(O, R);
    drouter = Numbers(N, K), dbias = Numbers(1, N);
    for (int64_t m = 0; m < M; ++m) {
      each_rank(m, p.dense, [&](int64_t e, int64_t r) {
        Number t;
        for (int64_t o = 0; has_dy && o < O; ++o) t += Number(dy->get(m, o)) * read(B, o, r);
        dh(m, e) += scaling[e] * t * u(m, r);
        if (open(m, e)) du(m, r) = scaling[e] * gates(m, e) * t;
      });
      for (int64_t e = 0; has_router && e < N; ++e) {
        if (has_dgates) dh(m, e) += dgates->get(m, e);
        if (!open(m, e)) dh(m, e) = 0;
        dbias(0, e) += dh(m, e);
      }
      for (int64_t k = 0; k < K; ++k) {
        each_rank(m, false, [&](int64_t, int64_t r) {
          dA(r, k) += du(m, r) * dropped(m, k);
          if (kept(m, k)) dx(m, k) += du(m, r) * read(A, r, k);
        });
        for (int64_t e = 0; has_router && e < N; ++e) {
          dx(m, k) += dh(m, e) * read(router, e, k);
          drouter(e, k) += dh(m, e) * x->get(m, k);
        }
      }
      each_rank(m, false, [&](int64_t, int64_t r) {
        for (int64_t o = 0; has_dy && o < O; ++o) dB(o, r) += Number(dy->get(m, o)) * v(m, r);
      });
    }
  }

  // `precision`: the least precise type on the way.
  void check(const char* name, const Table& out, const Numbers& expected, DType precision, const std::string& run) const {
    const double below_normal = precision == DType::float16 ? 1e-5 : 0;  // steps of small halves do not get smaller
    for (int64_t r = 0; r < out.rows(); ++r)
      for (int64_t c = 0; c < out.columns(); ++c) {
        const Number& n = expected(r, c);
        const double got = out.get(r, c), tolerance = n.size > 0 ? type_of(precision).tolerance * n.size + below_normal : 0;
        if (std::fabs(got - n.value) <= tolerance) continue;
        std::printf("%s: %s[%lld, %lld] is %.17g, expected %.17g within %.3g\n", description(run).c_str(), name,
                    static_cast<long long>(r), static_cast<long long>(c), got, n.value, tolerance);
        std::exit(1);
      }
    if (out.numbers() == out.rows() * out.columns()) return;
    std::printf("%s: %s was written between its rows\n", description(run).c_str(), name);
    std::exit(1);
  }

  std::string description(const std::string& run) const {
    const char* names[] = {"float64", "float32", "float16", "bfloat16"};
    std::string text = "problem " + std::to_string(number_) + " (" + run + ", " + names[static_cast<int>(T)];
    for (int64_t size : {M, K, O, N, R}) text += ' ' + std::to_string(size);
    const std::pair<const char*, bool> options[] = {{"router", has_router},    {"bias", has_bias}, {"base", has_base},
                                                    {"in place", in_place},    {"dy", has_dy},     {"dgates", has_dgates},
                                                    {"dropout", p.dropout.on}, {"dense", p.dense}};
    for (const auto& [name, on] : options) text += on ? std::string(", ") + name : "";
    return text + ")";
  }

  int64_t number_;
  Random random;
  int64_t M, K, O, N, R;
  DType T, C, router_type = DType::float32;
  std::vector<int64_t> offsets = {0};
  std::vector<double> scaling;
  rode::Problem p;
  bool has_router, has_bias, has_base, in_place, has_dy, has_dgates;
  bool wants_dx, wants_dA, wants_dB, wants_drouter, wants_dbias;
  std::shared_ptr<Table> x;  // siblings share it
  std::optional<Table> A, B, router, bias, base, y_strides, dy, dgates;
  Numbers gates, dropped, u, v, y, du, dh, dx, dA, dB, drouter, dbias;
};

}  // namespace
