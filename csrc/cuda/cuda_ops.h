// The operators on CUDA tensors, with the signatures of ../ops.h.
#pragma once

#include "../ops.h"
#include "plan.h"

namespace fastlstm::cuda {

Forward lstm;
Backward lstm_backward;

}  // namespace fastlstm::cuda
