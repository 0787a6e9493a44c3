// The backward kernels for the host.
#include "../cuda/backward.cu"
