// pybind11 for the CUDA kernels: pointers in, nothing else. With RODE_EMULATE they run on the emulator, whose counts it shows as
// well.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../cuda/backward.h"
#include "../cuda/between.h"
#include "../cuda/types.cuh"
#include "owned_problem.h"

#ifdef RODE_EMULATE
#include "emulator.h"
#endif

namespace py = pybind11;
using rode::OwnedProblem;
using rode::gpu::bf16;
using rode::gpu::f16;
using Wide = std::tuple<bool, bool, bool>;  // whether A, router and B are float32 beside a 16-bit x

namespace {

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

// What `run` gives for a value of the type that x has.
template <class Run>
auto by_type(const rode::Problem& p, Run run) {
  switch (p.dtype) {
    case rode::DType::float32:
      return run(float{});
    case rode::DType::float16:
      return run(f16{});
    case rode::DType::bfloat16:
      return run(bf16{});
    case rode::DType::float64:
      break;
  }
  throw std::invalid_argument("no CUDA kernels for this dtype");
}

// Passes but for addresses and stream: made once for a layer and called many times, for the host takes longer to convert lists and
// names than to launch.
struct Forward : OwnedProblem {
  rode::cuda::Forward layout{};

  Forward(int dtype, int64_t tokens, int64_t in_features, int64_t out_features, const std::vector<int64_t>& ranks,
          const std::vector<double>& factors, double dropout_p, bool dense, int64_t ld_x, int64_t ld_base, int64_t ld_y,
          int64_t ld_A, int64_t ld_B, bool fused, int rows, int splits, int out_tiles, bool keep_v, int device)
      : OwnedProblem(dtype, tokens, in_features, out_features, ranks, factors, dropout_p, dense) {
    layout.x.row = ld_x, layout.base.row = ld_base, layout.y.row = ld_y;
    layout.x.column = layout.base.column = layout.y.column = 1;
    layout.ld_A = ld_A, layout.ld_B = ld_B;
    layout.plan = {fused, rows, splits, out_tiles, keep_v};
    layout.device = device;
  }

  void operator()(uintptr_t x, uintptr_t base, uintptr_t y, uintptr_t A, uintptr_t router, uintptr_t B, uintptr_t bias,
                  uintptr_t gates, uintptr_t u, uintptr_t g, uintptr_t partial, uintptr_t seed, bool fast, uintptr_t stream) const {
    rode::cuda::Forward a = layout;  // a copy: another thread may be in this call
    a.x.data = pointer<void>(x), a.base.data = pointer<void>(base), a.y.data = pointer<void>(y);
    a.A = pointer<void>(A), a.router = pointer<void>(router), a.B = pointer<void>(B);
    a.bias = pointer<float>(bias), a.gates = pointer<float>(gates), a.u = pointer<float>(u), a.g = pointer<float>(g);
    a.partial = pointer<float>(partial), a.seed = pointer<int64_t>(seed), a.fast = fast, a.stream = pointer<void>(stream);
    check(by_type(problem, [&](auto of) { return rode::cuda::forward<decltype(of)>(problem, a); }));
  }
};

struct Backward : OwnedProblem {
  rode::cuda::Backward layout{};

  Backward(int dtype, int64_t tokens, int64_t in_features, int64_t out_features, const std::vector<int64_t>& ranks,
           const std::vector<double>& factors, double dropout_p, bool dense, int64_t ld_x,
           const std::tuple<int64_t, int64_t>& ld_dy, int64_t ld_A, int64_t ld_B, const Wide& wide_parameters, bool wide, int slabs,
           int slab, int share_y, int groups, int share_x, int share_dx, int device)
      : OwnedProblem(dtype, tokens, in_features, out_features, ranks, factors, dropout_p, dense) {
    layout.dy = {nullptr, std::get<0>(ld_dy), std::get<1>(ld_dy)};
    layout.x = {nullptr, ld_x, 1};
    layout.ld_A = ld_A, layout.ld_B = ld_B;
    std::tie(layout.wide_A, layout.wide_W, layout.wide_B) = wide_parameters;
    layout.plan = {wide, slabs, slab, share_y, groups, share_x, share_dx};
    layout.device = device;
  }

