// Bindings that run the trial's kernels on the emulator, on memory that Python owns.
#include <pybind11/pybind11.h>

#include "../../csrc/bindings/emulator.h"
#include "kernels.cuh"

namespace py = pybind11;
using namespace rode::trial;

namespace {

template <class T>
gmem<T> at(uintptr_t address, int64_t count) {
  return gmem<T>(reinterpret_cast<T*>(address), count);
}

template <class T>
void run_product(uintptr_t x, uintptr_t w, uintptr_t y, Shape p, int copy, Bug bug) {
  const Dim grid{static_cast<unsigned>((p.M + kTile - 1) / kTile), static_cast<unsigned>((p.N + kTile - 1) / kTile)};
  const auto kernel = copy == 16  ? product<T, 16>
                      : copy == 8 ? product<T, 8>
                      : copy == 4 ? product<T, 4>
                                  : product<T, 2>;
  const int64_t M = p.M, N = p.N, K = p.K;
  launch({"product", grid, rode::trial::kThreads, kSharedBytes}, kernel, at<const T>(x, M * K), at<const T>(w, N * K), at<T>(y, M * N), p, bug);
}

template <class Kernel, class... A>
void one_warp(Kernel kernel, A... args) {
  launch({"one_warp", {}, 32, 512}, kernel, args...);
}

}  // namespace

PYBIND11_MODULE(_emulator_trial, m) {
  rode::emulator::bind(m);
#define RODE_NAME(name) bugs.append(#name);
  py::list bugs;
  RODE_TRIAL_BUGS(RODE_NAME)
#undef RODE_NAME
  m.attr("BUGS") = bugs;
  m.def("product", [](uintptr_t x, uintptr_t w, uintptr_t y, int M, int N, int K, bool half, int copy, int bug) {
    const auto run = half ? run_product<f16> : run_product<bf16>;
    run(x, w, y, {M, N, K}, copy, static_cast<Bug>(bug));
  });
  m.def("mma", [](const std::string& type, uintptr_t a, uintptr_t b, uintptr_t c) {
    const int depth = type == "tf32" ? 8 : 16;
    one_warp(type == "tf32" ? one_mma<tf32> : type == "f16" ? one_mma<f16> : one_mma<bf16>, at<const float>(a, 16 * depth),
             at<const float>(b, 8 * depth), at<float>(c, 128));
  });
  m.def("ldmatrix", [](int n, bool transpose, uintptr_t matrices, uintptr_t out) {
    const auto kernel = transpose ? one_ldmatrix<4, true> : n == 2 ? one_ldmatrix<2, false> : one_ldmatrix<4, false>;
    one_warp(kernel, at<const uint16_t>(matrices, n * 64), at<uint16_t>(out, n * 64));
  });
  m.def("exchanges", [](uintptr_t in, uintptr_t out) {
    launch({"exchanges", {}, 64}, exchanges, at<const uint32_t>(in, 64), at<uint32_t>(out, 192));
  });
  m.def("other_warp_rounds", [](uintptr_t cells, int n, int rounds) {
    launch({"other_warp_rounds", {}, 64}, other_warp_rounds, at<uint32_t>(cells, n), n, rounds);
  });
  m.def("kept", [](int count, bool whole, uintptr_t out, int64_t first, int64_t seed, uint32_t threshold) {
    const auto run = [&](auto kernel) { one_warp(kernel, at<uint32_t>(out, 32), first, seed, threshold); };
    if (count == 4) return whole ? run(kept<4, true>) : run(kept<4, false>);
    return whole ? run(kept<1, true>) : run(kept<1, false>);
  });
  m.def(
      "scripted",
      [](uintptr_t script, int steps, unsigned blocks, uintptr_t cells, unsigned shared_bytes) {
        launch({"scripted", {blocks}, 64, shared_bytes}, scripted, at<const int>(script, 4 * steps), steps, at<int>(cells, 4));
      },
      py::arg("script"), py::arg("steps"), py::arg("blocks"), py::arg("cells"), py::arg("shared_bytes") = 16);
  m.def("round_trip", [](const std::string& type, uintptr_t in, uintptr_t out, int n) {
    one_warp(type == "tf32" ? round_trip<tf32> : type == "f16" ? round_trip<f16> : round_trip<bf16>,
             at<const float>(in, n), at<float>(out, n), n);
  });
}
