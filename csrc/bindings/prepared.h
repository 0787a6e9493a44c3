// Passes prepared for Python but for addresses: made once for a layer and called many times, because converting lists, tuples and
// names takes the host longer than a launch, or than the work of one token.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "../problem.h"

namespace rode {

inline uint64_t dropout_threshold(double p) { return static_cast<uint64_t>(std::floor(std::ldexp(p, 32))); }

// A Problem together with the arrays it points to.
struct OwnedProblem {
  std::vector<int64_t> offsets;
  std::vector<double> scaling;
  Problem problem;

  OwnedProblem(int dtype, int64_t tokens, int64_t in_features, int64_t out_features, const std::vector<int64_t>& ranks,
               const std::vector<double>& factors, double dropout_p, bool dense)
      : offsets{0}, scaling(factors) {
    for (int64_t rank : ranks) offsets.push_back(offsets.back() + rank);
    problem.dtype = static_cast<DType>(dtype);
    problem.tokens = tokens;
    problem.in_features = in_features;
    problem.out_features = out_features;
    problem.experts = static_cast<int64_t>(ranks.size());
    problem.total_rank = offsets.back();
    problem.offsets = offsets.data();
    problem.scaling = scaling.data();
    problem.dense = dense;
    problem.dropout.on = dropout_p > 0.0;
    problem.dropout.threshold = dropout_threshold(dropout_p);
  }
  OwnedProblem(const OwnedProblem&) = delete;  // the problem points into this object
};

// A problem and what else is known before the addresses.
template <class Layout>
struct Prepared : OwnedProblem {
  using OwnedProblem::OwnedProblem;
  Layout layout{};
};

template <class Layout>
using Class = pybind11::class_<Prepared<Layout>>;

// A field and the keyword that fills it.
template <class Owner, class Type>
struct Field {
  const char* name;
  Type Owner::* member;
};
template <class Owner, class Type>
Field<Owner, Type> field(const char* name, Type Owner::* member) {
  return {name, member};
}

// How a field's value comes from Python, and becomes the field's.
template <class Type>
struct Keyword {
  using Given = Type;
  static Type stored(const Given& given) { return given; }
};

// The constructor: keywords of the problem, then of `fields`.
template <class Layout, class... Owner, class... Type>
void define_init(Class<Layout>& c, Field<Owner, Type>... fields) {
  using pybind11::arg;
  c.def(pybind11::init([fields...](int dtype, int64_t tokens, int64_t in_features, int64_t out_features,
                                   const std::vector<int64_t>& ranks, const std::vector<double>& scaling, double dropout_p,
                                   bool dense, const typename Keyword<Type>::Given&... given) {
          auto made =
              std::make_unique<Prepared<Layout>>(dtype, tokens, in_features, out_features, ranks, scaling, dropout_p, dense);
          ((made->layout.*fields.member = Keyword<Type>::stored(given)), ...);
          return made;
        }),
        pybind11::kw_only(), arg("dtype"), arg("tokens"), arg("in_features"), arg("out_features"), arg("ranks"), arg("scaling"),
        arg("dropout_p"), arg("dense"), arg(fields.name)...);
}

// A call's argument for a field: an address or a count, except for flags.
template <class Type>
using Argument = std::conditional_t<std::is_same_v<Type, bool>, bool, uintptr_t>;
inline void set(bool& flag, bool value) { flag = value; }
inline void set(int64_t& count, uintptr_t value) { count = static_cast<int64_t>(value); }
inline void set(Matrix& matrix, uintptr_t address) { matrix.data = reinterpret_cast<void*>(address); }
template <class T>
void set(T*& pointer, uintptr_t address) {
  pointer = reinterpret_cast<T*>(address);
}

// A method that fills the fields `member` of Arrays, in this order, and hands them to run(problem, arrays, more...).
template <class Arrays, class... More, class Layout, class Run, class... Owner, class... Type>
void define_call(Class<Layout>& c, const char* name, Run run, Type Owner::*... member) {
  c.def(
      name,
      [run, member...](const Prepared<Layout>& self, Argument<Type>... argument, More... more) {
        Arrays arrays{self.layout};  // a copy: another thread may be in this call
        (set(arrays.*member, argument), ...);
        run(self.problem, arrays, more...);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace rode