  void operator()(uintptr_t dy, uintptr_t x, uintptr_t A, uintptr_t router, uintptr_t B, uintptr_t u, uintptr_t g, uintptr_t dgates,
                  uintptr_t seed, uintptr_t dx, uintptr_t dA, uintptr_t dW, uintptr_t dB, uintptr_t dbias, uintptr_t dh,
                  uintptr_t D, uintptr_t open, uintptr_t t, uintptr_t of_B, uintptr_t of_A, uintptr_t of_bias, bool fast,
                  uintptr_t stream) const {
    rode::cuda::Backward a = layout;
    a.dy.data = pointer<void>(dy), a.x.data = pointer<void>(x);
    a.A = pointer<void>(A), a.router = pointer<void>(router), a.B = pointer<void>(B);
    a.u = pointer<float>(u), a.g = pointer<float>(g), a.dgates = pointer<float>(dgates), a.seed = pointer<int64_t>(seed);
    a.dx = pointer<void>(dx), a.dA = pointer<void>(dA), a.dW = pointer<void>(dW), a.dB = pointer<void>(dB);
    a.dbias = pointer<float>(dbias), a.dh = pointer<float>(dh), a.D = pointer<void>(D), a.open = pointer<uint32_t>(open);
    a.t = pointer<float>(t), a.of_B = pointer<float>(of_B), a.of_A = pointer<float>(of_A), a.of_bias = pointer<float>(of_bias);
    a.fast = fast, a.stream = pointer<void>(stream);
    check(by_type(problem, [&](auto of) { return rode::cuda::backward<decltype(of)>(problem, a); }));
  }
};

struct Pack : OwnedProblem {
  rode::cuda::Pack layout{};

  Pack(int dtype, int64_t tokens, int64_t in_features, int64_t out_features, const std::vector<int64_t>& ranks,
       const std::vector<double>& factors, double dropout_p, bool dense, const Wide& wide_parameters, int64_t rows, int64_t pitch_K,
       int64_t pitch_R, int device)
      : OwnedProblem(dtype, tokens, in_features, out_features, ranks, factors, dropout_p, dense) {
    std::tie(layout.wide_A, layout.wide_router, layout.wide_B) = wide_parameters;
    layout.rows = rows, layout.pitch_K = pitch_K, layout.pitch_R = pitch_R, layout.device = device;
  }

  void operator()(uintptr_t A, uintptr_t router, uintptr_t B, uintptr_t to_W, uintptr_t to_B, uintptr_t stream) const {
    rode::cuda::Pack a = layout;
    a.A = pointer<void>(A), a.router = pointer<void>(router), a.B = pointer<void>(B);
    a.to_W = pointer<void>(to_W), a.to_B = pointer<void>(to_B), a.stream = pointer<void>(stream);
    check(by_type(problem, [&](auto of) { return rode::cuda::pack_parameters<decltype(of)>(problem, a); }));
  }
};

// Between products of a library, both ways. `columns` of sums and D, `pitch_R` of t and v: elements of a row.
struct Weigh : OwnedProblem {
  bool routed;
  int64_t columns, pitch_R;
  int device;

  Weigh(int dtype, int64_t tokens, int64_t in_features, int64_t out_features, const std::vector<int64_t>& ranks,
        const std::vector<double>& factors, double dropout_p, bool dense, bool routed, int64_t columns, int64_t pitch_R, int device)
      : OwnedProblem(dtype, tokens, in_features, out_features, ranks, factors, dropout_p, dense),
        routed(routed),
        columns(columns),
        pitch_R(pitch_R),
        device(device) {}

  void forward(uintptr_t sums, uintptr_t bias, uintptr_t gates, uintptr_t u, uintptr_t g, uintptr_t v, uintptr_t stream) const {
    const rode::cuda::Weigh a{pointer<float>(sums),
                              pointer<float>(bias),
                              pointer<float>(gates),
                              pointer<float>(u),
                              pointer<float>(g),
                              pointer<void>(v),
                              columns,
                              pitch_R,
                              device,
                              pointer<void>(stream)};
    check(by_type(problem, [&](auto of) { return rode::cuda::weigh<decltype(of)>(problem, a); }));
  }
  void backward(uintptr_t t, uintptr_t u, uintptr_t g, uintptr_t dgates, uintptr_t v, uintptr_t D, uintptr_t dh,
                uintptr_t stream) const {
    const rode::cuda::WeighBack a{pointer<float>(t),
                                  pointer<float>(u),
                                  pointer<float>(g),
                                  pointer<float>(dgates),
                                  pointer<void>(v),
                                  pointer<void>(D),
                                  pointer<float>(dh),
                                  routed,
                                  columns,
                                  pitch_R,
                                  device,
                                  pointer<void>(stream)};
    check(by_type(problem, [&](auto of) { return rode::cuda::weigh_back<decltype(of)>(problem, a); }));
  }
};

// The most bytes of shared memory that a launch of a plan asks for. `Rest`: the plan's fields, with their names.
template <class Plan, class... Rest, class... Names>
void define_shared_bytes(py::module_& m, const char* name, Names... names) {
  m.def(
      name,
      [](int dtype, int64_t tokens, int64_t in_features, int64_t out_features, int64_t total_rank, int64_t experts, bool routed,
         bool dropout, Rest... fields) {
        const Plan plan{fields...};
        rode::Problem p;
        p.dtype = static_cast<rode::DType>(dtype);
        p.tokens = tokens, p.in_features = in_features, p.out_features = out_features;
        p.total_rank = total_rank, p.experts = experts;
        p.dropout.on = dropout;
        return by_type(p, [&](auto of) { return rode::cuda::shared_bytes<decltype(of)>(p, routed, plan); });
      },
      py::kw_only(), py::arg("dtype"), py::arg("tokens"), py::arg("in_features"), py::arg("out_features"), py::arg("total_rank"),
      py::arg("experts"), py::arg("routed"), py::arg("dropout"), py::arg(names)...);
}

// The constructor's arguments that every class has first, with their names.
template <class Class, class... Rest, class... Names>
void define_init(py::class_<Class>& c, Names... names) {
  c.def(py::init<int, int64_t, int64_t, int64_t, const std::vector<int64_t>&, const std::vector<double>&, double, bool, Rest...>(),
        py::kw_only(), py::arg("dtype"), py::arg("tokens"), py::arg("in_features"), py::arg("out_features"), py::arg("ranks"),
        py::arg("scaling"), py::arg("dropout_p"), py::arg("dense"), py::arg(names)...);
}

}  // namespace

