// For nvcc: every kernel of the trial as a device would get it.
#include "kernels.cuh"

namespace rode::trial {

int launch_all(Shape p, gmem<const bf16> x, gmem<const bf16> w, gmem<bf16> y, gmem<const float> a, gmem<float> c,
               gmem<const uint16_t> matrices, gmem<uint16_t> registers) {
  const Launch tiles{"product", {1, 1, 1}, kThreads, kSharedBytes}, warp{"warp", {1, 1, 1}, 32, 512};
  int error = 0;
  const auto products = [&](auto kernel) { error |= launch(tiles, kernel, x, w, y, p, Bug::none); };
  products(product<bf16, 16>);
  products(product<bf16, 8>);
  products(product<bf16, 4>);
  products(product<bf16, 2>);
  error |= launch(tiles, product<f16, 16>, gmem<const f16>(), gmem<const f16>(), gmem<f16>(), p, Bug::none);
  error |= launch(warp, one_mma<bf16>, a, a, c);
  error |= launch(warp, one_mma<f16>, a, a, c);
  error |= launch(warp, one_mma<tf32>, a, a, c);
  error |= launch(warp, one_ldmatrix<2, false>, matrices, registers);
  error |= launch(warp, one_ldmatrix<4, false>, matrices, registers);
  error |= launch(warp, one_ldmatrix<4, true>, matrices, registers);
  error |= launch(warp, exchanges, gmem<const uint32_t>(), gmem<uint32_t>());
  error |= launch(warp, other_warp_rounds, gmem<uint32_t>(), 0, 0);
  error |= launch(warp, kept<4, true>, gmem<uint32_t>(), 0, 0, 0u);
  error |= launch(warp, kept<1, false>, gmem<uint32_t>(), 0, 0, 0u);
  error |= launch(warp, scripted, gmem<const int>(), 0, gmem<int>());
  error |= launch(warp, round_trip<bf16>, a, c, 1);
  error |= launch(warp, round_trip<f16>, a, c, 1);
  error |= launch(warp, round_trip<tf32>, a, c, 1);
  return error;
}

}  // namespace rode::trial
