// Bindings of the CUDA kernels, which take pointers and sizes. With RODE_EMULATE the kernels run on the emulator, and its counts
// are bound too.
#include <stdexcept>
#include <string>

#include "../cuda/backward.h"
#include "../cuda/gates.h"
#include "../cuda/types.cuh"
#include "prepared.h"

#ifdef RODE_EMULATE
#include "emulator.h"
#endif

namespace py = pybind11;
using rode::gpu::bf16;
using rode::gpu::f16;

namespace {

void check(const rode::cuda::Status& status) {
  if (status.error == 0) return;
#ifdef RODE_EMULATE
  throw std::runtime_error(status.kernel);
#else
  throw std::runtime_error(std::string("rode_kernels: CUDA kernel ") + status.kernel +
                           " failed: " + rode::cuda::error_text(status.error) + " (error " + std::to_string(status.error) + ")");
#endif
}

// The result of `run` for a value of x's type.
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

// Lists of fields as arguments that follow others: keywords with their fields, or fields alone. `Owner` is the struct.
#define RODE_KEYWORD(type, name) , rode::field(#name, &Owner::name)
#define RODE_MEMBER(type, name) , &Owner::name

// The most bytes of shared memory that a launch of a plan asks for, by the problem's sizes and the plan's fields.
template <class Plan, class... Type>
void define_shared_bytes(py::module_& m, const char* name, rode::Field<Plan, Type>... fields) {
  m.def(
      name,
      [fields...](int dtype, int64_t tokens, int64_t in_features, int64_t out_features, int64_t total_rank, int64_t experts,
                  bool routed, bool dropout, int masks, Type... value) {
        Plan plan;
        ((plan.*fields.member = value), ...);
        rode::Problem p;
        p.dtype = static_cast<rode::DType>(dtype);
        p.tokens = tokens, p.in_features = in_features, p.out_features = out_features;
        p.total_rank = total_rank, p.experts = experts;
        p.dropout.on = dropout;
        return by_type(p, [&](auto of) { return rode::cuda::shared_bytes<decltype(of)>(p, routed, plan, masks); });
      },
      py::kw_only(), py::arg("dtype"), py::arg("tokens"), py::arg("in_features"), py::arg("out_features"), py::arg("total_rank"),
      py::arg("experts"), py::arg("routed"), py::arg("dropout"), py::arg("masks"), py::arg(fields.name)...);
}

// `launch(problem, arrays, value of x's type)` with its errors as exceptions.
template <class Launch>
auto checked(Launch launch) {
  return
      [launch](const rode::Problem& p, const auto& arrays) { check(by_type(p, [&](auto of) { return launch(p, arrays, of); })); };
}
#define RODE_LAUNCH(function) \
  checked([](const rode::Problem& p, const auto& arrays, auto of) { return rode::cuda::function<decltype(of)>(p, arrays); })

void define_forward(py::module_& m) {
  using Owner = rode::cuda::ForwardLaunch;
  rode::Class<rode::cuda::ForwardLayout> c(m, "ForwardLaunch", py::module_local());
  rode::define_init(c RODE_FORWARD_LAYOUT(RODE_KEYWORD) RODE_FORWARD_PLAN(RODE_KEYWORD));
  rode::define_init(c RODE_FORWARD_LAYOUT(RODE_KEYWORD) RODE_FORWARD_PLAN(RODE_KEYWORD) RODE_FORWARD_SIBLING(RODE_KEYWORD));
  rode::define_call<Owner>(c, "shrink", RODE_LAUNCH(shrink) RODE_FORWARD_CALL(RODE_MEMBER));
  rode::define_call<Owner>(c, "expand", RODE_LAUNCH(expand) RODE_FORWARD_CALL(RODE_MEMBER));
  rode::define_call<Owner>(c, "__call__", RODE_LAUNCH(forward) RODE_FORWARD_CALL(RODE_MEMBER));
  define_shared_bytes<rode::cuda::Plan>(m, "forward_shared_bytes" RODE_FORWARD_PLAN(RODE_KEYWORD));
}

void define_backward(py::module_& m) {
  using Owner = rode::cuda::BackwardLaunch;
  rode::Class<rode::cuda::BackwardLayout> c(m, "BackwardLaunch", py::module_local());
  rode::define_init(c RODE_BACKWARD_LAYOUT(RODE_KEYWORD) RODE_BACKWARD_PLAN(RODE_KEYWORD));
  rode::define_init(c RODE_BACKWARD_LAYOUT(RODE_KEYWORD) RODE_BACKWARD_PLAN(RODE_KEYWORD) RODE_BACKWARD_SIBLING(RODE_KEYWORD));
  rode::define_call<Owner>(c, "grad_output", RODE_LAUNCH(grad_output) RODE_BACKWARD_CALL(RODE_MEMBER));
  rode::define_call<Owner>(c, "grad_input", RODE_LAUNCH(grad_input) RODE_BACKWARD_CALL(RODE_MEMBER));
  rode::define_call<Owner>(c, "reduce", RODE_LAUNCH(reduce) RODE_BACKWARD_CALL(RODE_MEMBER));
  rode::define_call<Owner>(c, "__call__", RODE_LAUNCH(backward) RODE_BACKWARD_CALL(RODE_MEMBER));
  define_shared_bytes<rode::cuda::BackwardPlan>(m, "backward_shared_bytes" RODE_BACKWARD_PLAN(RODE_KEYWORD));
}

void define_pack(py::module_& m) {
  using Owner = rode::cuda::Pack;
  rode::Class<rode::cuda::PackLayout> c(m, "Pack", py::module_local());
  rode::define_init(c RODE_PACK_LAYOUT(RODE_KEYWORD));
  rode::define_init(c RODE_PACK_LAYOUT(RODE_KEYWORD) RODE_PACK_SIBLING(RODE_KEYWORD));
  rode::define_call<Owner>(c, "__call__", RODE_LAUNCH(pack_parameters) RODE_PACK_CALL(RODE_MEMBER));
}

void define_drop(py::module_& m) {
  using Owner = rode::cuda::Drop;
  rode::Class<rode::cuda::DropLayout> c(m, "Drop", py::module_local());
  rode::define_init(c RODE_DROP_LAYOUT(RODE_KEYWORD));
  rode::define_call<Owner>(c, "__call__", RODE_LAUNCH(drop_rows) RODE_DROP_CALL(RODE_MEMBER));
}

void define_gates(py::module_& m) {
  rode::Class<rode::cuda::GatesLayout> c(m, "ApplyGates", py::module_local());
  {
    using Owner = rode::cuda::ApplyGates;
    rode::define_init(c RODE_GATES_LAYOUT(RODE_KEYWORD));
    rode::define_call<Owner>(c, "forward", RODE_LAUNCH(apply_gates) RODE_APPLY_GATES_CALL(RODE_MEMBER));
  }
  using Owner = rode::cuda::ApplyGatesBackward;
  rode::define_call<Owner>(c, "backward", RODE_LAUNCH(apply_gates_backward) RODE_APPLY_GATES_BACKWARD_CALL(RODE_MEMBER));
}

template <class T>
void load_kernels(int device) {
  check(rode::cuda::load_kernels<T>(device));
  check(rode::cuda::load_backward_kernels<T>(device));
  check(rode::cuda::load_gate_kernels<T>(device));
}

}  // namespace

PYBIND11_MODULE(RODE_MODULE, m) {
  m.doc() = "CUDA kernels of rode_kernels: takes device addresses of memory that the caller owns.";
  define_forward(m);
  define_backward(m);
  define_pack(m);
  define_drop(m);
  define_gates(m);
  m.def("load_kernels", [](int device) {
    load_kernels<float>(device);
    load_kernels<f16>(device);
    load_kernels<bf16>(device);
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