PYBIND11_MODULE(RODE_MODULE, m) {
  m.doc() = "CUDA kernels of rode_kernels: takes device addresses of memory that the caller owns.";
  using NoGil = py::call_guard<py::gil_scoped_release>;
  auto forward = py::class_<Forward>(m, "Forward", py::module_local());
  define_init<Forward, int64_t, int64_t, int64_t, int64_t, int64_t, bool, int, int, int, bool, int>(
      forward, "ld_x", "ld_base", "ld_y", "ld_A", "ld_B", "fused", "rows", "splits", "out_tiles", "keep_v", "device");
  forward.def("__call__", &Forward::operator(), NoGil());
  auto backward = py::class_<Backward>(m, "Backward", py::module_local());
  define_init<Backward, int64_t, const std::tuple<int64_t, int64_t>&, int64_t, int64_t, const Wide&, bool, int, int, int, int, int,
              int, int>(backward, "ld_x", "ld_dy", "ld_A", "ld_B", "wide_parameters", "wide", "slabs", "slab", "share_y", "groups",
                        "share_x", "share_dx", "device");
  backward.def("__call__", &Backward::operator(), NoGil());
  auto pack = py::class_<Pack>(m, "Pack", py::module_local());
  define_init<Pack, const Wide&, int64_t, int64_t, int64_t, int>(pack, "wide_parameters", "rows", "pitch_K", "pitch_R", "device");
  pack.def("__call__", &Pack::operator(), NoGil());
  auto weigh = py::class_<Weigh>(m, "Weigh", py::module_local());
  define_init<Weigh, bool, int64_t, int64_t, int>(weigh, "routed", "columns", "pitch_R", "device");
  weigh.def("forward", &Weigh::forward, NoGil()).def("backward", &Weigh::backward, NoGil());
  define_shared_bytes<rode::cuda::Plan, bool, int, int, int, bool>(m, "forward_shared_bytes", "fused", "rows", "splits", "out_tiles",
                                                                   "keep_v");
  define_shared_bytes<rode::cuda::BackwardPlan, bool, int, int, int, int, int, int>(
      m, "backward_shared_bytes", "wide", "slabs", "slab", "share_y", "groups", "share_x", "share_dx");
  m.def("load_kernels", [](int device) {
    check(rode::cuda::load_kernels<float>(device));
    check(rode::cuda::load_kernels<f16>(device));
    check(rode::cuda::load_kernels<bf16>(device));
    check(rode::cuda::load_backward_kernels<float>(device));
    check(rode::cuda::load_backward_kernels<f16>(device));
    check(rode::cuda::load_backward_kernels<bf16>(device));
    check(rode::cuda::load_between_kernels<float>(device));
    check(rode::cuda::load_between_kernels<f16>(device));
    check(rode::cuda::load_between_kernels<bf16>(device));
  });
#ifdef RODE_EMULATE
  rode::emulator::bind(m);
#else
  m.def("driver_version", &rode::cuda::driver_version);
  m.def("runtime_version", &rode::cuda::runtime_version);
  m.def("max_shared", [](int device) {
    int bytes = 0;
    check(rode::cuda::max_shared(device, bytes));
    return bytes;
  });
  m.attr("ARCHITECTURES") = RODE_CUDA_ARCHS;
#endif
}
