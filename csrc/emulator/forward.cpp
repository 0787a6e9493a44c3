// The forward kernels for the host.
#include "../cuda/forward.cu"
