// Bindings of the CPU core, which takes pointers and sizes. The callers in rode_kernels have checked every argument.
#include <array>
#include <tuple>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/scratch.h"
#include "prepared.h"
#include "unchanged.h"

namespace py = pybind11;
using Strided = std::tuple<uintptr_t, int64_t, int64_t>;  // address, row stride, column stride
using StridedWeight = std::tuple<uintptr_t, int64_t, int64_t, bool>;  // and whether in the accumulation type

template <>
struct rode::Keyword<rode::Matrix> {
  using Given = Strided;
  static rode::Matrix stored(const Given& s) { return {reinterpret_cast<void*>(std::get<0>(s)), std::get<1>(s), std::get<2>(s)}; }
};
template <>
struct rode::Keyword<rode::Weight> {
  using Given = StridedWeight;
  static rode::Weight stored(const Given& s) {
    const auto& [data, row, column, in_acc_dtype] = s;
    return {{reinterpret_cast<void*>(data), row, column}, in_acc_dtype};
  }
};

namespace {

// `p` with what a call gives.
rode::Problem called(rode::Problem p, uintptr_t seed, int threads) {
  p.threads = threads;
  if (p.dropout.on) p.dropout.seed = static_cast<uint64_t>(*reinterpret_cast<const int64_t*>(seed));
  return p;
}

// Several passes that read the same x, run together. Arguments: the prepared passes, what a call of each would be given but for the
// number of threads, and that number. `fields`: those of a call, in its order.
template <class Arrays, class... Owner, class... Type>
void define_siblings(py::module_& m, const char* name, void (*run)(const rode::Problem*, const Arrays*, int64_t),
                     Type Owner::*... fields) {
  using Called = std::array<uintptr_t, sizeof...(fields) + 1>;
  m.def(
      name,
      [run, fields...](const std::vector<const rode::Prepared<Arrays>*>& passes, const std::vector<Called>& calls, int threads) {
        std::vector<rode::Problem> problems;
        std::vector<Arrays> arrays;
        for (size_t j = 0; j < passes.size(); ++j) {
          Arrays a{passes[j]->layout};
          size_t i = 0;
          (rode::set(a.*fields, calls.at(j)[i++]), ...);
          if constexpr (requires { a.dx; }) a.dx.row = passes[j]->problem.in_features, a.dx.column = 1;
          arrays.push_back(a);
          problems.push_back(called(passes[j]->problem, calls[j][i], threads));
        }
        run(problems.data(), arrays.data(), static_cast<int64_t>(passes.size()));
      },
      py::call_guard<py::gil_scoped_release>());
}

// Addresses among the keywords are ignored.
void define_forward(py::module_& m) {
  using F = rode::ForwardArrays;
  using rode::field;
  rode::Class<F> c(m, "ForwardArrays", py::module_local());
  rode::define_init(c, field("x", &F::x), field("base", &F::base), field("y", &F::y), field("A", &F::A), field("B", &F::B),
                    field("router_weight", &F::router_weight));
  const auto run = [](const rode::Problem& p, const F& a, uintptr_t seed, int threads) {
    rode::forward(called(p, seed, threads), a);
  };
  rode::define_call<F, uintptr_t, int>(c, "__call__", run, &F::x, &F::base, &F::y, &F::A, &F::B, &F::router_weight,
                                       &F::router_bias, &F::u, &F::g);
  define_siblings(m, "forward_siblings", rode::forward_siblings, &F::x, &F::base, &F::y, &F::A, &F::B, &F::router_weight,
                  &F::router_bias, &F::u, &F::g);
}

// dx is contiguous; a gradient that nobody asks for has no address.
void define_backward(py::module_& m) {
  using F = rode::BackwardArrays;
  using rode::field;
  rode::Class<F> c(m, "BackwardArrays", py::module_local());
  rode::define_init(c, field("dy", &F::dy), field("x", &F::x), field("A", &F::A), field("B", &F::B),
                    field("router_weight", &F::router_weight));
  const auto run = [](const rode::Problem& p, F& a, uintptr_t seed, int threads) {
    a.dx.row = p.in_features, a.dx.column = 1;
    rode::backward(called(p, seed, threads), a);
  };
  rode::define_call<F, uintptr_t, int>(c, "__call__", run, &F::dy, &F::x, &F::dx, &F::dgates, &F::u, &F::g, &F::A, &F::B,
                                       &F::router_weight, &F::v, &F::du, &F::dh, &F::dA, &F::dB, &F::drouter_weight, &F::dbias);
  define_siblings(m, "backward_siblings", rode::backward_siblings, &F::dy, &F::x, &F::dx, &F::dgates, &F::u, &F::g, &F::A, &F::B,
                  &F::router_weight, &F::v, &F::du, &F::dh, &F::dA, &F::dB, &F::drouter_weight, &F::dbias);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native core of rode_kernels: takes addresses of memory that the caller owns.";
  define_forward(m);
  define_backward(m);
  py::class_<rode::Unchanged>(m, "Unchanged", py::module_local())
      .def(py::init<const rode::Unchanged::Items&, const rode::Unchanged::Attributes&, const rode::Unchanged::Functions&>())
      .def("__call__", &rode::Unchanged::holds);
  m.def("keep_mask", [](int64_t seed, double p, uint64_t first, int64_t n) {
    std::vector<float> out(n);
    rode::keep_mask({true, static_cast<uint64_t>(seed), rode::dropout_threshold(p)}, first, n, out.data());
    return out;
  });
  m.def("set_isa", &rode::set_isa);
  m.def("isa", &rode::isa);
  m.def("has_openmp", &rode::has_openmp);
  m.def("scratch_bytes", &rode::scratch_bytes);
}
