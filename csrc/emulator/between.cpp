// The kernels around library products for the host.
#include "../cuda/between.cu"
