// pybind11 for the CUDA kernels: pointers in, nothing else. With RODE_EMULATE they run on the emulator, whose counts it shows as
// well.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cuda/backward.h"
#include "cuda/types.cuh"
#include "owned_problem.h"

#ifdef RODE_EMULATE
#include "emulator/bindings.h"
#endif

namespace py = pybind11;
using Rows = std::tuple<uintptr_t, int64_t>;  // address, distance of rows in elements
using rode::OwnedProblem;
using rode::gpu::bf16;
using rode::gpu::f16;

namespace {

rode::Matrix matrix(const Rows& s) { return {reinterpret_cast<void*>(std::get<0>(s)), std::get<1>(s), 1}; }
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(const rode::cuda::Status& status) {
  if (status.error == 0) return;
#ifdef RODE_EMULATE
  throw std::runtime_error(status.kernel);
#else
  throw std::runtime_error(std::string("rode_kernels: CUDA kernel ") + status.kernel +
                           " failed: " + rode::cuda::error_text(status.error) + " (error " + std::to_string(status.error) + ")");
#endif
}

void forward(const OwnedProblem& p, const Rows& x, const Rows& base, const Rows& y, uintptr_t A, uintptr_t router, uintptr_t B,
             int64_t ld_A, int64_t ld_B, uintptr_t bias, uintptr_t gates, uintptr_t u, uintptr_t g, uintptr_t partial,
             uintptr_t seed, bool fast, bool fused, int rows, int splits, int out_tiles, int device, uintptr_t stream) {
  const rode::cuda::Forward a{matrix(x),
                              matrix(base),
                              matrix(y),
                              pointer<void>(A),
                              pointer<void>(router),
                              pointer<void>(B),
                              ld_A,
                              ld_B,
                              pointer<float>(bias),
                              pointer<float>(gates),
                              pointer<float>(u),
                              pointer<float>(g),
                              pointer<float>(partial),
                              pointer<int64_t>(seed),
                              fast,
                              {fused, rows, splits, out_tiles},
                              device,
                              pointer<void>(stream)};
  switch (p.problem.dtype) {
    case rode::DType::float32:
      return check(rode::cuda::forward<float>(p.problem, a));
    case rode::DType::float16:
      return check(rode::cuda::forward<f16>(p.problem, a));
    case rode::DType::bfloat16:
      return check(rode::cuda::forward<bf16>(p.problem, a));
    case rode::DType::float64:
      break;
  }
  throw std::invalid_argument("no CUDA kernels for this dtype");
}

using Strided = std::tuple<uintptr_t, int64_t, int64_t>;  // address, distances of rows and of columns
using Gradient = std::tuple<uintptr_t, bool>;             // address, whether it is float32 instead of x's type

void backward(const OwnedProblem& p, const Strided& dy, const Rows& x, uintptr_t A, uintptr_t router, uintptr_t B, int64_t ld_A,
              int64_t ld_B, uintptr_t u, uintptr_t g, uintptr_t dgates, uintptr_t seed, uintptr_t dx, const Gradient& dA,
              const Gradient& dW, const Gradient& dB, uintptr_t dbias, uintptr_t dh, uintptr_t D, uintptr_t open, uintptr_t t,
              uintptr_t of_B, uintptr_t of_A, uintptr_t of_bias, bool fast, bool wide, int slabs, int slab, int share_y, int groups,
              int share_x, int share_dx, int device, uintptr_t stream) {
  const rode::cuda::Backward a{{pointer<void>(std::get<0>(dy)), std::get<1>(dy), std::get<2>(dy)},
                               matrix(x),
                               pointer<void>(A),
                               pointer<void>(router),
                               pointer<void>(B),
                               ld_A,
                               ld_B,
                               pointer<float>(u),
                               pointer<float>(g),
                               pointer<float>(dgates),
                               pointer<int64_t>(seed),
                               pointer<void>(dx),
                               pointer<void>(std::get<0>(dA)),
                               pointer<void>(std::get<0>(dW)),
                               pointer<void>(std::get<0>(dB)),
                               std::get<1>(dA),
                               std::get<1>(dW),
                               std::get<1>(dB),
                               pointer<float>(dbias),
                               pointer<float>(dh),
                               pointer<void>(D),
                               pointer<uint32_t>(open),
                               pointer<float>(t),
                               pointer<float>(of_B),
                               pointer<float>(of_A),
                               pointer<float>(of_bias),
                               fast,
                               {wide, slabs, slab, share_y, groups, share_x, share_dx},
                               device,
                               pointer<void>(stream)};
  switch (p.problem.dtype) {
    case rode::DType::float32:
      return check(rode::cuda::backward<float>(p.problem, a));
    case rode::DType::float16:
      return check(rode::cuda::backward<f16>(p.problem, a));
    case rode::DType::bfloat16:
      return check(rode::cuda::backward<bf16>(p.problem, a));
    case rode::DType::float64:
      break;
  }
  throw std::invalid_argument("no CUDA kernels for this dtype");
}

void cast_parameters(const OwnedProblem& p, uintptr_t A, uintptr_t router, uintptr_t B, uintptr_t to_A, uintptr_t to_router,
                     uintptr_t to_B, int device, uintptr_t stream) {
  const rode::cuda::Cast a{pointer<float>(A),
                           pointer<float>(router),
                           pointer<float>(B),
                           pointer<void>(to_A),
                           pointer<void>(to_router),
                           pointer<void>(to_B),
                           device,
                           pointer<void>(stream)};
  check(p.problem.dtype == rode::DType::float16 ? rode::cuda::cast_parameters<f16>(p.problem, a)
                                                : rode::cuda::cast_parameters<bf16>(p.problem, a));
}

}  // namespace

