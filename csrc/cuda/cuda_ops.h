// The operators on CUDA tensors, with the signatures of ../ops.h.
#pragma once

#include "../ops.h"
#include "plan.h"

namespace fastlstm::cuda {

ForwardResult lstm(const Call& call, const Wanted& wanted);
BackwardResult lstm_backward(const Call& call, const BackwardCall& backward);

}  // namespace fastlstm::cuda
