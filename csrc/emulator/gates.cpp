// The kernels around library products for the host.
#include "../cuda/gates.cu"
