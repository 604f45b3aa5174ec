// What the driver takes from CUDA's runtime and from torch's CUDA side.
#pragma once

#include <ATen/core/Tensor.h>

#include "launchers.h"
#include "plan.h"

namespace fastlstm::cuda {

// torch's current stream of a device.
cudaStream_t current_stream(const at::Device& device);

// The limits of a device, asked for once. Throws if no kernel of this build runs there.
const Device& limits_of(const at::Device& device);

// out = a b, or out += a b, by cuBLAS: matrices of the element's storage type, dense in their rows or in their columns.
// Of float32, the factors are rounded to TF32 if the element says so, whatever torch's switch for matrix products says.
void multiply(Element element, const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
              bool accumulate = false);
// [G, m, n] = a [G, m, k] b [G, k, n], by torch; of float32, in full precision.
at::Tensor multiply_batches(const at::Tensor& a, const at::Tensor& b);

// Throws std::runtime_error with the runtime's words unless a call succeeded.
void check(cudaError_t error, const char* what);

}  // namespace fastlstm::cuda