PYBIND11_MODULE(RODE_MODULE, m) {
  m.doc() = "CUDA kernels of rode_kernels: takes device addresses of memory that the caller owns.";
  py::class_<OwnedProblem>(m, "Problem", py::module_local())
      .def(py::init<int, int64_t, int64_t, int64_t, const std::vector<int64_t>&, const std::vector<double>&, double, bool>(),
           py::kw_only(), py::arg("dtype"), py::arg("tokens"), py::arg("in_features"), py::arg("out_features"), py::arg("ranks"),
           py::arg("scaling"), py::arg("dropout_p"), py::arg("dense"));
  m.def("forward", &forward, py::kw_only(), py::arg("problem"), py::arg("x"), py::arg("base"), py::arg("y"), py::arg("A"),
        py::arg("router"), py::arg("B"), py::arg("ld_A"), py::arg("ld_B"), py::arg("bias"), py::arg("gates"), py::arg("u"),
        py::arg("g"), py::arg("partial"), py::arg("seed"), py::arg("fast"), py::arg("fused"), py::arg("rows"), py::arg("splits"),
        py::arg("out_tiles"), py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def("backward", &backward, py::kw_only(), py::arg("problem"), py::arg("dy"), py::arg("x"), py::arg("A"), py::arg("router"),
        py::arg("B"), py::arg("ld_A"), py::arg("ld_B"), py::arg("u"), py::arg("g"), py::arg("dgates"), py::arg("seed"),
        py::arg("dx"), py::arg("dA"), py::arg("dW"), py::arg("dB"), py::arg("dbias"), py::arg("dh"), py::arg("D"),
        py::arg("open"), py::arg("t"), py::arg("of_B"), py::arg("of_A"), py::arg("of_bias"), py::arg("fast"), py::arg("wide"),
        py::arg("slabs"), py::arg("slab"), py::arg("share_y"), py::arg("groups"), py::arg("share_x"), py::arg("share_dx"),
        py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def("cast_parameters", &cast_parameters, py::call_guard<py::gil_scoped_release>());
  m.def("load_kernels", [](int device) {
    check(rode::cuda::load_kernels<float>(device));
    check(rode::cuda::load_kernels<f16>(device));
    check(rode::cuda::load_kernels<bf16>(device));
    check(rode::cuda::load_backward_kernels<float>(device));
    check(rode::cuda::load_backward_kernels<f16>(device));
    check(rode::cuda::load_backward_kernels<bf16>(device));
  });
#ifdef RODE_EMULATE
  rode::emulator::bind(m);
#else
  m.def("driver_version", &rode::cuda::driver_version);
  m.def("runtime_version", &rode::cuda::runtime_version);
  m.attr("ARCHITECTURES") = RODE_CUDA_ARCHS;
#endif
}
