// The operators on CUDA tensors, with the signatures of ../ops.h: tensors in, checks, layer after layer the products
// over all steps and the recurrence as planned, tensors out.
//
// Products over all steps (x W_ih^T and the gradients of x and of the weights) are cuBLAS's (products.cpp); the
// recurrence is ours. Everything happens on the current stream of x's device, nothing waits for it, and all memory is
// torch's: a call can be captured in a CUDA graph, unless it has batch_sizes or lengths on the CPU, which are copied.
//
// gates_x, activations (or normalised products) and gradients are saved and exchanged in the dtype of x; sums and cell
// states are float32 (float64 for float64).
#pragma once

#include "../ops.h"
#include "plan.h"

namespace fastlstm::cuda {

ForwardResult lstm(const Call& call, const Wanted& wanted);
BackwardResult lstm_backward(const Call& call, const BackwardCall& backward);

}  // namespace fastlstm::cuda
