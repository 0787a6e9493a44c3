// What the runtime says about itself.
#include <cuda_runtime.h>

#include "forward.h"

namespace rode::cuda {

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() { return CUDART_VERSION; }

}  // namespace rode::cuda
