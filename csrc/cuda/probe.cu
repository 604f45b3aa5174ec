// Whether this build has kernels for the current device.
#include "launchers.h"

namespace fastlstm::cuda {

namespace {

__global__ void nothing() {}

}  // namespace

cudaError_t probe_kernels() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, nothing);
  if (error != cudaSuccess) cudaGetLastError();  // it has been reported
  return error;
}

}  // namespace fastlstm::cuda
