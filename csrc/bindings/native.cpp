// pybind11 for the CPU core: pointers in, nothing else. The callers in rode_kernels have checked every argument.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/scratch.h"
#include "owned_problem.h"

namespace py = pybind11;
using Strided = std::tuple<uintptr_t, int64_t, int64_t>;  // address, row stride, column stride
using StridedWeight = std::tuple<uintptr_t, int64_t, int64_t, bool>;  // and whether in the accumulation type

namespace {

uint64_t seed_at(uintptr_t address) { return static_cast<uint64_t>(*reinterpret_cast<const int64_t*>(address)); }

rode::Matrix matrix(const Strided& s) {
  return {reinterpret_cast<void*>(std::get<0>(s)), std::get<1>(s), std::get<2>(s)};
}
rode::Weight weight(const StridedWeight& s) {
  rode::Weight w;
  w.data = reinterpret_cast<void*>(std::get<0>(s)), w.row = std::get<1>(s), w.column = std::get<2>(s), w.wide = std::get<3>(s);
  return w;
}
void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// A forward pass but for addresses, seed and threads: those that it is made with are ignored. Made once for a layer and called many
// times, for with one token it takes longer to convert lists and tuples than to do the work.
struct PreparedForward : rode::OwnedProblem {
  rode::Forward layout;

  PreparedForward(int dtype, int64_t tokens, int64_t in_features, int64_t out_features, const std::vector<int64_t>& ranks,
                  const std::vector<double>& factors, double dropout_p, bool dense, const Strided& x, const Strided& base,
                  const Strided& y, const StridedWeight& A, const StridedWeight& B, const StridedWeight& router)
      : OwnedProblem(dtype, tokens, in_features, out_features, ranks, factors, dropout_p, dense),
        layout{matrix(x), matrix(base), matrix(y), weight(A), weight(B), weight(router), nullptr, nullptr, nullptr} {}

  void operator()(uintptr_t x, uintptr_t base, uintptr_t y, uintptr_t A, uintptr_t B, uintptr_t router, uintptr_t router_bias,
                  uintptr_t u, uintptr_t g, uintptr_t seed, int threads) const {
    rode::Problem p = problem;  // copies: another thread may be in this call
    rode::Forward f = layout;
    p.threads = threads;
    if (p.dropout.on) p.dropout.seed = seed_at(seed);
    f.x.data = pointer(x), f.base.data = pointer(base), f.y.data = pointer(y);
    f.A.data = pointer(A), f.B.data = pointer(B), f.router.data = pointer(router);
    f.router_bias = pointer(router_bias), f.u = pointer(u), f.g = pointer(g);
    rode::forward(p, f);
  }
};

// A backward pass, likewise. dx is contiguous; what nobody asks for has no address.
struct PreparedBackward : rode::OwnedProblem {
  rode::Backward layout;

  PreparedBackward(int dtype, int64_t tokens, int64_t in_features, int64_t out_features, const std::vector<int64_t>& ranks,
                   const std::vector<double>& factors, double dropout_p, bool dense, const Strided& dy, const Strided& x,
                   const StridedWeight& A, const StridedWeight& B, const StridedWeight& router)
      : OwnedProblem(dtype, tokens, in_features, out_features, ranks, factors, dropout_p, dense), layout{} {
    layout.dy = matrix(dy), layout.x = matrix(x), layout.dx = {nullptr, in_features, 1};
    layout.A = weight(A), layout.B = weight(B), layout.router = weight(router);
  }

  void operator()(uintptr_t dy, uintptr_t x, uintptr_t dx, uintptr_t dgates, uintptr_t u, uintptr_t g, uintptr_t A, uintptr_t B,
                  uintptr_t router, uintptr_t v, uintptr_t du, uintptr_t dh, uintptr_t dA, uintptr_t dB, uintptr_t drouter,
                  uintptr_t dbias, uintptr_t seed, int threads) const {
    rode::Problem p = problem;
    rode::Backward b = layout;
    p.threads = threads;
    if (p.dropout.on) p.dropout.seed = seed_at(seed);
    b.dy.data = pointer(dy), b.x.data = pointer(x), b.dx.data = pointer(dx), b.dgates = pointer(dgates);
    b.u = pointer(u), b.g = pointer(g);
    b.A.data = pointer(A), b.B.data = pointer(B), b.router.data = pointer(router);
    b.v = pointer(v), b.du = pointer(du), b.dh = pointer(dh);
    b.dA = pointer(dA), b.dB = pointer(dB), b.drouter = pointer(drouter), b.dbias = pointer(dbias);
    rode::backward(p, b);
  }
};

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native core of rode_kernels: takes addresses of memory that the caller owns.";
  py::class_<PreparedForward>(m, "Forward", py::module_local())
      .def(py::init<int, int64_t, int64_t, int64_t, const std::vector<int64_t>&, const std::vector<double>&, double, bool,
                    const Strided&, const Strided&, const Strided&, const StridedWeight&, const StridedWeight&,
                    const StridedWeight&>(),
           py::kw_only(), py::arg("dtype"), py::arg("tokens"), py::arg("in_features"), py::arg("out_features"),
           py::arg("ranks"), py::arg("scaling"), py::arg("dropout_p"), py::arg("dense"), py::arg("x"), py::arg("base"),
           py::arg("y"), py::arg("A"), py::arg("B"), py::arg("router"))
      .def("__call__", &PreparedForward::operator(), py::call_guard<py::gil_scoped_release>());
  py::class_<PreparedBackward>(m, "Backward", py::module_local())
      .def(py::init<int, int64_t, int64_t, int64_t, const std::vector<int64_t>&, const std::vector<double>&, double, bool,
                    const Strided&, const Strided&, const StridedWeight&, const StridedWeight&, const StridedWeight&>(),
           py::kw_only(), py::arg("dtype"), py::arg("tokens"), py::arg("in_features"), py::arg("out_features"),
           py::arg("ranks"), py::arg("scaling"), py::arg("dropout_p"), py::arg("dense"), py::arg("dy"), py::arg("x"),
           py::arg("A"), py::arg("B"), py::arg("router"))
      .def("__call__", &PreparedBackward::operator(), py::call_guard<py::gil_scoped_release>());
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
