// Versions of CUDA, texts of its errors, and limits of a device.
#include "forward.h"
#include "ptx.cuh"

namespace rode::cuda {

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() { return CUDART_VERSION; }

Status max_shared(int device, int& bytes) { return {gpu::max_shared(device, bytes), "cudaDeviceGetAttribute"}; }

}  // namespace rode::cuda
