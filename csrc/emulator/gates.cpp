// The kernels around PyTorch's matrix products for the host.
#include "../cuda/gates.cu"
